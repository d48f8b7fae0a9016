"""Files of rows: what they hold comes out as it is, and whatever is broken is told in one line that names the file."""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ntk_prefix.checks import UsageError
from tests.fuzz import INPUTS, damaged_bytes, damaged_json, fuzzed, survives
from train import readers, sources
from train.images import decoded
from train.readers import open_table

ROWS = [{"text": f'row {i}, "quoted"\nand a break', "label": i % 3, "note": None} for i in range(20)]


def png(pixels: np.ndarray, form: str = "PNG", mode: str | None = None) -> bytes:
    stream = io.BytesIO()
    picture = Image.fromarray(pixels)
    (picture if mode is None else picture.convert(mode)).save(stream, form)
    return stream.getvalue()


def write(file: Path, rows: list[dict] = ROWS) -> Path:
    """The rows as a file of its ending."""
    table = pa.Table.from_pylist(rows)
    match file.suffix:
        case ".parquet":
            pa.parquet.write_table(table, file)
        case ".arrow":
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            file.write_text(json.dumps(rows, indent=1))
        case ".csv":
            pa.csv.write_csv(table, file)
    return file


class TestEveryForm:
    @pytest.mark.parametrize("ending", [".parquet", ".arrow", ".jsonl", ".json", ".csv"])
    def test_gives_the_same_rows(self, tmp_path: Path, ending: str) -> None:
        table = open_table(write(tmp_path / f"some{ending}"))
        assert table.names == ("text", "label", "note")
        assert table.column("text") == [row["text"] for row in ROWS]
        assert [str(label) for label in table.column("label")] == [str(row["label"]) for row in ROWS]

    @pytest.mark.parametrize("ending", readers.ENDINGS)
    @pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"PAR1PAR1", b"[" * 10**5, b'{"a":' * 10**5, b'"' * 99])
    def test_is_told_by_name_when_it_is_something_else(self, tmp_path: Path, ending: str, content: bytes) -> None:
        file = tmp_path / f"some{ending}"
        file.write_bytes(content)
        with survives(file):
            open_table(file).column("text")

    def test_names_every_column_once(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text,label,label,note,note\na,1,1,x,y\n")
        table = open_table(tmp_path / "a.csv")
        assert table.column("text") == ["a"]
        with pytest.raises(UsageError, match=r"a\.csv: expected the column label once, got 2 of that name"):
            table.column("label")


class TestText:
    def test_of_numbers_stays_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text,label\n01,1\n2,x\n")
        assert open_table(tmp_path / "a.csv").column("text") == ["01", "2"]

    def test_rows_of_json_need_not_have_the_same_fields(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n\n{"label": "b", "more": [1]}\n')
        table = open_table(tmp_path / "a.jsonl")
        assert table.names == ("text", "label", "more")
        assert (table.column("text"), table.column("label")) == (["a", None], [1, "b"])

    def test_may_begin_with_a_mark_of_its_order_of_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
        (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\na,1\n")
        assert [open_table(tmp_path / name).column("text") for name in ("a.jsonl", "a.csv")] == [["a"]] * 2

    def test_of_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "train.csv")
        with pytest.raises(FileNotFoundError, match=r"found \['train\.csv'\]"):
            sources.read("text", tmp_path)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b'{"text": "a"}\n[1]\n', "a.jsonl, line 2: expected fields of the right types"),
            (b'{"text": "a"}\n{"text": }\n', "a.jsonl, line 2: expected JSON"),
            (b'{"text": "a\xff"}\n', "a.jsonl, line 1: expected JSON"),
            (b'{"text": ' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}", "values nested too deep"),
        ],
    )
    def test_that_is_broken_is_told_with_its_line(self, tmp_path: Path, content: bytes, said: str) -> None:
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(UsageError, match=re.escape(said)):
            open_table(tmp_path / "a.jsonl").column("text")

    def test_without_line_breaks_is_not_read_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(readers, "LONGEST_ROW", 100)
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 200}))
        with pytest.raises(UsageError, match=r"line 1: expected at most 100 bytes, got more"):
            open_table(tmp_path / "a.jsonl")


class TestPackedTables:
    def test_that_unpack_to_more_than_memory_holds_are_refused_in_little_of_it(self, tmp_path: Path) -> None:
        one = pa.DictionaryArray.from_arrays(np.zeros(2000, np.int32), ["x" * 2**20])
        pa.parquet.write_table(pa.table({"text": one}), tmp_path / "a.parquet", store_schema=False)
        assert (tmp_path / "a.parquet").stat().st_size < 10**6
        with survives(tmp_path / "a.parquet"), pytest.raises(UsageError, match=r"at most 268,435,456 bytes, unpacked"):
            open_table(tmp_path / "a.parquet").column("text")

    def test_that_repeat_themselves_are_read(self, tmp_path: Path) -> None:
        pa.parquet.write_table(pa.table({"text": ["the same"] * 10**5}), tmp_path / "a.parquet")
        assert open_table(tmp_path / "a.parquet").column("text") == ["the same"] * 10**5


class TestSavedByDatasets:
    """Folders of ``datasets.save_to_disk``."""

    @staticmethod
    def save(folder: Path, rows: list[dict]) -> None:
        folder.mkdir(parents=True)
        features = {"label": {"names": ["bad", "fair", "good"], "_type": "ClassLabel"}, "text": {"_type": "Value"}}
        table = pa.Table.from_pylist(rows).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": None}
        (folder / "state.json").write_text(json.dumps(state))

    def test_give_their_splits_and_the_names_of_their_classes(self, tmp_path: Path) -> None:
        for split, rows in (("train", ROWS), ("validation", ROWS[:6]), ("test", ROWS[:9])):
            self.save(tmp_path / split, rows)
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
        rows, source, names = sources.read("text", tmp_path)
        assert {split: len(columns["text"]) for split, columns in rows.items()} == {
            "train": 20,
            "validation": 6,
            "test": 9,
        }
        assert names == ("bad", "fair", "good")
        np.testing.assert_array_equal(rows["test"]["label"], [row["label"] for row in ROWS[:9]])
        assert str(tmp_path) in source

    def test_may_be_of_one_split(self, tmp_path: Path) -> None:
        self.save(tmp_path / "one", ROWS)
        assert list(sources.read("text", tmp_path / "one").splits) == ["train"]

    @pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "..", ""])
    def test_are_read_inside_only(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(UsageError, match=r"state\.json: expected names of what lies beside it"):
            sources.read("text", tmp_path)


class TestPictures:
    ramp = (np.arange(256, dtype=np.uint32) * 257).astype(np.uint16).reshape(16, 16)

    @pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
    def test_of_16_bits_are_scaled_to_8(self, form: str) -> None:
        np.testing.assert_array_equal(decoded(png(self.ramp, form), "a"), np.arange(256).reshape(16, 16))

    @pytest.mark.parametrize(
        ("mode", "form"),
        [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("CMYK", "TIFF")],
    )
    def test_of_colors_are_red_green_and_blue(self, mode: str, form: str) -> None:
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[:4] = (255, 0, 0)
        found = decoded(png(pixels, form, mode), "a")
        assert found.shape == (8, 8, 3)
        np.testing.assert_array_equal(found, pixels)

    @pytest.mark.parametrize("mode", ["L", "LA", "1"])
    def test_of_gray_are_gray(self, mode: str) -> None:
        pixels = np.zeros((8, 8), np.uint8)
        pixels[:4] = 255
        found = decoded(png(pixels, "PNG", mode), "a")
        np.testing.assert_array_equal(found if found.ndim == 2 else found[..., 0], pixels)

    def test_stand_upright(self) -> None:
        pixels = np.zeros((4, 8), np.uint8)
        pixels[:, 0] = 255
        stream, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6  # a quarter to the right, as a phone that was held upright notes it
        Image.fromarray(pixels).save(stream, "PNG", exif=exif)
        np.testing.assert_array_equal(decoded(stream.getvalue(), "a"), np.rot90(pixels, -1))

    def test_that_have_no_known_range_are_refused(self) -> None:
        with pytest.raises(UsageError, match="a: expected gray values or colors of 8 or 16 bits, got floating point"):
            decoded(png(np.ones((4, 4), np.float32), "TIFF"), "a")
        with pytest.raises(UsageError, match="expected gray values of 8 or 16 bits, got 0 to 100000"):
            decoded(png(np.array([[0, 100_000]], np.int32), "TIFF"), "a")

    def test_that_claim_more_than_memory_holds_are_refused(self) -> None:
        stream = io.BytesIO()
        Image.new("1", (10_000, 8_000)).save(stream, "PNG")
        assert len(stream.getvalue()) < 50_000
        with pytest.raises(UsageError, match="a: expected at most 67,108,864 pixels, got 10000 x 8000"):
            decoded(stream.getvalue(), "a")

    @pytest.mark.parametrize("path", ["/etc/passwd", "../../secret.png", "nothing.png", "", "\x00"])
    def test_by_path_lie_beside_the_file_that_names_them(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"image": path, "label": 1}) + "\n")
        with pytest.raises(UsageError, match=r"train\.jsonl, row 0"):
            sources.read("digits", tmp_path / "data")

    def test_by_path_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "0.png").write_bytes(png(self.ramp))
        (tmp_path / "train.csv").write_text("file_name,label\n" + "pictures/0.png,cat\npictures/0.png,dog\n" * 2)
        rows, _, names = sources.read("image", tmp_path)
        assert names == ("cat", "dog")
        np.testing.assert_array_equal(decoded(rows["train"]["image"][3], "a"), np.arange(256).reshape(16, 16))


# --------------------------------------------------------------------------------- 300 damaged files each


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def read_rows(file: Path, task: str = "text") -> None:
    """Read a damaged file through the door that users use, and look at what came."""
    with survives(file):
        rows, _, names = sources.read(task, file)
        for column, values in rows["train"].items():
            if column == "label":
                assert set(np.asarray(values)) <= set(range(len(names)))
            elif column == "text":
                assert all(isinstance(value, str) for value in values)


class TestDamaged:
    @fuzzed
    @given(content=damaged_json(ROWS[0]), at=st.integers(0, len(ROWS) - 1))
    def test_jsonl(self, folder: Path, content: bytes, at: int) -> None:
        lines = [json.dumps(row).encode() for row in ROWS]
        (folder / "damaged.jsonl").write_bytes(b"\n".join([*lines[:at], content, *lines[at:]]))
        read_rows(folder / "damaged.jsonl")

    @fuzzed
    @given(content=damaged_json(ROWS[:5]))
    def test_json(self, folder: Path, content: bytes) -> None:
        (folder / "damaged.json").write_bytes(content)
        read_rows(folder / "damaged.json")

    @fuzzed
    @given(st.data())
    def test_csv(self, folder: Path, data: st.DataObject) -> None:
        good = b"text,label,note\n" + b"".join(b'"a ""b"" %d\nc",%d,\n' % (i, i % 3) for i in range(20))
        odd = st.sampled_from([b'"', b",", b"\n", b"\r", b"label", b"text,text,", b"\x00", b"\xff\xfe", b"nan", b"-1"])
        at = data.draw(st.integers(0, len(good)))
        content = good[:at] + data.draw(odd) + good[at:]
        (folder / "damaged.csv").write_bytes(data.draw(damaged_bytes(content)))
        read_rows(folder / "damaged.csv")

    @pytest.mark.parametrize("ending", [".parquet", ".arrow"])
    def test_tables(self, folder: Path, ending: str) -> None:
        good = write(folder / f"good{ending}").read_bytes()
        file = folder / f"damaged{ending}"

        @fuzzed
        @given(content=damaged_bytes(good, head=len(good)))
        def damage(content: bytes) -> None:
            file.write_bytes(content)
            read_rows(file)

        damage()

    @pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "GIF", "WEBP"])
    def test_pictures(self, folder: Path, form: str) -> None:
        """Within a table, as they come."""
        pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
        good, file = png(pixels, form), folder / "pictures.parquet"

        @settings(fuzzed, max_examples=INPUTS if form == "PNG" else INPUTS // 4)
        @given(content=damaged_bytes(good))
        def damage(content: bytes) -> None:
            rows = [{"image": one, "label": i % 2} for i, one in enumerate([good, content, good, good])]
            pa.parquet.write_table(pa.Table.from_pylist(rows), file)
            read_rows(file, "image")

        damage()

    @fuzzed
    @given(state=damaged_json({"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": None}))
    def test_state_of_a_saved_folder(self, folder: Path, state: bytes) -> None:
        saved = folder / "saved"
        saved.mkdir(exist_ok=True)
        if not (saved / "data.arrow").exists():
            write(saved / "data.arrow")
        (saved / "state.json").write_bytes(state)
        with survives(saved):
            sources.read("text", saved)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json"])
def test_another_encoding_of_text_is_named(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    file.write_bytes("text,label\na,b\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"expected text in UTF-8, got UTF-16\. Save it as UTF-8"):
        open_table(file)

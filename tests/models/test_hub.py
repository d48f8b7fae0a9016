"""A model of the hub by its name; the hub itself is a stand-in, there is no network in tests."""

import sys
from pathlib import Path

import huggingface_hub
import pytest

from ntk_prefix import models
from tests.models.formulas import CONFIGS, draw, write


def tiny_folder(path):
    path.mkdir(parents=True)
    write(path, CONFIGS["llama"], draw(CONFIGS["llama"]))


SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Keep what the hub is asked for; it has one model."""
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / SHA
    tiny_folder(snapshot)
    calls = []

    def download(repository, *, revision=None, allow_patterns, ignore_patterns):
        calls.append((repository, revision))
        if repository != "org/tiny":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such model,\n and no network")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_name_is_loaded_and_its_revision_is_told(asked):
    model = models.from_pretrained("org/tiny")
    assert isinstance(model, models.Llama)
    models.from_pretrained("org/tiny@v1.2")
    assert asked == [("org/tiny", None), ("org/tiny", "v1.2")]
    assert models.pinned("org/tiny@v1.2") == models.pinned("org/tiny") == f"org/tiny@{SHA}"
    assert models.load_tokenizer("org/tiny") is None


def test_what_is_there_is_taken_and_the_hub_not_asked(asked, tmp_path):
    tiny_folder(tmp_path / "org" / "tiny")
    models.from_pretrained("org/tiny")
    assert models.pinned("org/tiny") == "org/tiny"
    assert asked == []


@pytest.mark.parametrize("path", ["/no/where", "org/tiny/deeper", "one", "org/model.gguf", "../org"])
def test_what_is_no_name_is_a_path(asked, path):
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        models.from_pretrained(path)
    assert asked == []


def test_the_way_on_is_told_where_the_hub_has_it_not_or_cannot_be_asked(asked, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"LocalEntryNotFoundError: no such model, and no network\. `hf download"
    ):
        models.from_pretrained("org/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        FileNotFoundError, match=r'pip install "huggingface-hub"; `hf download org/tiny --local-dir DIR`'
    ):
        models.from_pretrained("org/tiny")


def test_only_weights_and_settings_are_fetched():
    from ntk_prefix.models.formats import hub

    kept = lambda name: any(Path(name).match(p) for p in hub._WANTED) and "/" not in name  # noqa: E731
    assert kept("config.json")
    assert kept("model-00001-of-00002.safetensors")
    assert not kept("pytorch_model.bin")
    assert not kept("onnx/model.json")

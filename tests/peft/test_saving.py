"""Saving an adapter over another one: whenever it is ended, and whoever reads meanwhile, one whole adapter is found."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from ntk_prefix import peft
from ntk_prefix.peft import files
from tests.peft.tiny import tiny
from tests.small_disk import largest_file


class Killed(BaseException):
    """Ends a save as a signal does that cannot be heard: nothing of ours is done after it."""


def adapter(rank: int) -> Any:
    """A model with an adapter; of one of another rank no part goes together with this."""
    model = peft.apply(tiny(head=False), peft.LoraConfig(r=rank, alpha=3 * rank))
    for each in jax.tree.leaves(nnx.state(model, peft.AdapterParam), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        each[...] = np.full(each.shape, rank, np.float32)
    return model


def rank_of(folder: Path) -> int:
    """Load, and return of which rank all of it is."""
    model = peft.load_adapter(tiny(head=False), folder)
    [[config]] = peft.configs(model).values()
    weights = {float(x) for leaf in jax.tree.leaves(nnx.state(model, peft.AdapterParam)) for x in np.unique(leaf)}
    assert isinstance(config, peft.LoraConfig)
    assert weights == {config.r}
    assert config.alpha == 3 * config.r
    return config.r


@pytest.mark.parametrize("error", [Killed(), OSError("disk full")])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_save_that_is_ended_leaves_the_former_adapter_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int, error: BaseException
) -> None:
    peft.save_pretrained(adapter(2), tmp_path)
    replace, left = Path.replace, iter([True] * renames)

    def replaced(path: Path, target: Path) -> Path:
        if not next(left, False):
            raise error
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replaced)
    with pytest.raises(type(error)):
        peft.save_pretrained(adapter(3), tmp_path)
    assert rank_of(tmp_path) == (3 if renames == 2 else 2)
    monkeypatch.undo()
    peft.save_pretrained(adapter(4), tmp_path)
    assert rank_of(tmp_path) == 4
    assert {file.name for file in tmp_path.iterdir()} == {files.CONFIG, files.WEIGHTS}


def test_a_first_save_that_is_killed_leaves_no_adapter_or_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def replaced(path: Path, target: Path) -> Path:
        if target.name == files.CONFIG:
            raise Killed
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replaced)
    with pytest.raises(Killed):
        peft.save_pretrained(adapter(3), tmp_path)
    assert not (tmp_path / files.CONFIG).exists()
    assert rank_of(tmp_path) == 3
    (tmp_path / files.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="found no adapter_model"):
        rank_of(tmp_path)


def test_who_reads_while_an_adapter_is_replaced_reads_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft.save_pretrained(adapter(2), tmp_path)
    read, saves = files._read_tensors, iter([3])

    def between(file: Path) -> Any:
        found = read(file)
        for rank in saves:
            peft.save_pretrained(adapter(rank), tmp_path)
        return found

    monkeypatch.setattr(files, "_read_tensors", between)
    assert rank_of(tmp_path) == 3


def test_the_same_adapter_is_the_same_bytes(tmp_path: Path) -> None:
    """Programs know an adapter by a hash of its file."""
    contents = set()
    for _ in range(8):
        peft.save_pretrained(adapter(2), tmp_path)
        contents.add((tmp_path / files.WEIGHTS).read_bytes())
    assert len(contents) == 1
    assert rank_of(tmp_path) == 2


def test_a_disk_that_is_full_leaves_the_former_adapter_and_nothing_beside_it(tmp_path: Path) -> None:
    peft.save_pretrained(adapter(2), tmp_path)
    content = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with largest_file(2000), pytest.raises(OSError, match="File too large"):
        peft.save_pretrained(adapter(16), tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == content


def test_a_configuration_that_was_edited_by_hand_is_what_counts(tmp_path: Path) -> None:
    peft.save_pretrained(adapter(2), tmp_path)
    file = tmp_path / files.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 30}))
    [[config]] = peft.configs(peft.load_adapter(tiny(head=False), tmp_path)).values()
    assert config.alpha == 30

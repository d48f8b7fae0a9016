"""What the tests of every kind of file share: damage, and what a reader must do with it.

A reader either returns something whole or raises what :func:`ntk_prefix.checks.explain` turns into one line that names the
file; it never hangs, never takes a gigabyte for a small file, and never lets a number through that is not finite.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ntk_prefix.artifacts import peak_resident_memory
from ntk_prefix.checks import explain

INPUTS = 300
"""Damaged files that every kind of file is tried with."""

SECONDS, BYTES = 5.0, 2**30
"""What a reader may take for one of them."""

fuzzed = settings(
    max_examples=INPUTS,
    deadline=None,
    database=None,
    derandomize=True,  # CI says the same thing every time
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
"""Decorator of a fuzz test."""

ODD_NUMBERS = (0, -1, 1, 2, 10**9, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e38, 1e308, float("nan"), float("inf"))
ODD_TEXTS = ("", "0", "nan", "x" * 1000, "(([a-z.0-9])*)*!", "(a+)+$", "../../etc/passwd", "\x00", "[/x]", "{}")
ODD_CONTAINERS = ([], {}, [1], ["a"], [[]], {"a": 1}, [None])
ODD_VALUES = st.sampled_from((None, True, False, *ODD_NUMBERS, *ODD_TEXTS, *ODD_CONTAINERS))
"""What may stand in a JSON file in the place of any value."""


@st.composite
def damaged_json(draw: st.DrawFn, document: Any) -> bytes:
    """A JSON document in which up to three values are odd, missing or doubled; sometimes nested deep, sometimes not JSON."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(list(_places(document)) or [(None, None)]))
        if holder is None:
            document = copy.deepcopy(draw(ODD_VALUES))
        elif isinstance(holder, dict) and draw(st.integers(0, 5)) == 0:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(draw(ODD_VALUES))  # the next damage may be done inside of it
    content = json.dumps(document).encode()
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return b'{"a":' * 10**5 + b"1" + b"}" * 10**5
    return draw(damaged_bytes(content)) if kind == 1 else content


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes, *, head: int = 4096) -> bytes:
    """A binary file that is cut, has bits flipped (most of them in its head, where sizes stand), or grows in the middle."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        place = draw(st.integers(0, min(len(data), head) - 1) | st.integers(0, len(data) - 1))
        match draw(st.integers(0, 4)):
            case 0:
                del data[place:]
            case 1:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case 2:
                data[place : place + 8] = draw(
                    st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\xff" * 7 + b"\x7f", b"9" * 8])
                )
            case 3:
                data[place:place] = draw(st.binary(min_size=1, max_size=16))
            case 4:
                data[place : place + 4] = draw(
                    st.sampled_from([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff"])
                )
    return bytes(data)


@contextlib.contextmanager
def survives(file: Path | str) -> Iterator[None]:
    """Within it, reading a damaged file may fail only in one line that names it, soon, and in little memory.

    Raises:
        AssertionError: a traceback would be shown, the file is not named, or it took too long or too much.
    """
    before, begun = peak_resident_memory(), time.perf_counter()
    refused: Exception | None = None
    try:
        yield
    except AssertionError:  # of the caller, about what was read
        raise
    except Exception as error:
        refused = error
    seconds, held = time.perf_counter() - begun, peak_resident_memory() - before
    if refused is not None:
        line = explain(refused)
        assert line is not None, f"a traceback: {type(refused).__name__}: {str(refused)[:300]}"
        assert Path(file).name in line, f"the file {Path(file).name} is not named: {line[:300]}"
        assert "\n" not in line.strip(), f"more than one line: {line[:300]}"
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert held < BYTES, f"{held:,} bytes"


def read_whole(file: Path, read: Callable[[], Any]) -> None:
    """Read a damaged file as :func:`survives` says, and look at every number that came."""
    with survives(file):
        found = read()
        for leaf in jax.tree.leaves(found):
            values = np.asarray(leaf) if hasattr(leaf, "dtype") else None
            if values is not None and np.issubdtype(values.dtype, np.inexact):
                assert np.isfinite(values).all(), f"{file.name}: numbers that are not finite came through"

"""The plan: compiled programs are read rightly, and what it says of a step is what the step does."""

import re
from pathlib import Path

import pytest

from ntk_prefix.checks import UsageError
from train.plan import collectives as found_in
from train.plan.collectives import Collective, collectives, gathers, summary
from train.plan.hlo import arrays, parse

TOY = (Path(__file__).parent / "plan_toy.hlo.txt").read_text()
"""What the TPU compiler made for v5e:2x2 of a step over fsdp = 4: an embedding, three layers in a scan, a layer of its own,
and a trained map of 256 x 256, all bfloat16. Layouts are as they came; ``backend_config`` and stack frames are cut out."""


def by_source(name: str) -> Collective:
    return next(each for each in collectives(TOY) if each.sources == (name,))


def test_a_fused_collective_is_counted_once_by_its_channel() -> None:
    lines = re.findall(r"= \S+ all-gather\(", TOY)
    gathered = [each for each in collectives(TOY) if each.kind == "all-gather"]
    assert len(lines) > len(gathered) == 6
    assert len({each.channel for each in gathered}) == 6


def test_what_a_loop_sends_counts_as_often_as_it_runs() -> None:
    in_loop = by_source("frozen['stack']['up']")
    assert (in_loop.times, in_loop.bytes) == (3, 3 * 256 * 1024 * 2)
    assert by_source("frozen['last']['up']").times == 1


def test_contents_are_told_by_where_values_come_from_and_by_shape() -> None:
    table = summary(collectives(TOY))
    weights = (2048 * 256 + 4 * 2 * 256 * 1024 + 256 * 256) * 2
    assert table["weights"]["all-gather"]["bytes"] == weights
    assert table["gradients"] == {"all-reduce": {"channels": 1, "times": 1, "bytes": 131072, "moved": 196608.0}}
    assert table["scalars"]["all-reduce"]["times"] == 1
    assert table.keys() == {"weights", "gradients", "scalars"}


def test_every_weight_of_the_toy_is_gathered_once() -> None:
    program = parse(TOY)
    often = gathers(collectives(program), program)
    assert len(often) == 6
    assert set(often.values()) == {1.0}


def test_an_activation_is_not_taken_for_a_gradient() -> None:
    # the same all-reduce, of a shape that nothing trained has
    rows = TOY.replace("bf16[256,256]{1,0:T(8,128)(2,1)} all-reduce(", "bf16[4,128,256]{2,1,0} all-reduce(")
    assert rows != TOY
    assert "gradients" not in summary(collectives(rows))
    assert summary(collectives(rows))["activations"]["all-reduce"]["bytes"] == 4 * 128 * 256 * 2


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("{{0,1,2,3}}", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=2] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=2] {'axis_0','axis_2'}", 4),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0':(1)2}", 2),
        ("{}", 4),
    ],
)
def test_groups_are_read_in_each_form_that_xla_writes(groups: str, size: int) -> None:
    line = re.search(r"ENTRY[\s\S]*?(%all-reduce\S* = .*)", TOY)
    assert line
    written = re.search(r"replica_groups=(.*?), use_global", line[1])
    assert written
    changed = TOY.replace(line[1], line[1].replace(written[1], groups))
    channel = re.search(r"channel_id=(\d+)", line[1])
    assert channel
    assert [each.group for each in collectives(changed) if each.channel == int(channel[1])] == [size]


def test_a_ring_moves_what_textbooks_say() -> None:
    gather = by_source("frozen['last']['up']")
    assert gather.moved == gather.bytes * 3 / 4
    reduce = next(each for each in collectives(TOY) if each.contents == "gradients")
    assert reduce.moved == 2 * reduce.bytes * 3 / 4


def test_types_are_read_with_their_bytes() -> None:
    found = arrays("(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, f32[], pred[3]{0}, /*index=3*/f8e4m3fn[2])")
    assert [(str(each), each.bytes, each.on_chip) for each in found] == [
        ("bf16[4,8]", 64, True),
        ("f32[]", 4, False),
        ("pred[3]", 3, False),
        ("f8e4m3fn[2]", 2, False),
    ]


def test_a_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(UsageError, match="ENTRY"):
        found_in.collectives("HloModule nothing")

"""The plan: compiled programs are read rightly, and what it says of a step is what the step does."""

import dataclasses
import functools
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from ntk_prefix import peft
from ntk_prefix.artifacts import CHECKOUT
from ntk_prefix.checks import MissingPackageError, UsageError
from train import data, setup
from train.config import CONFIGS, TrainConfig
from train.plan import __main__ as program
from train.plan import collectives as found_in
from train.plan.collectives import Collective, collectives, gathers, summary
from train.plan.estimate import largest_square, model_flops
from train.plan.figure import draw
from train.plan.hlo import arrays, parse
from train.plan.plan import largest_batch, plan
from train.plan.shapes import abstract_batch, abstract_model
from train.plan.step import (
    Compiled,
    DoesNotFitError,
    abstract_arguments,
    check_mesh,
    out_of_memory,
    program_text,
)
from train.plan.topology import CHIPS, Topology

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


BESIDE_A_LOOP = """HloModule m, num_partitions=4

%more (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (q: (s32[], bf16[2], bf16[8])) -> (s32[], bf16[2], bf16[8]) {
  %q = (s32[], bf16[2], bf16[8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %w = bf16[2] get-tuple-element(%q), index=1
  %on = bf16[8] all-gather(%w), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %own = bf16[8] all-gather(%w), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %r = (s32[], bf16[2], bf16[8]) tuple(%j, %w, %own)
}

ENTRY %main (a: bf16[2], b: s32[]) -> bf16[8] {
  %a = bf16[2] parameter(0), metadata={op_name="frozen"}
  %b = s32[] parameter(1), metadata={op_name="batch"}
  %start = bf16[8] all-gather(%a), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %t = (s32[], bf16[2], bf16[8]) tuple(%b, %a, %start)
  %loop = (s32[], bf16[2], bf16[8]) while(%t), condition=%more, body=%body
  ROOT %out = bf16[8] get-tuple-element(%loop), index=2
}
"""


def test_what_begins_before_a_loop_and_goes_on_beside_it_runs_once() -> None:
    found = {each.channel: each for each in collectives(BESIDE_A_LOOP)}
    assert (found[1].times, found[2].times) == (1, 7)
    assert {each.contents for each in found.values()} == {"weights"}


def test_what_stands_behind_a_kernel_s_own_words_is_read_too() -> None:
    words = 'kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 512}"\n}}, metadata={op_name="kernel"}'
    kernel = f'  %k = bf16[2] custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={{{words}\n'
    before = "  %start = bf16[8] all-gather(%a)"
    text = BESIDE_A_LOOP.replace(before, kernel + before)
    assert text != BESIDE_A_LOOP
    assert [each.channel for each in collectives(text)] == [each.channel for each in collectives(BESIDE_A_LOOP)]


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


def test_scores_are_found_and_hidden_states_are_not_taken_for_them() -> None:
    program = parse(
        "HloModule m\n\nENTRY %main (a: bf16[8,8]) -> bf16[2,8,8] {\n  %a = bf16[8,8] parameter(0)\n"
        "  %h = f32[1,8,8] broadcast(%a)\n  ROOT %s = bf16[2,8,8] broadcast(%a)\n}\n"
    )
    assert largest_square(program, 8, frozenset({64})) == 2 * 8 * 8 * 2
    assert largest_square(program, 8, frozenset({64, 128})) == 0
    assert largest_square(program, 4, frozenset()) == 0


def test_a_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(UsageError, match="ENTRY"):
        found_in.collectives("HloModule nothing")


# ------------------------------------------------------------------------------ the step is the real one


class Here(Topology):
    """Eight devices of this machine in the place of chips: the plan's whole path, with another compiler."""

    def devices(self) -> Sequence[jax.Device]:
        return jax.devices()[:8]


@functools.cache
def planned() -> dict[str, Any]:
    config = CONFIGS["tiny"][1].changed(method="lora", fsdp=2, batch_size=16)
    return plan(config, Here("v5e:2x4"), num_labels=10, search=0)


def test_the_planned_step_is_the_step_that_training_takes() -> None:
    config = CONFIGS["tiny"][1].changed(method="ntk_attention", fsdp=2, batch_size=16)
    real = setup.build(config)
    trainer = real.trainer
    _, batch = next(data.train_batches(real.task.train, 16, 0))
    state, placed = trainer.init(real.model), trainer.place(batch)
    taken = trainer.stepper(real.model).lower(state, placed)

    model = abstract_model(config, None, 10)
    placement = check_mesh(config, model, jax.devices())
    same = setup.trainer_of(config, "image-classification", placement)
    arguments = abstract_arguments(same, model, abstract_batch(config, "image-classification", 16))
    assert same.program(model).lower(*arguments).as_text() == taken.as_text()


def test_bytes_of_arguments_are_those_of_the_compiled_program() -> None:
    memory = planned()["step"]["memory"]
    # this machine's compiler pads nothing; the step does not take the frozen head, 32 x 10 and 10 in float32, halved by fsdp
    assert memory["padding of arguments"] == -(32 // 2 * 10 + 10) * 4
    parts = {kind: count for kind, count in memory.items() if kind != "total"}
    assert sum(parts.values()) == memory["total"]
    assert memory["adapters"] > 0
    # AdamW's two moments of everything that is trained, and a few counters
    assert 2 * memory["adapters"] <= memory["optimizer"] <= 2 * memory["adapters"] + 256


def test_the_model_s_own_count_is_shared_among_the_devices_that_a_run_uses() -> None:
    """Which --devices may make fewer than the topology has."""
    config = CONFIGS["tiny"][1].changed(method="lora", devices=2, batch_size=16)
    result = plan(config, Here("v5e:2x4"), num_labels=10, search=0)
    model = abstract_model(config, None, 10)
    whole = model_flops(model, 16, result["tokens_a_row"], remat=False)
    assert (result["mesh"]["data"], result["chips"]) == (2, 8)
    assert result["step"]["flops"]["model"] == whole / 2
    assert planned()["step"]["flops"]["model"] == whole / 8


def test_a_plan_is_written_with_its_configuration_and_its_figure(tmp_path: Path) -> None:
    result = json.loads(json.dumps(planned()))
    assert result["fits"] is True
    assert result["mesh"]["fsdp"] == 2
    assert TrainConfig.from_dict(result["config"]).method == "lora"
    assert {"versions", "git"} <= result.keys()
    assert result["step"]["seconds"]["least"] <= result["step"]["seconds"]["most"]
    draw(result).savefig(tmp_path / "plan.png")
    draw({**result, "step": None, "fits": False}).savefig(tmp_path / "no.png")


# --------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "preset", "parameters"),
    [
        # the makers' own counts; of ViT and BERT without pooler and head
        ("Llama-3.2-1B", "instruct", 1_235_814_400),
        ("Llama-3.1-8B", "instruct", 8_030_261_248),
        pytest.param("Qwen3-8B", "instruct", 8_190_735_360, marks=pytest.mark.slow),
        pytest.param("Gemma-2-9B", "instruct", 9_241_705_984, marks=pytest.mark.slow),
        ("ViT-L/16", "image", 303_301_632),
        ("BERT-large", "text", 334_092_288),
    ],
)
def test_shapes_have_as_many_parameters_as_their_models(name: str, preset: str, parameters: int) -> None:
    config = CONFIGS[preset][1].changed(method="full", image_size=224, precision="bfloat16")
    model = abstract_model(config, name, 2)
    trained, _ = peft.trainable_parameters(model)
    assert trained - (0 if preset == "instruct" else 2 * 1024 + 2) == parameters


def test_the_model_s_own_count_is_two_four_or_six_operations_a_weight_and_token() -> None:
    def count(method: str, *, remat: bool = False) -> float:
        config = CONFIGS["instruct"][1].changed(method=method)
        return model_flops(abstract_model(config, "Llama-3.2-1B", 2), 1, 1, remat=remat)

    # the embeddings make the logits as well; norms are no products
    weights = 1_235_814_400 - 33 * 2048
    attention = 4 * 0.5 * 16 * 2048
    assert count("full") == 6 * weights + 3 * attention
    assert count("prefix_tuning") == 4 * weights + 3 * attention
    assert count("prefix_tuning", remat=True) == 6 * weights + 4 * attention


# ------------------------------------------------------------------------------------- the largest batch


def fake(total: int) -> Compiled:
    memory = {"argument": 100, "output": 0, "alias": 0, "temp": total - 100, "code": 0}
    arguments = {"batch": 0}
    return Compiled(text="", arguments=arguments, memory=memory, flops=0, bytes_accessed=0, seconds={})


@pytest.mark.parametrize("limit", [1100, 2100, 8100, 8099, 250, 150, 60])
def test_the_largest_batch_is_found_in_a_few_compilations(limit: int) -> None:
    def compiled(rows: int) -> Compiled | DoesNotFitError:
        total = 100 + rows * 10
        return fake(total) if total <= limit else DoesNotFitError(total, limit)

    config = CONFIGS["tiny"][1].changed(batch_size=64, fsdp=2)
    tried = {64: compiled(64)}
    found = largest_batch(config, {"data": 1, "fsdp": 2}, tried[64], compiled, tried, 4, limit)
    powers = [2 << k for k in range(12) if 100 + (2 << k) * 10 <= limit]
    assert found["rows"] == max(powers, default=None)
    assert len(tried) <= 5
    if found["certain"]:
        assert isinstance(compiled(2 * found["rows"]), DoesNotFitError)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        # libtpu 0.0.52, and versions before
        ("required for HLO temporaries (64.00G) exceeds available HBM (15.75G). HLO", (64 * 2**30, 63 * 2**28)),
        ("in memory space hbm. Used 23.50G of 15.75G hbm. Exceeded", (47 * 2**29, 63 * 2**28)),
        ("another", (None, None)),
    ],
)
def test_what_the_compiler_lacks_is_read_off_its_words(message: str, told: tuple[int | None, int | None]) -> None:
    assert out_of_memory(message) == told


# ------------------------------------------------------------------------------------------- bad input


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    assert program.main() == 2
    said = capsys.readouterr().out
    assert len(said.strip().splitlines()) == 1
    return said


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--topology", "v5e:3x3"), "--topology: expected one of v4:"),
        (("--topology", "h100"), "v6e:{1x1,2x2"),
        (("--search", "-1"), "--search: expected at least 0"),
        (("--num-labels", "0"), "--num-labels: expected at least 1"),
        (
            ("--model-shape", "GPT-5"),
            "expected one of Llama-3.2-1B, Llama-3.1-8B, Qwen3-8B, Gemma-2-9B, ViT-L/16, BERT-large",
        ),
        (("--model-shape", "BERT-large"), "a model for image-classification, which digits is"),
        (("--batch-size", "0"), "--batch-size: expected at least 1"),
        (
            ("--model-shape", "ViT-L/16", "--image-size", "24"),
            "--image-size: expected a multiple of the model's patches",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    arguments: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert what in refused(capsys, monkeypatch, "tiny", *arguments)


def test_a_ranking_is_not_planned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(capsys, monkeypatch, "ranking").startswith("CONFIG: expected a task of classes or of language")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"model_type": "mamba"}', '{"model_type": "vit", "hidden_size": "wide"}', '{"model_type": "vit"}'],
)
def test_a_file_that_is_no_shape_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    assert str(file) in refused(capsys, monkeypatch, "tiny", "--model-shape", str(file)).replace("\n", "")


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"fsdp": 3}, "--fsdp"),
        ({"batch_size": 12}, "--batch-size"),
        ({"parallel": "pmap"}, "--parallel: expected jit"),
        ({"devices": 9}, "--devices"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        plan(CONFIGS["tiny"][1].changed(method="lora", **fields), Here("v5e:2x4"))


def test_without_libtpu_the_plan_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'pip install "ntk-prefix\[tpu\]"'):
        Topology("v5e:4x4").devices()


def test_every_chip_says_where_its_figures_come_from() -> None:
    for chip in CHIPS.values():
        assert chip.source.startswith("https://cloud.google.com/tpu/docs/")
        # a chip computes many operations for each byte that it reads, and reads faster than it sends
        assert chip.flops > 100 * chip.memory_bandwidth > 100 * chip.link_bandwidth
        assert dataclasses.asdict(chip)["memory"] % 2**30 == 0


# -------------------------------------------------------------------------------- compiled for a real chip


@pytest.fixture(scope="module")
def for_tpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run the program in a process of its own, whose JAX is told to compile for TPU; each plan once."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('the compiler for TPU is not installed: pip install "ntk-prefix[tpu]"')

    @functools.cache
    def run(*arguments: str) -> dict[str, Any]:
        file = tmp_path_factory.mktemp("plan") / "plan.json"
        flags = [
            "--max-length",
            "2048",
            "--batch-size",
            "16",
            "--precision",
            "bfloat16",
            "--param-dtype",
            "file",
            "--search",
            "0",
        ]
        command = [sys.executable, "-m", "train.plan", "instruct", *flags, *arguments, "--out", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(file.read_text())

    return run


NARROW = ("--precision", "bfloat16", "--param-dtype", "file")
LLAMA_1B = ("--model-shape", "Llama-3.2-1B", "--topology", "v5e:4x4", "--fsdp", "16")
in_both_ways = pytest.mark.parametrize("way", [(), ("--scan-layers",)], ids=["unrolled", "loop"])


@pytest.mark.slow
@in_both_ways
def test_ntk_attention_on_a_model_of_1b_moves_weights_and_little_else(
    for_tpu: Callable[..., dict[str, Any]], way: tuple[str, ...]
) -> None:
    step = for_tpu(*LLAMA_1B, *way, "--method", "ntk_attention")["step"]
    sent = step["collectives"]
    assert sum(row["bytes"] for row in sent.get("activations", {}).values()) <= 32 * 2**20
    assert step["weights_gathered_at_most"] <= 2
    rows = 2048 * 2048
    assert not [
        each
        for each in step["largest_collectives"]
        if each["contents"] == "activations" and each["kind"] == "all-reduce" and each["bytes"] >= 2 * rows
    ]


@pytest.mark.slow
@in_both_ways
def test_attention_of_a_model_of_1b_is_a_kernel(for_tpu: Callable[..., dict[str, Any]], way: tuple[str, ...]) -> None:
    step = for_tpu(*LLAMA_1B, *way, "--method", "ntk_attention")["step"]
    # forward, and backward for queries and for keys; of a loop over layers the text has each once
    assert step["kernels"] >= 3
    assert step["largest_square_bytes"] == 0


@pytest.mark.slow
def test_a_rematerialised_step_gathers_each_weight_three_times_at_most(for_tpu: Callable[..., dict[str, Any]]) -> None:
    assert for_tpu(*LLAMA_1B, "--method", "ntk_attention", "--remat")["step"]["weights_gathered_at_most"] <= 3


@pytest.mark.slow
def test_ntk_attention_takes_no_more_room_than_the_step_without_it(for_tpu: Callable[..., dict[str, Any]]) -> None:
    with_it = for_tpu(*LLAMA_1B, "--method", "ntk_attention")["step"]["memory"]
    # one small matrix at the bottom: gradients run through all layers, and nothing is added to them
    nothing = ("--method", "lora", "--adapter", "r=1", "target=layers.0.attention.query")
    without = for_tpu(*LLAMA_1B, *nothing)["step"]["memory"]

    def temporaries(memory: dict[str, int]) -> int:
        return memory["activations"] + memory["other temporaries"]

    assert temporaries(with_it) <= 1.05 * temporaries(without)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_said_with_what_it_needs(for_tpu: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(AssertionError, match=r"does not fit: at least .* GiB of 15\.75 GiB"):
        for_tpu("--model-shape", "Llama-3.2-1B", "--topology", "v5e:1x1", "--method", "full", "--batch-size", "64")


class _Unreadable:
    """What JAX makes of a program whose instructions it does not know, and a compiler that writes text where it is told."""

    def __init__(self, said: str, files: dict[str, str]):
        self.said, self.files = said, files

    def as_text(self) -> str:
        raise jax.errors.JaxRuntimeError(self.said)

    def compile(self, compiler_options: dict[str, Any]) -> None:
        for name, text in self.files.items():
            (Path(compiler_options["xla_dump_to"]) / name).write_text(text)


LAST = "module_0001.jit_step.after_optimizations_after_buffer_assignment.txt"


class TestTheTextOfAProgram:
    unknown = "INTERNAL: RET_CHECK failure: async-update instruction should have 1 operands but sees 3"

    def test_is_written_by_the_compiler_where_jax_cannot_read_it(self) -> None:
        made: Any = _Unreadable(self.unknown, {LAST: "HloModule step", "module_0001.before_optimizations.txt": "no"})
        assert program_text(made, made) == "HloModule step"

    @pytest.mark.parametrize("files", [{}, {LAST: "a", f"module_0002.{LAST}": "b"}])
    def test_is_asked_for_elsewhere_where_none_or_several_were_written(self, files: dict[str, str]) -> None:
        made: Any = _Unreadable(self.unknown, files)
        with pytest.raises(UsageError, match=f"expected the text of one compiled program, got {len(files)} files"):
            program_text(made, made)

    def test_other_errors_are_what_they_are(self) -> None:
        made: Any = _Unreadable("INTERNAL: something else", {LAST: "HloModule step"})
        with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
            program_text(made, made)

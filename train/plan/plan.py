"""The plan of one run: its step compiled, what it costs, and the largest batch that fits."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ntk_prefix import peft
from ntk_prefix.artifacts import provenance
from train.config import TrainConfig
from train.plan.estimate import Estimate, estimate, model_flops, row_length
from train.plan.shapes import abstract_batch, abstract_model
from train.plan.step import Compiled, DoesNotFitError, check_mesh, compile_step
from train.plan.topology import Topology
from train.sources import spec_of

__all__ = ["DOES_NOT_FIT", "largest_batch", "plan"]

DOES_NOT_FIT = 1
"""Exit status."""

LARGEST_FACTOR = 2**10
"""How many times the batch of the configuration is looked at, at most."""


def plan(
    config: TrainConfig,
    topology: Topology,
    *,
    shape: str | None = None,
    num_labels: int = 2,
    search: int = 3,
    console: Console | None = None,
) -> dict[str, Any]:
    """Return all that can be known of a run before it is run, as plain values.

    Args:
        config: of the run.
        topology: what it would run on.
        shape: see :func:`train.plan.shapes.model_fields`.
        num_labels: of a classifier.
        search: batch sizes that may be compiled beside the configuration's own.
        console: where progress is shown.

    Raises:
        UsageError: a configuration, a mesh and a model that do not fit each other; before anything is compiled.
    """
    model = abstract_model(config, shape, num_labels)
    placement = check_mesh(config, model, topology.devices())
    mesh = placement["mesh"]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console or Console(quiet=True)) as progress:

        def compiled(batch_size: int) -> Compiled | DoesNotFitError:
            bar = progress.add_task(f"compiling {batch_size} rows for {topology.name}", total=1)
            try:
                return compile_step(config.changed(batch_size=batch_size), model, placement)
            except DoesNotFitError as error:
                return error
            finally:
                progress.update(bar, completed=1)

        own = compiled(config.optim.batch_size)
        kind = spec_of(config.task).kind
        batch = abstract_batch(config, kind, config.optim.batch_size // config.optim.accumulate)
        length = row_length(model, batch)
        found: Estimate | None = None
        if isinstance(own, Compiled):
            bar = progress.add_task("reading the program", total=1)
            count = model_flops(model, len_rows(batch), length, remat=config.device.remat in (True, "full"))
            found = estimate(
                own,
                topology.chip,
                parts=config.optim.accumulate,
                chips=mesh.size,
                model_count=count,
                length=length,
                states=_states(len_rows(batch) * length, model.config, mesh.shape),
            )
            progress.update(bar, completed=1)
        tried = {config.optim.batch_size: own}
        largest = (
            largest_batch(config, mesh.shape, own, compiled, tried, search, topology.chip.memory) if search else None
        )
    trained, all_of_it = peft.trainable_parameters(model)
    fits = isinstance(own, Compiled) and own.total <= topology.chip.memory
    return {
        "config": config.as_dict(),
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "model_shape": shape,
        "num_labels": num_labels,
        "rows": config.optim.batch_size,
        "tokens_a_row": length,
        "trainable_parameters": trained,
        "parameters": all_of_it,
        "chip": {
            "memory": topology.chip.memory,
            "flops": topology.chip.flops,
            "memory_bandwidth": topology.chip.memory_bandwidth,
            "link_bandwidth": topology.chip.link_bandwidth,
            "source": topology.chip.source,
        },
        "fits": fits,
        "needed": own.total if isinstance(own, Compiled) else own.needed,
        "available": (own.available if isinstance(own, DoesNotFitError) else None) or topology.chip.memory,
        "compile_seconds": own.seconds if isinstance(own, Compiled) else None,
        "step": None if found is None else found.as_dict(),
        "largest_batch": largest,
        "tried": {
            str(size): each.total if isinstance(each, Compiled) else None for size, each in sorted(tried.items())
        },
        **provenance(*_compiler(), sources=("ntk_prefix/**/*.py", "train/**/*.py")),
    }


def _compiler() -> tuple[str, ...]:
    """Return the package that compiles for TPU; none where a plan is for devices of this machine."""
    return ("libtpu",) if importlib.util.find_spec("libtpu") else ()


def _states(tokens: int, sizes: Any, mesh: Mapping[str, int]) -> frozenset[int]:
    """Return how many entries a device has of hidden states, of the model and of its MLP, whole and divided by "tensor".

    Of one layer, and of all that a loop over layers keeps.
    """
    tensor = mesh.get("tensor", 1)
    here = tokens * tensor // math.prod(mesh.values())
    widths = (sizes.hidden_size, sizes.intermediate_size)
    layers = (1, sizes.num_hidden_layers)
    return frozenset(n * here * width // shares for n in layers for width in widths for shares in (1, tensor))


def len_rows(batch: Mapping[str, Any]) -> int:
    """Return the rows of a batch of shapes."""
    return int(batch["weight"].shape[0])


def largest_batch(
    config: TrainConfig,
    mesh: Mapping[str, int],
    own: Compiled | DoesNotFitError,
    compiled: Callable[[int], Compiled | DoesNotFitError],
    tried: dict[int, Compiled | DoesNotFitError],
    search: int,
    memory: int,
) -> dict[str, Any]:
    """Return the largest batch that fits, of the configuration's own times powers of two.

    What a step holds beside its arguments grows with its rows: where that would reach the chip's memory is looked at
    first, then its neighbors, at most ``search`` sizes.

    Args:
        config: of the run.
        mesh: the sizes of its axes.
        own: what came of the configuration's own batch.
        compiled: compiles another.
        tried: size -> what came of it; what is compiled here is put into it.
        search: how many may be compiled.
        memory: of a chip.

    Returns:
        ``rows``, None if none that was tried fits, and ``certain``: whether twice as many were seen not to fit.
    """
    size = config.optim.batch_size
    shares = config.optim.accumulate * math.prod(side for axis, side in mesh.items() if axis != "tensor")
    smallest = min(size >> k for k in range(32) if size >> k and size % (1 << k) == 0 and (size >> k) % shares == 0)
    # the exponent that is known to fit, and the least that is known not to
    low, high = (0, None) if isinstance(own, Compiled) else (None, 0)
    least, most = int(math.log2(smallest / size)), int(math.log2(LARGEST_FACTOR))
    guess = _first_guess(own, memory)
    guess = None if guess is None else min(max(guess, least), most)
    for _ in range(search):
        if low is not None and high is not None and high - low == 1:
            break
        if low is None:
            assert high is not None
            step = high - 1 if guess is None else min(guess, high - 1)
        elif high is None:
            step = low + 1 if guess is None else max(guess, low + 1)
        else:
            step = min(max(guess, low + 1), high - 1) if guess is not None else (low + high) // 2
        guess = None
        rows = size << step if step >= 0 else size >> -step
        if not least <= step <= most:
            break
        tried[rows] = compiled(rows)
        low, high = (step, high) if isinstance(tried[rows], Compiled) else (low, step)
    fitting = [rows for rows, each in tried.items() if isinstance(each, Compiled)]
    best = max(fitting, default=None)
    certain = best is not None and isinstance(tried.get(2 * best), DoesNotFitError)
    return {"rows": best, "certain": certain}


def _first_guess(own: Compiled | DoesNotFitError, memory: int) -> int | None:
    """Return the power of two at which what grows with the rows would just fit, None where nothing says."""
    if isinstance(own, DoesNotFitError):
        if own.needed is None or own.available is None:
            return None
        return -max(1, math.ceil(math.log2(own.needed / own.available)))
    grows = own.memory["temp"] + own.arguments["batch"]
    free = memory - (own.total - grows)
    return math.floor(math.log2(free / grows)) if grows and free > grows else None

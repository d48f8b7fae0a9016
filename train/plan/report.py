"""A plan in words, on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["show", "size"]


def size(count: float | None) -> str:
    """Return bytes as people read them."""
    if count is None:
        return "unknown"
    for unit, width in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= width:
            return f"{count / width:,.2f} {unit}"
    return f"{count:,.0f} B"


def show(result: dict[str, Any], console: Console) -> None:
    """Print what :func:`train.plan.plan.plan` returned."""
    config, step = result["config"], result["step"]
    mesh = ", ".join(f"{axis} {count}" for axis, count in result["mesh"].items())
    say = _sayer(console)
    say(
        f"{result['model_shape'] or config['model']}, {config['method']}, {config['device']['precision']}: "
        f"{result['trainable_parameters']:,} of {result['parameters']:,} parameters trained; {result['rows']} rows of "
        f"{result['tokens_a_row']} tokens per step; {result['topology']} ({mesh})"
    )
    if step is None:
        least = f"at least {size(result['needed'])}" if result["needed"] else "more"
        say(f"does not fit: {least} of {size(result['available'])} a chip", style="red")
    else:
        memory, costs = _tables(step, result)
        console.print(memory)
        console.print(costs)
        seconds, flops = step["seconds"], step["flops"]
        say(
            f"a step takes at least {seconds['least']:.3g} s if all overlaps, {seconds['most']:.3g} s if nothing does: "
            f"matrix units {seconds['compute']:.3g} s ({flops['model'] / 1e12:.3g} Tflop a chip by the model's own count, "
            f"{flops['compiled'] / 1e12:.3g} by the compiler's), main memory {seconds['memory']:.3g} s, "
            f"links {seconds['links']:.3g} s; at the vendor's figures ({result['chip']['source']})"
        )
        say(
            f"weights gathered at most {step['weights_gathered_at_most']:.3g} times per step, "
            f"{step['kernels']} calls of Mosaic kernels, largest T x T buffer {size(step['largest_square_bytes'])}; "
            f"compiled in {result['compile_seconds']['compile']:.0f} s"
        )
        share = result["needed"] / result["available"]
        verdict = "fits" if result["fits"] else "does not fit"
        say(
            f"{verdict}: {size(result['needed'])} of {size(result['available'])} a chip ({share:.0%})",
            style="green" if result["fits"] else "red",
        )
    if (largest := result["largest_batch"]) is not None:
        if largest["rows"] is None:
            say("no batch that was tried fits")
        else:
            more = "twice as many do not fit" if largest["certain"] else "more were not tried, see --search"
            say(f"largest batch that fits: {largest['rows']} rows; {more}")


def _sayer(console: Console) -> Any:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    return say


def _tables(step: dict[str, Any], result: dict[str, Any]) -> tuple[Table, Table]:
    memory = Table("bytes per chip", "", "share", title_justify="left")
    for kind, count in step["memory"].items():
        memory.add_row(kind, size(count), f"{count / result['chip']['memory']:.1%}", end_section=kind == "program")
    sent = Table("sent between chips", "collective", "count", "size", "leaves a chip")
    for contents, kinds in sorted(step["collectives"].items()):
        for kind, row in sorted(kinds.items()):
            sent.add_row(contents, kind, f"{row['times']:,}", size(row["bytes"]), size(row["moved"]))
    return memory, sent

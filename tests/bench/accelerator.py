"""Everything a GPU or TPU has to show, in nine minutes: ``make accelerator``, or ``python -m tests.bench.accelerator``.

Each part (``accelerator_parts.PARTS``) is a process of its own, stopped at its limit, so that one which fails or hangs
leaves the others alone. Every row is written as it is measured, into ``DEVICE.json`` and a table ``DEVICE.md`` beside it:
whoever is interrupted, or out of time, runs the same command again and goes on. Rows of other sources, of another
version of a package or of another device are not mixed in: the file is begun anew.

    make accelerator                     on the device of this Python's JAX: .venv if there is one, else python3
    make accelerator PYTHON=python3.12   on that of another
    make accelerator WHEELS=FOLDER       with packages out of a folder of wheels, without network
    make accelerator TINY=1              every part, tiny, on any machine: does it run? It measures nothing

Exit statuses: 0 all rows are there, 1 a part failed or a row does not hold, 2 usage, 4 out of time: run it again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("jax", "flax", "optax", "jaxtyping", "msgspec", "numpy", "scipy", "threadpoolctl", "rich")
"""What the library and flax import. Nothing here but Python's own is imported before they are known to be there."""
PART_NAMES = ("correctness", "attention", "step", "decoding", "large step", "prefix_ntk")
USAGE, LATER = 2, 4


def missing() -> str | None:
    """Return the one line for packages that this Python has not; None if it has all."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return (
        f"expected {', '.join(NEEDED)} in {sys.executable}, got none of: {', '.join(absent)}. pip install them; without "
        f"network, copy their wheels (pip download --only-binary :all: --no-deps {' '.join(absent)} -d FOLDER) and run "
        "make accelerator WHEELS=FOLDER; or name another Python, make accelerator PYTHON=..."
    )


# ------------------------------------------------------------------------------------- in a part's process


def run_part(name: str, file: Path, tiny: bool) -> int:
    """Measure what is missing of a part and write each row into the results; return the exit status."""
    from tests.bench import accelerator_parts as parts

    sizes = parts.TINY if tiny else parts.FULL
    failed = False
    for row, function in parts.PARTS[name][0](sizes):
        results = read(file)
        rows = results["parts"].setdefault(name, {})
        if row in rows:
            continue
        print(f"  {row}", flush=True)
        begun = time.perf_counter()
        try:
            rows[row] = function()
        except Exception as error:  # one row of many: it says so, and the others run
            failed = True
            print(f"    failed: {parts.said(error)}", flush=True)
            results.setdefault("failed", {})[f"{name}: {row}"] = parts.said(error)
        else:
            rows[row]["took s"] = round(time.perf_counter() - begun, 1)
            results.setdefault("failed", {}).pop(f"{name}: {row}", None)
        write(file, results)
    return int(failed)


def describe() -> dict[str, Any]:
    """Return device, limits of the parts, and where the sources come from."""
    import jax

    from ntk_prefix.artifacts import provenance
    from tests.bench import accelerator_parts as parts
    from tests.bench.bench_attention import processor

    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else processor(),
        "platform": device.platform,
        "devices": jax.device_count(),
        "limits": {name: limit for name, (_, limit) in parts.PARTS.items()},
        "provenance": provenance(sources=("ntk_prefix/**/*.py", "tests/bench/*.py")),
    }


def read(file: Path) -> dict[str, Any]:
    """Return results as they stand."""
    return json.loads(file.read_text())


def write(file: Path, results: dict[str, Any]) -> None:
    """Write results and their table, whole."""
    from ntk_prefix.artifacts import json_text, write_whole

    write_whole(file, json_text(results).encode())
    write_whole(file.with_suffix(".md"), table(results).encode())


# ---------------------------------------------------------------------------------------------- the table


def table(results: dict[str, Any]) -> str:
    """Return the results in Markdown, a table for each part."""
    about, made = results["about"], results["about"]["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    lines = [
        f"# {about['device']}{' (tiny sizes: nothing is measured)' if results['tiny'] else ''}",
        "",
        f"`make accelerator`, {about['devices']} {about['platform']} device(s), one of them used; {versions}; Python "
        f"{made['python']}; commit {made['git']}. Medians, quartiles in brackets.",
    ]
    for part, rows in results["parts"].items():
        flat = [(row, name, each) for row, entry in rows.items() for name, each in _programs(entry)]
        columns = list(dict.fromkeys(key for _, _, each in flat for key in each if key not in _FOLDED))
        named = any(name for _, name, _ in flat)
        head = ["", *([""] if named else []), *columns]
        lines += ["", f"## {part}", "", _line(head), _line(["---"] * len(head))]
        for row, name, each in flat:
            lines.append(_line([row, *([name] if named else []), *(_cell(each, key) for key in columns)]))
    if results.get("failed"):
        lines += ["", "## failed", "", *(f"- {row}: {why}" for row, why in results["failed"].items())]
    return "\n".join(lines) + "\n"


_FOLDED = {"quartiles ms", "took s", "rounds", "programs"}


def _programs(entry: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the programs of a row, each with what the row says of all; a row without any is one itself."""
    shared = {key: value for key, value in entry.items() if key != "programs"}
    return [(name, {**each, **shared}) for name, each in entry.get("programs", {"": {}}).items()]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(each: dict[str, Any], key: str) -> str:
    value = each.get(key)
    if value is None:
        return ""
    if key == "median ms":
        low, high = each["quartiles ms"]
        return f"{value:.3g} ({low:.3g}..{high:.3g})"
    if isinstance(value, bool):
        return "yes" if value else "**no**" if key in ("holds", "finite") else "no"
    if isinstance(value, list):
        return " x ".join(str(entry) for entry in value)
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value:,.0f}" if isinstance(
        value, float
    ) else str(value)  # fmt: skip


# ------------------------------------------------------------------------------------------ the command


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are missing; return the exit status."""
    # argparse: a machine with an accelerator may have no tyro
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tiny", action="store_true", help="all parts at sizes that a CPU runs in seconds")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no part goes on (9)")
    parser.add_argument(
        "--parts", nargs="+", choices=PART_NAMES, default=PART_NAMES, metavar="PART", help=f"{PART_NAMES}"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (tests/bench/results; tiny: runs/accelerator)")
    parser.add_argument("--fresh", action="store_true", help="measure the named parts again")
    parser.add_argument("--part", choices=(*PART_NAMES, "describe"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    line = missing()
    if line is None and not 0 < options.minutes <= 24 * 60:
        line = f"--minutes: expected a number from 0 to {24 * 60}, got {options.minutes:g}."
    if line is not None:
        print(line, file=sys.stderr)
        return USAGE
    if options.part == "describe":
        print(json.dumps(describe()))
        return 0
    if options.part:
        return run_part(options.part, options.file, options.tiny)
    return conduct(options)


def conduct(options: argparse.Namespace) -> int:
    """Run the parts, each in a process of its own; return the exit status."""
    begun = time.monotonic()
    out = options.out or (ROOT / "runs" / "accelerator" if options.tiny else ROOT / "tests" / "bench" / "results")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out: expected a folder, got {out}: {error.strerror}.", file=sys.stderr)
        return USAGE
    told = part_process(["--part", "describe"], out, 120, captured=True)
    if told.returncode:
        print(
            f"JAX does not start in {sys.executable}: {(told.stderr.strip().splitlines() or ['?'])[-1]}",
            file=sys.stderr,
        )
        return USAGE
    about = json.loads(told.stdout.splitlines()[-1])
    if about["platform"] == "cpu" and not options.tiny:
        print(
            f"expected a GPU or TPU, got JAX {about['provenance']['versions']['jax']} of {sys.executable} on its CPU "
            f"only ({about['device']}). Install jax[cuda13] or jax[tpu] there, or name a Python that has it: make "
            "accelerator PYTHON=...; make accelerator TINY=1 runs every part small, here, and measures nothing.",
            file=sys.stderr,
        )
        return USAGE
    file = out / f"{re.sub(r'[^a-z0-9]+', '-', about['device'].lower()).strip('-')}.json"
    results = continued(file, about, options)
    write(file, results)
    print(f"{about['device']}: parts {', '.join(options.parts)}; results in {file} and {file.with_suffix('.md').name}")
    ended: dict[str, str] = {}
    for name in options.parts:
        left = 60 * options.minutes - (time.monotonic() - begun)
        if left < 5:
            ended[name] = "out of time"
            continue
        print(f"{name} ({left:.0f} s left)", flush=True)
        command = ["--part", name, "--file", str(file), *(["--tiny"] if options.tiny else [])]
        try:
            status = part_process(command, out, min(about["limits"][name], left)).returncode
        except subprocess.TimeoutExpired:
            ended[name] = "out of time"
        else:
            ended[name] = "done" if status == 0 else "rows failed" if status == 1 else f"exit status {status}"
        print(f"  {ended[name]}", flush=True)
    return concluded(file, ended)


def continued(file: Path, about: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the results to go on with: those that stand there, if they are of the same sources and device."""
    fresh = {"about": about, "tiny": options.tiny, "parts": {}, "failed": {}}
    if not file.exists():
        return fresh
    try:
        found = read(file)
        same = found["tiny"] == fresh["tiny"] and _measured(found["about"]) == _measured(about)
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        kept = file.with_suffix(".before.json")
        file.replace(kept)
        print(f"{file.name} is of other sources, versions or sizes: begun anew, the former is {kept.name}")
        return fresh
    if options.fresh:
        for name in options.parts:
            found["parts"].pop(name, None)
    return found


def _measured(about: dict[str, Any]) -> dict[str, Any]:
    """Return what results depend on: not the commit, which a commit of the results would change."""
    made = {key: value for key, value in about["provenance"].items() if key != "git"}
    return {**about, "provenance": made, "limits": None}


def concluded(file: Path, ended: dict[str, str]) -> int:
    """Say how it went; return the exit status."""
    results = read(file)
    wrong = [
        f"{part}: {row}"
        for part, rows in results["parts"].items()
        for row, each in rows.items()
        if each.get("holds") is False
    ]
    for row in wrong:
        print(f"does not hold: {row}")
    late = [name for name, how in ended.items() if how == "out of time"]
    broken = [f"{name} ({how})" for name, how in ended.items() if how not in ("done", "out of time")]
    if broken:
        print(f"failed: {', '.join(broken)}; the reasons are in {file}")
    if late:
        print(f"out of time: {', '.join(late)}. Run the same command again: it goes on with what is missing.")
    return 1 if wrong or broken else LATER if late else 0


def part_process(
    arguments: list[str], out: Path, limit: float, captured: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run this program for a part, with compiled programs kept for the next time."""
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / "runs" / "accelerator" / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
        # torch beside us wants some of the memory
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    command = [sys.executable, "-m", "tests.bench.accelerator", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**variables, **os.environ}, timeout=limit, capture_output=captured, text=True
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        sys.exit(130)

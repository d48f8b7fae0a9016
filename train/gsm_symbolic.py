"""Print solved problems of the verified generators of gsm_symbolic, one JSON array a line.

Run by ``train.sources`` in a process of its own: ``python -I -S -B gsm_symbolic.py FOLDER ROWS SHORTEST``. FOLDER holds the
generators and nothing else; of all templates, or of the SHORTEST ones if that is not 0.
"""

from __future__ import annotations

import ast
import importlib
import json
import random
import sys
from pathlib import Path

PACKAGE = "reasoning_gym.arithmetic.gsm_symbolic."


def main(folder: str, rows: int, shortest: int) -> None:
    """Print as many different problems."""
    sys.path.insert(0, folder)
    # without any __init__.py: as namespace packages they import without the rest and its dependencies
    halves = [importlib.import_module(PACKAGE + name) for name in ("generators_00_49", "generators_50_99")]
    source = Path(folder, *PACKAGE.split("."), "gsm_symbolic.py").read_text(encoding="utf-8")
    sound = next(
        ast.literal_eval(line.value)
        for line in ast.parse(source).body
        if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") == "tasks_ok"
    )

    def solved(kind: int, draw: int) -> tuple[str, str]:
        example = getattr(halves[kind // 50], f"generate_{kind}")(random.Random(draw), 1.0)
        return example["question"], example["metadata"]["answer_cot"]

    if shortest:
        longest = {kind: max(len("".join(solved(kind, draw))) for draw in range(50)) for kind in sound}
        sound = sorted(sound, key=longest.__getitem__)[:shortest]
    seen: set[str] = set()
    draw = 0
    while len(seen) < rows:
        question, answer = solved(sound[draw % len(sound)], draw)
        draw += 1
        if question not in seen:
            seen.add(question)
            print(json.dumps([question, answer]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

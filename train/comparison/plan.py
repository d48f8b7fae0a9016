"""The plan of a table: its cells, and the configuration of each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ntk_prefix.checks import expected
from train.command import Checked, check_rates, typed_changes
from train.config import CONFIGS, FIELD_TYPES, TrainConfig
from train.profiles import PROFILES, Name, Row
from train.sources import check_source, find_folder, spec_of

__all__ = ["Cell", "Comparison"]


OF_THE_CELL = {
    "task": "Choose tasks with --tasks",
    "method": "Choose methods with --rows",
    "adapter": "Choose methods with --rows",
    "learning_rate": "Choose rates with --grid",
    "seed": "Choose how many seeds with --seeds",
    "test": "The test split is read for the chosen rate only",
}
"""What a cell's place in the table says, with what to do: set for all, cells of different names would be one run."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run."""

    task: str
    row: Row
    learning_rate: float
    seed: int

    @property
    def folder(self) -> Path:
        """Where it lies, in the table's folder."""
        return Path("cells", self.task, self.row[0].replace(" ", "_"), f"{self.learning_rate:g}-seed{self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Checked):
    """Methods x tasks x seeds, one table, one figure."""

    profile: Name = "small"
    """small: samples sized for four hours of two cores; confirm: its rows of equal count on test rows that it has not
    read; full: all data and two more tasks, for a GPU; ablation: parts of NTK-Attention; math and math_short: SmolLM2 on
    all kinds of generated problems and on eight short ones; long and long_full: small and full for long documents, sized
    for three hours; yardstick: the method comparison of Hugging Face's peft, for a decoder on a GPU; yardstick_small: its
    short form, SmolLM2 on GSM8K; ranking: which continuation fits, MiniLM, with --set generated=FILE of
    train.write_negatives."""
    tasks: tuple[str, ...] = ()
    """Some of the profile's tasks; all for none."""
    rows: tuple[str, ...] = ()
    """Some of the rows, by label; all for none."""
    seeds: int | None = None
    """How many; the profile's own (3, or 1 for mathematics) if None."""
    grid: tuple[float, ...] = ()
    """Learning rates that every row is tuned over; the profile's own, which may differ by row, for none."""
    data_dir: Path | None = None
    """A folder with data sets; tasks that are not in it come from the assets."""
    set: tuple[str, ...] = ()
    """field=value pairs of TrainConfig that every cell gets, such as steps=20."""
    out: Path = Path("runs/compare")
    """Folder of the table and its cells."""

    def check(self) -> None:
        """Refuse what cannot run, before the first cell."""
        tasks = PROFILES[self.profile].tasks
        if unknown := {*self.tasks} - {*tasks}:
            raise expected("--tasks", f"some of {', '.join(tasks)}", ", ".join(sorted(unknown)))
        labels = {row[0] for task in self.chosen_tasks for row in PROFILES[self.profile].rows_of(task)}
        if unknown := {*self.rows} - labels:
            raise expected("--rows", f"some of {sorted(labels)}", sorted(unknown))
        if self.seeds is not None and self.seeds < 1:
            raise expected("--seeds", "at least one", self.seeds)
        check_rates("--grid", self.grid)
        for field in typed_changes("--set", self.set, FIELD_TYPES):
            if field in OF_THE_CELL:
                raise expected(f"--set {field}", "it left alone", "a value", OF_THE_CELL[field])
        for cell in self.grid_cells():
            self.config(cell)

    @property
    def chosen_tasks(self) -> tuple[str, ...]:
        """The tasks of this table."""
        return tuple(dict.fromkeys(self.tasks)) or tuple(PROFILES[self.profile].tasks)

    def rows_of(self, task: str) -> list[Row]:
        """Return the rows of a task."""
        return [row for row in PROFILES[self.profile].rows_of(task) if not self.rows or row[0] in self.rows]

    def pairs(self) -> list[tuple[str, Row]]:
        """Return every task with every row of it: the lines of the table."""
        return [(task, row) for task in self.chosen_tasks for row in self.rows_of(task)]

    @property
    def repeats(self) -> int:
        """The number of seeds."""
        return self.seeds or PROFILES[self.profile].seeds

    def rates_of(self, row: Row) -> tuple[float, ...]:
        """Return the learning rates that a row is tuned over; of one, which needs no choice, only that."""
        profile = PROFILES[self.profile]
        return tuple(dict.fromkeys(self.grid)) or dict(profile.own_grids).get(row[0], profile.grid)

    def check_sources(self) -> None:
        """Refuse tasks whose rows are nowhere, before the first cell.

        Raises:
            UsageError, AssetError, FileNotFoundError: as :func:`train.sources.check_source`.
        """
        for task in self.chosen_tasks:
            usual = CONFIGS[task][1].task
            given = typed_changes("--set", self.set, FIELD_TYPES).get("data_dir") or self.data_dir
            # a task that is not in the folder comes from the assets, if these have it
            found = given is not None and find_folder(usual, given) is not None
            check_source(usual, given if found or spec_of(usual).assets is None else None)
        for cell in self.grid_cells():
            data = self.config(cell).data
            for flag, file in (("generated", data.generated), ("human", data.human)):
                if file is not None and not Path(file).expanduser().is_file():
                    raise expected(f"--set {flag}", "a file", f"{file} of the task {cell.task}, which is not there")

    def grid_cells(self, *, seeds: int = 1) -> Iterator[Cell]:
        """Yield a cell for each line and rate, with the first seeds."""
        for task, row in self.pairs():
            for rate, seed in itertools.product(self.rates_of(row), range(seeds)):
                yield Cell(task, row, rate, seed)

    def config(self, cell: Cell) -> TrainConfig:
        """Return the configuration of a cell.

        Raises:
            UsageError: ``set`` names a field that there is not, or gives one a value that it cannot have.
        """
        usual = CONFIGS[cell.task][1]
        here = self.data_dir is not None and find_folder(usual.task, self.data_dir) is not None
        fields: dict[str, Any] = {
            **PROFILES[self.profile].shared,
            **PROFILES[self.profile].tasks[cell.task],
            "method": cell.row[1],
            "adapter": cell.row[2],
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            **({"data_dir": str(self.data_dir)} if here else {}),
            **typed_changes("--set", self.set, FIELD_TYPES),
            # where the head is all there is, it is what is tuned
            **({"head_learning_rate": cell.learning_rate} if cell.row[1] == "head" else {}),
        }
        return usual.changed(**fields)

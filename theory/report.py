"""The report: one page that carries its figures, the same as Markdown, and a file for programs.

Nothing is written half. Every finished claim goes to a hidden folder of its own inside the output folder, where an
interrupted run finds it again; the report itself is written under other names and moved into place when all is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ntk_prefix.artifacts import decode_json, held, json_text, provenance, read_json, write_whole
from ntk_prefix.checks import UsageError
from theory.claim import Claim
from theory.page import latex, markdown, webpage
from theory.problem import Problem
from theory.record import FORMATS, Finished, Record

UNFINISHED = ".unfinished"


def configuration(problem: Problem, claims: list[Claim]) -> dict[str, Any]:
    """Return what a run is: data, sizes, versions and sources. Two runs of the same configuration measure the same."""
    return {
        "claims": [claim.name for claim in claims],
        "data": problem.name,
        "data_sha256": problem.digest,
        "inputs": problem.n,
        "width": problem.d,
        "sigma": problem.sigma,
        "seed": problem.seed,
        "profile": problem.profile,
        **provenance("neural-tangents", sources=("ntk_prefix/**/*.py", "theory/**/*.py")),
    }


class Folder:
    """The output folder of one run, held by one process at a time."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        # absolute: what is written stays together wherever the process goes
        self.path, self.config = path.absolute(), config
        self.unfinished = self.path / UNFINISHED

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder; what another configuration left unfinished in it is dropped.

        Raises:
            UsageError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with held(self.path / ".lock", "--out"):
            if self._stored("configuration", dict) != self.config:
                shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished.mkdir(exist_ok=True)
            write_whole(self.unfinished / "configuration.json", json_text(self.config).encode())
            yield

    def finished(self, claim: Claim) -> Record | None:
        """Return the record of a claim that an interrupted run of this configuration had finished."""
        record = self._stored(claim.name, Record)
        if record is None or record["name"] != claim.name:
            return None
        figure = [self.unfinished / f"{claim.name}.{kind}" for kind in FORMATS]
        return record if record["undecided"] or all(file.is_file() for file in figure) else None

    def keep(self, claim: Claim, found: Finished) -> Record:
        """Store a finished claim, figure first: a record without its figure does not exist."""
        record = decode_json(found.record, Record, claim.name)
        for kind, file in found.figure.items():
            write_whole(self.unfinished / f"{claim.name}.{kind}", file)
        write_whole(self.unfinished / f"{claim.name}.json", found.record)
        return record

    def publish(self, claims: list[Claim], records: list[Record]) -> Path:
        """Move the whole report into place, the page last, and forget the unfinished run."""
        figures = self.path / "figures"
        figures.mkdir(exist_ok=True)
        drawn = [record["name"] for record in records if not record["undecided"]]
        for file in (f"{name}.{kind}" for name in drawn for kind in FORMATS):
            write_whole(figures / file, (self.unfinished / file).read_bytes())
        pictures = {name: (figures / f"{name}.png").read_bytes() for name in drawn}
        write_whole(self.path / "claims.json", json_text(records).encode())
        write_whole(self.path / "configuration.json", json_text(self.config).encode())
        write_whole(self.path / "report.md", markdown(claims, records, self.config).encode())
        write_whole(self.path / "claims.tex", latex(claims, records).encode())
        page = self.path / "index.html"
        write_whole(page, webpage(claims, records, self.config, pictures).encode())
        shutil.rmtree(self.unfinished)
        return page

    def _stored(self, name: str, kind: type[Any]) -> Any:
        """Return what an interrupted run has stored; what cannot be read was not."""
        try:
            return read_json(self.unfinished / f"{name}.json", kind)
        except UsageError:
            return None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run found, for the program that started it."""

    page: Path
    records: list[Record]

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(record["holds"] for record in self.records)

    @property
    def status(self) -> int:
        """Exit status: 0 if every claim holds, 1 if one does not, 2 if none fails and one is undecided."""
        if self.holds:
            return 0
        return 1 if any(not record["holds"] and not record["undecided"] for record in self.records) else 2

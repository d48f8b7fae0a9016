"""Claims measured side by side, a process for each: most of a claim is compilation and arithmetic of one thread.

Only what stands in the report comes back, and only the process that holds the output folder writes there. A process ends
with the one that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_prefix.checks import expected
from theory.claim import Claim, examine
from theory.claims import claims
from theory.problem import Problem
from theory.record import Finished, finish

LONGEST = ("depth", "limit", "convergence", "certificate", "dynamics", "lazy", "approximation", "real_layer")
"""What is begun first, so that no process is still at a long claim when the others have nothing left."""


FIXED, GROWING = 7.0, 1.0
"""CPU seconds of a claim that is in neither table, on the processor that they were measured on."""

SECONDS = {
    "convergence": (19.0, 3.0),
    "depth": (25.0, 10.0),
    "limit": (15.0, 14.0),
    "certificate": (13.0, 8.0),
    "lazy": (14.0, 4.0),
    "dynamics": (14.0, 5.0),
    "approximation": (13.0, 0.0),
    "memorisation": (19.0, 0.0),
    "positivity": (2.5, 0.3),
    "gradients": (5.0, 1.0),
}
"""By claim: CPU seconds of the quick profile that do not depend on the data, and those at n d = 128, which grow as (n d)^2,
as kernels do. Measured at 128, of ``convergence`` also at 384; of the others the share of the products is counted."""

LONG = 600.0
"""Seconds after which fewer rows of a file are proposed."""

FULL = 12
"""How much longer the full profile takes, at least."""


def estimate(problem: Problem, chosen: list[Claim], jobs: int) -> str:
    """Return in a line how long the claims may take, to the factor of two or three by which processors differ.

    Beside a user's file it says too which claims do not take its rows.
    """
    size = (problem.n * problem.d / 128) ** 2
    each = [
        fixed + growing * (1 if claim.draws(problem) else size)
        for claim in chosen
        for fixed, growing in [SECONDS.get(claim.name, (FIXED, GROWING))]
    ]
    seconds = max(sum(each) / min(jobs, len(each)), *each) * (FULL if problem.full else 1)
    long = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    count = f"{len(chosen)} claims, {jobs} at once" if len(chosen) > 1 else "one claim"
    line = f"n = {problem.n}, d = {problem.d}: about {long} for {count}"
    apart = [claim.name for claim in chosen if claim.draws(problem)] if problem.source == "file" else []
    if seconds >= LONG and len(apart) < len(chosen) and problem.source == "file":
        line += "; --inputs takes fewer rows"
    return line + (f"\nnot on the rows of --data, but on inputs of their own: {', '.join(apart)}" if apart else "")


def measure(
    chosen: list[Claim], problem: Problem, jobs: int, begun: Callable[[list[Claim]], None] = lambda running: None
) -> Generator[tuple[Claim, Finished]]:
    """Yield every claim with what was found, as they end.

    Args:
        chosen: the claims; with one of them, or one job, in this process and in their order.
        problem: what they are measured on.
        jobs: how many at once, at least 1.
        begun: is told of those that are being measured whenever that changes.
    """
    if min(jobs, len(chosen)) <= 1:
        for claim in chosen:
            begun([claim])
            yield claim, finish(examine(claim, problem))
        return
    order = {name: place for place, name in enumerate(LONGEST)}
    left = sorted(chosen, key=lambda claim: (claim.timed, order.get(claim.name, len(order))))
    running: dict[Future[Finished], Claim] = {}
    with _processes(min(jobs, len(chosen)), problem) as pool:
        while left or running:
            # no more are handed out than are measured, and what measures seconds is alone
            while left and len(running) < jobs and not (running and left[0].timed):
                claim = left.pop(0)
                running[pool.submit(_measured, claim.name)] = claim
            begun(list(running.values()))
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                claim = running.pop(done)
                try:
                    yield claim, done.result()
                except BrokenProcessPool:
                    raise expected(
                        "--jobs",
                        f"memory for {jobs} claims at once",
                        f"a process that was ended at {claim.name} or beside it",
                        "--jobs 1 takes the least",
                    ) from None


@contextlib.contextmanager
def _processes(count: int, problem: Problem) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose processes are gone after it, also in the middle of a claim."""
    # JAX has threads, which a fork does not survive; its arrays come out of a pickle in the precision of the day
    plain = {name: np.asarray(x) if isinstance(x, jax.Array) else x for name, x in vars(problem).items()}
    started = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, started, initializer=_begin, initargs=(plain,))
    try:
        yield pool
    finally:
        children = list(pool._processes.values())
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.terminate()
        for child in children:
            child.join()


_problem: Problem | None = None


def _begin(plain: dict[str, Any]) -> None:
    global _problem
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the process that was started at the terminal
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with jax.enable_x64(True):
        fields: dict[str, Any] = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in plain.items()}
        _problem = Problem(**fields)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _measured(name: str) -> Finished:
    (claim,) = claims((name,))
    assert _problem is not None
    return finish(examine(claim, _problem))

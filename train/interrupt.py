"""SIGTERM and SIGINT as a wish to stop: what runs is saved, and the same command goes on."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupted", "Signals"]

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop; everything is saved, and the same command goes on."""


class Signals:
    """Turns SIGTERM and SIGINT into a wish to stop after the step that is running, or at once when all is saved."""

    def __init__(self) -> None:
        self.received = self.saved = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        try:
            self._before = {kind: signal.signal(kind, self._hear) for kind in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: whoever runs us there has the signals
            logger.info("signals are left to the main thread")
        return self

    def __exit__(self, *_: object) -> None:
        for kind, before in self._before.items():
            signal.signal(kind, before)

    def _hear(self, kind: int, frame: FrameType | None) -> None:
        if self.saved:
            raise Interrupted("stopped between the last step and the result; the same command goes on")
        if self.received:  # asked twice: at once
            raise KeyboardInterrupt
        self.received = True

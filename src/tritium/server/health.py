"""What is known of an engine process, and whether that is health: progress, not existence."""

import time
from collections.abc import Callable
from typing import Any, Literal

from tritium.wire import Report

EngineState = Literal["running", "restarting", "stopped"]


class EngineHealth:
    """Fed by `EngineClient` with every report.

    state: "running" from the moment an engine is loaded until its process ends. last_report: when it last said
    anything. stats: the newest report's counts. num_restarts: processes that took an ended one's place.
    """

    def __init__(self, stall_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_seconds = stall_seconds
        self._clock = clock
        self.state: EngineState = "restarting"
        self.stats: dict[str, int] = {}
        self.num_batches = 0
        self.num_restarts = -1  # the first start is none
        self.last_report = self._last_progress = clock()
        self.last_error: str | None = None

    def note_start(self) -> None:
        """A process has loaded its engine."""
        self.state = "running"
        self.stats, self.num_batches = {}, 0
        self.num_restarts += 1
        self.last_error = None
        self.last_report = self._last_progress = self._clock()

    def note_end(self) -> None:
        """The process has ended."""
        self.state = "restarting"

    def note_report(self, report: Report) -> None:
        """The engine said something. It is progress if it computed something since, or has nothing to compute."""
        self.last_report = self._clock()
        is_idle = not report.stats["num_running"] and not report.stats["num_waiting"]
        if is_idle or report.num_batches != self.num_batches:
            self._last_progress = self.last_report
        self.stats, self.num_batches = report.stats, report.num_batches

    @property
    def seconds_without_progress(self) -> float:
        """Since the engine last computed something, or last said that it has nothing to do."""
        return self._clock() - self._last_progress

    @property
    def status(self) -> Literal["ok", "stalled", "restarting", "stopped"]:
        """ "ok" means: requests are being computed, or would be."""
        if self.state != "running":
            return self.state
        return "ok" if self.seconds_without_progress < self._stall_seconds else "stalled"

    def describe(self) -> dict[str, Any]:
        """For `/health`."""
        return {
            "status": self.status,
            "seconds_without_progress": round(self.seconds_without_progress, 3),
            "num_batches": self.num_batches,
            "num_restarts": self.num_restarts,
            **self.stats,
            **({"last_error": self.last_error} if self.last_error else {}),
        }

"""The loop's part of a weight update: stage between steps, then exchange at a step boundary, all or nothing.

    staging     a piece of the new weights is bound before each step; requests go on with the old ones
    draining    only with on_inflight="finish_first": what has run before ends first, nothing new starts
    exchange    the executor takes the new weights; the prefix cache is emptied and its keys take the new generation

on_inflight says what happens to requests that are running at the exchange: "recompute" computes their prompt and the
outputs they have again and goes on from there; "continue" goes on from keys and values of the old weights.
"""

import logging
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from tritium.errors import ConfigError, EngineError, OutOfMemory
from tritium.runtime.scheduler import Scheduler

logger = logging.getLogger("tritium")

OnInflight = Literal["recompute", "finish_first", "continue"]


class Staged(Protocol):
    """Weights being bound."""

    def advance(self) -> bool:
        """Do a piece of the work; False when nothing is left to do."""
        ...


class UpdatableExecutor(Protocol):
    """What an update needs of an executor."""

    def stage(self, source: Any) -> Staged:
        """Begin to bind new weights beside the old ones."""
        ...

    def swap(self, staged: Any) -> None:
        """Run with them from now on."""
        ...


@dataclass(eq=False)
class WeightUpdate:
    """source: the new weights by their names in the plan. done: gets the new generation, or what went wrong. path: a
    checkpoint that they are made of, for ranks in other processes; None: it is in this one alone."""

    source: Any
    on_inflight: OnInflight = "recompute"
    done: "Future[int]" = field(default_factory=Future)
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.on_inflight not in get_args(OnInflight):
            raise ConfigError(f"on_inflight must be one of {', '.join(get_args(OnInflight))}, not {self.on_inflight!r}")


class WeightUpdates:
    """Updates in order, one at a time. On the engine thread only."""

    def __init__(self, scheduler: Scheduler, executor: UpdatableExecutor) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._waiting: deque[WeightUpdate] = deque()
        self._staged: Staged | None = None
        self._is_staged = False

    @property
    def has_work(self) -> bool:
        """True while an update is not done."""
        return bool(self._waiting)

    def add(self, update: WeightUpdate) -> None:
        """Put it in line."""
        self._waiting.append(update)

    def advance(self) -> bool:
        """Do a piece of the first update, between two steps; True when there was something to do.

        What goes wrong ends that update, changes nothing else and does not raise.
        """
        if not self._waiting:
            return False
        update = self._waiting[0]
        try:
            return self._advance(update)
        except Exception as error:  # the loop and its requests outlive it; the caller is told
            logger.warning("new weights were refused, the old ones stay: %s", error, exc_info=True)
            self._end()
            update.done.set_exception(_out_of_memory(error) or error)
            return True

    def close(self) -> None:
        """End every update with an error: the loop ends."""
        while self._waiting:
            update = self._waiting[0]
            self._end()
            update.done.set_exception(EngineError("the engine was closed before the new weights were in use"))

    def _advance(self, update: WeightUpdate) -> bool:
        if self._staged is None:
            self._staged = self._executor.stage(update.source)
        if not self._is_staged:
            self._is_staged = not self._staged.advance()
            return True
        if update.on_inflight == "finish_first" and self._scheduler.has_started:
            self._scheduler.is_holding = True
            return False
        self._executor.swap(self._staged)
        self._end()
        if update.on_inflight == "recompute":
            self._scheduler.preempt_all()
        generation = self._scheduler.weights_generation + 1
        self._scheduler.begin_generation(generation)
        logger.info("new weights are in use: generation %d", generation)
        update.done.set_result(generation)
        return True

    def _end(self) -> None:
        self._waiting.popleft()
        self._staged, self._is_staged = None, False
        self._scheduler.is_holding = False


def _out_of_memory(error: Exception) -> OutOfMemory | None:
    """torch says a failed allocation with a RuntimeError."""
    if isinstance(error, RuntimeError) and "memory" in str(error):
        return OutOfMemory(f"new weights do not fit beside the old ones: {str(error).splitlines()[0]}")
    return None

"""Times the stages of a build and reports them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]


class StageClock:
    """Seconds by stage; tells `progress` of each."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell the caller how far a stage is."""
        if self._progress is not None:
            self._progress(stage, done, total)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside; report its start and its end."""
        self.report(name, 0, 1)
        start = time.perf_counter()
        yield
        self.record(name, start)
        self.report(name, 1, 1)

    def record(self, name: str, start: float) -> None:
        """Note the seconds since `start`."""
        self.seconds[name] = round(time.perf_counter() - start, 3)

"""A progress bar over requests, on standard error, for people who watch a terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


class RequestProgress:
    """Counts finished requests and their tokens; shows nothing without a bar."""

    def __init__(self, total: int, bar: Any, what: str) -> None:
        self._bar = bar
        self._task = bar.add_task(what, total=total, rate="") if bar is not None else None
        self._start = time.perf_counter()
        self._num_tokens = 0

    def finish_one(self, num_tokens: int) -> None:
        """A request is finished and had so many output tokens."""
        self._num_tokens += num_tokens
        if self._bar is not None and self._task is not None:
            rate = self._num_tokens / (time.perf_counter() - self._start)
            self._bar.update(self._task, advance=1, rate=f"{rate:,.0f} tokens/s")


@contextmanager
def progress_bar(total: int, use_progress: bool | None, what: str = "generating") -> Iterator[RequestProgress]:
    """A bar over `total` requests. use_progress None: when standard error is a terminal. what: the word before it."""
    if not (sys.stderr.isatty() if use_progress is None else use_progress):
        yield RequestProgress(total, None, what)
        return
    rich, console = (
        import_module("rich.progress"),
        import_module("rich.console").Console(stderr=True),
    )  # for a bar alone
    columns = ("{task.description}", rich.BarColumn(), rich.MofNCompleteColumn(), "{task.fields[rate]}")
    with rich.Progress(*columns, rich.TimeRemainingColumn(), console=console) as bar:
        yield RequestProgress(total, bar, what)

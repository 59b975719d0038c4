"""Carries outputs from the engine thread to an asyncio event loop, one wake-up a burst instead of one a token."""

import asyncio
import threading
from collections import deque

from tritium.runtime.outputs import StepOutput
from tritium.runtime.stream import ListenerGone


class AsyncMailbox:
    """Puts outputs into queues of one event loop. `post` may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._posted: deque[tuple[asyncio.Queue[StepOutput], StepOutput]] = deque()
        self._is_awake = False

    def post(self, queue: "asyncio.Queue[StepOutput]", output: StepOutput) -> None:
        """Put `output` into `queue`, soon. Raises `ListenerGone` when the event loop is closed."""
        with self._lock:
            self._posted.append((queue, output))
            is_awake, self._is_awake = self._is_awake, True
        if is_awake:
            return
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError as error:
            self._is_awake = False  # so that whoever posts next hears of it too
            raise ListenerGone(str(error)) from error

    def _deliver(self) -> None:
        with self._lock:
            self._is_awake = False
            posted = list(self._posted)
            self._posted.clear()
        for queue, output in posted:
            queue.put_nowait(output)

"""The engine thread: every torch op and kernel of an engine runs on it; other threads talk to it through one inbox.

Each OS thread that enters an OpenMP region gets a pool of its own, so the loop is also *made* on this thread.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from tritium.errors import EngineError, TritiumError
from tritium.runtime.loop import Loop
from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import Request
from tritium.runtime.stream import Listener
from tritium.runtime.weight_updates import WeightUpdate

logger = logging.getLogger("tritium")

_CLOSE_SECONDS = 3.0  # that `close` waits for a step before it is told to wait for no other process
_IDLE_WAIT = 0.001  # seconds, when requests wait and none of them can run


class EngineThread:
    """Runs a `Loop`. `submit`, `abort` and `close` may be called from any thread."""

    def __init__(self, make_loop: Callable[[], Loop], name: str = "tritium-engine") -> None:
        """Start the thread, make the loop on it and wait until that is done; what it raises is raised here."""
        self._inbox: deque[Callable[[Loop], None]] = deque()
        self._wake = threading.Condition()
        self._is_closing = False
        started: Future[Loop] = Future()
        self._thread = threading.Thread(target=self._run, args=(make_loop, started), name=name, daemon=True)
        self._thread.start()
        self._loop = started.result()

    def submit(self, request: Request, listener: Listener, *, is_streaming: bool = False) -> None:
        """Hand over a request; `listener` runs on the engine thread. A refused one gets one output with a `refusal`.

        Raises `EngineError` when the engine is closed.
        """

        def take(loop: Loop) -> None:
            try:
                loop.submit(request, listener, is_streaming=is_streaming)
            except TritiumError as error:
                listener(StepOutput(request.request_id, "", (), finish_reason="error", error=str(error), refusal=error))

        self._post(take)

    def abort(self, request_id: str) -> None:
        """End a request with finish_reason "abort", soon; ignored when it is unknown or finished, or all is closed."""
        with suppress(EngineError):
            self._post(lambda loop: loop.abort(request_id))

    def update_weights(self, update: WeightUpdate) -> int:
        """Wait until the new weights are in use; returns their generation, or raises why the old ones stay."""

        def take(loop: Loop) -> None:
            try:
                loop.update_weights(update)
            except TritiumError as error:
                update.done.set_exception(error)

        self._post(take)
        return update.done.result()

    def close(self) -> None:
        """End every request with "abort" and the thread with them. May be called again."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._loop.let_go()
            self._thread.join()

    @property
    def running_loop(self) -> Loop:
        """The loop; from other threads only to read counts."""
        return self._loop

    @property
    def is_alive(self) -> bool:
        """True until the thread has ended."""
        return self._thread.is_alive()

    def _post(self, message: Callable[[Loop], None]) -> None:
        with self._wake:
            if self._is_closing:
                raise EngineError("this engine is closed")
            self._inbox.append(message)
            self._wake.notify()

    def _run(self, make_loop: Callable[[], Loop], started: "Future[Loop]") -> None:
        try:
            loop = make_loop()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for us
            started.set_exception(error)
            return
        started.set_result(loop)
        try:
            while self._take_messages(loop):
                try:
                    if not loop.step():
                        self._rest(loop)
                except Exception as error:  # the loop outlives whatever one step does
                    logger.exception("the scheduler failed; every request ends with an error")
                    loop.fail_all(error)
        finally:
            self._is_closing = True
            self._take_messages(loop)
            loop.close()

    def _take_messages(self, loop: Loop) -> bool:
        """Wait for work, run what others posted; False when it is time to end."""
        with self._wake:
            while not (self._inbox or self._is_closing or loop.has_work):
                self._wake.wait()
            messages = list(self._inbox)
            self._inbox.clear()
        for message in messages:
            try:
                message(loop)
            except Exception:  # one message, or its listener, must not end the loop
                logger.exception("a message to the engine thread failed")
        return not self._is_closing

    def _rest(self, loop: Loop) -> None:
        """Nothing was sent in this step. That is usual in prefill; when nothing could run, do not spin."""
        if loop.is_stalled:
            with self._wake:
                self._wake.wait(_IDLE_WAIT)

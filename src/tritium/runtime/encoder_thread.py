"""The thread of an encoder: its torch ops and kernels run here. Requests that come meanwhile join the next batch."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch

from tritium.errors import EngineError
from tritium.runtime.encoder_pipeline import EncoderPipeline
from tritium.runtime.encoder_queue import EncoderQueue
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.encoder_runner import EncoderRunner

if TYPE_CHECKING:
    from tritium.runtime.gpu.encoder_runner import GpuEncoderRunner

Answer = Future[torch.Tensor]
MakeRunner = Callable[[], "EncoderRunner | GpuEncoderRunner"]


class EncoderThread:
    """`submit` and `close` may be called from any thread. `runner`: its limits may be read from any thread."""

    runner: "EncoderRunner | GpuEncoderRunner"

    def __init__(self, make_runner: MakeRunner, name: str = "tritium-encoder") -> None:
        """Start the thread and make the runner on it; what that raises is raised here."""
        self._wake = threading.Condition()
        self._is_closing = False
        started: Future[EncoderRunner | GpuEncoderRunner] = Future()
        self._thread = threading.Thread(target=self._run, args=(make_runner, started), name=name, daemon=True)
        self._thread.start()
        self.runner = started.result()

    def submit(self, requests: Sequence[EncoderRequest]) -> list[Answer]:
        """Hand over the requests of one call; each answer comes, or its error, as it is computed.

        Raises `RequestError` for the first that is invalid, then none is taken; `EngineError` when all is closed.
        """
        runner = self.runner
        for request in requests:
            request.check(
                max_model_len=runner.max_model_len,
                vocab_size=runner.vocab_size,
                num_token_types=runner.info.num_token_types,
            )
        answers: list[Answer] = [Future() for _ in requests]
        with self._wake:
            if self._is_closing:
                raise EngineError("this engine is closed")
            self._queue.add(list(zip(requests, answers, strict=True)))
            self._wake.notify()
        return answers

    def close(self) -> None:
        """End the thread and free its memory; what waits ends with an `EngineError`. May be called again."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self, make_runner: MakeRunner, started: "Future[EncoderRunner | GpuEncoderRunner]") -> None:
        try:
            runner = make_runner()
            self._queue: EncoderQueue[Answer] = EncoderQueue(runner.max_tokens, runner.max_requests)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for us
            started.set_exception(error)
            return
        started.set_result(runner)
        pipeline: EncoderPipeline[Answer] = EncoderPipeline(runner)
        while (batch := self._next_batch(may_wait=not pipeline)) or pipeline:
            wanted = [(request, answer) for request, answer in batch if answer.set_running_or_notify_cancel()]
            for answer, found in pipeline.step(wanted):
                if isinstance(found, Exception):
                    answer.set_exception(found)
                else:
                    answer.set_result(found)
        while left := self._queue.next_batch():
            for _, answer in left:
                answer.set_exception(EngineError("this engine was closed before the request was computed"))
        runner.close()

    def _next_batch(self, *, may_wait: bool) -> list[tuple[EncoderRequest, Answer]]:
        """Wait for work, if we may; empty when there is none, or when it is time to end."""
        with self._wake:
            while may_wait and not (self._queue or self._is_closing):
                self._wake.wait()
            return [] if self._is_closing else self._queue.next_batch()

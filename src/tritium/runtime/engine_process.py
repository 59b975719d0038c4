"""An engine in a process of its own, for a server: one thread that takes commands, steps, and reports.

    python -m tritium.runtime.engine_process FD

FD: one end of a Unix socket pair, the only way in and out (`tritium.wire`). The process ends when the other end closes,
however that happened. Between two steps it takes every command that has arrived; each step is answered by one report.
"""

import contextlib
import dataclasses
import logging
import select
import signal
import socket
import sys

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.errors import EngineError, RequestError, TritiumError
from tritium.runtime.assemble import load_tokenizer, make_loop
from tritium.runtime.engine_loop import EngineLoop
from tritium.runtime.make_request import RequestMaker
from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import SampledToken
from tritium.sampling_params import SamplingParams
from tritium.wire import (
    Abort,
    Commands,
    Failed,
    FrameBuffer,
    Output,
    Ready,
    Report,
    Start,
    Submit,
    TokenLogprob,
    decode_for_engine,
    frame,
)

logger = logging.getLogger("tritium")

_STALLED_WAIT = 0.001  # seconds between two tries when requests wait and none of them can run
_READ_SIZE = 1 << 18


class EngineProcess:
    """Serves one engine over a connected socket until the other end closes it."""

    def __init__(self, connection: socket.socket, loop: EngineLoop, maker: RequestMaker) -> None:
        self._connection = connection
        self._buffer = FrameBuffer()
        self._loop = loop
        self._maker = maker
        self._outputs: list[StepOutput] = []
        self._num_batches = 0

    def run(self) -> None:
        """Returns when the other end is closed. An unreadable message is an `EngineError`: all is over."""
        with contextlib.suppress(ConnectionError):  # closed with messages unread: the same end
            self._serve()

    def _serve(self) -> None:
        while (commands := self._take()) is not None:
            for command in commands:
                self._apply(command)
            has_stepped = self._loop.has_work and self._step()
            if commands or has_stepped or self._outputs:
                self._report()

    def _take(self) -> list[Submit | Abort | None] | None:
        """Commands that have arrived; waits for some when there is no work. None: the other end is closed.

        An empty `Commands` gives one None: nothing to do but report.
        """
        timeout = None if not self._loop.has_work else _STALLED_WAIT if self._loop.is_stalled else 0
        commands: list[Submit | Abort | None] = []
        while select.select([self._connection], [], [], timeout)[0]:
            data = self._connection.recv(_READ_SIZE)
            if not data:
                return None
            for body in self._buffer.feed(data):
                message = decode_for_engine(body)
                if not isinstance(message, Commands):
                    raise EngineError("the server started the engine a second time")
                commands += message.commands or [None]
            timeout = 0 if commands else timeout
        return commands

    def _apply(self, command: Submit | Abort | None) -> None:
        if isinstance(command, Abort):
            self._loop.abort(command.request_id)
        elif isinstance(command, Submit):
            try:
                request = self._maker.make(
                    command.request_id,
                    command.token_ids,
                    SamplingParams(**command.params),
                    priority=command.priority,
                    cache_salt=command.cache_salt,
                )
                self._loop.submit(request, self._outputs.append, is_streaming=command.is_streaming)
            except RequestError as error:
                self._outputs.append(StepOutput(command.request_id, "", (), finish_reason="error", refusal=error))

    def _step(self) -> bool:
        """True unless nothing could run."""
        try:
            self._loop.step()
            self._num_batches += not self._loop.is_stalled
        except Exception as error:  # the process outlives whatever one step does
            logger.exception("the scheduler failed; every request ends with an error")
            self._loop.fail_all(error)
        return not self._loop.is_stalled

    def _report(self) -> None:
        outputs = [_wire_output(output) for output in self._outputs]
        self._outputs.clear()
        report = Report(outputs, self._loop.scheduler.stats._asdict(), self._num_batches)
        self._connection.sendall(frame(report))


def _wire_output(output: StepOutput) -> Output:
    timings = output.timings
    return Output(
        request_id=output.request_id,
        text=output.text,
        token_ids=list(output.token_ids),
        logprobs=[_wire_logprob(token) for token in output.logprobs],
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        error=str(output.refusal) if output.refusal is not None else output.error,
        refusal=type(output.refusal).__name__ if output.refusal is not None else None,
        num_cached_tokens=output.num_cached_tokens,
        arrival=timings.arrival if timings else None,
        first_token=timings.first_token if timings else None,
        finished=timings.finished if timings else None,
        sample_index=output.sample_index,
    )


def _wire_logprob(token: SampledToken) -> TokenLogprob:
    return TokenLogprob(token.token_id, token.logprob, list(token.top_logprobs))


def _receive_start(connection: socket.socket) -> Start:
    """The first message; whatever else comes first is an `EngineError`."""
    buffer = FrameBuffer()
    while data := connection.recv(_READ_SIZE):
        bodies = buffer.feed(data)
        if bodies and isinstance(start := decode_for_engine(bodies[0]), Start):
            return start
        if bodies:
            break
    raise EngineError("the server did not say which engine to start")


def serve(connection: socket.socket) -> None:
    """Load the engine that the first message names, say how that went, serve it."""
    start = _receive_start(connection)
    try:
        engine = Engine.load(start.engine)
        if engine.manifest.kind != "decoder":
            raise EngineError(
                f"{engine.path} is of kind {engine.manifest.kind!r} and generates no text: serve a language model"
            )
        tokenizer = load_tokenizer(engine)
        loop = make_loop(engine, RuntimeConfig(**start.runtime), tokenizer)
    except TritiumError as error:
        connection.sendall(frame(Failed(type(error).__name__, str(error))))
        return
    connection.sendall(frame(Ready(dataclasses.asdict(loop.scheduler.config))))
    maker = RequestMaker(tokenizer, engine.manifest.eos_token_ids, engine.path)
    EngineProcess(connection, loop, maker).run()


def main() -> None:
    """The process. Ctrl-C at a terminal reaches it too: the server decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="tritium engine: %(message)s", stream=sys.stderr)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            serve(connection)
        except (BrokenPipeError, ConnectionResetError):  # the server is gone
            sys.exit(0)


if __name__ == "__main__":
    main()

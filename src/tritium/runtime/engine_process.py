"""An engine in a process of its own, for a server: one thread that takes commands, steps, and reports.

    python -m tritium.runtime.engine_process FD

FD: one end of a Unix socket pair, the only way in and out (`tritium.wire`). The process ends when the other end closes,
however that happened. Between two steps it takes every command that has arrived; each step is answered by one report.
"""

import contextlib
import logging
import select
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.errors import EngineError, TritiumError
from tritium.runtime.decoder_worker import DecoderWorker
from tritium.runtime.encoder_worker import EncoderWorker
from tritium.wire import (
    MAX_FRAME,
    Abort,
    Command,
    Commands,
    Failed,
    FrameBuffer,
    Output,
    Ready,
    Report,
    Start,
    decode_for_engine,
    frame,
    frames,
)

_STALLED_WAIT = 0.001  # seconds between two tries when requests wait and none of them can run
_READ_SIZE = 1 << 18


class Worker(Protocol):
    """What the process works at: `DecoderWorker` or `EncoderWorker`."""

    @property
    def has_work(self) -> bool: ...

    @property
    def is_stalled(self) -> bool: ...

    @property
    def limits(self) -> dict[str, Any]: ...

    @property
    def stats(self) -> dict[str, int]: ...

    def apply(self, command: Command) -> None:
        """Take a command. Raises nothing that a command can cause."""

    def step(self) -> bool:
        """Compute one batch; False when nothing could run. Raises nothing that a batch can cause."""
        ...

    def take_outputs(self) -> list[Output]:
        """What there is since the last call."""
        ...


class EngineProcess:
    """Serves one engine over a connected socket until the other end closes it."""

    def __init__(self, connection: socket.socket, worker: Worker) -> None:
        self._connection = connection
        self._buffer = FrameBuffer()
        self._worker = worker
        self._num_batches = 0

    def run(self) -> None:
        """Returns when the other end is closed. An unreadable message is an `EngineError`: all is over."""
        with contextlib.suppress(ConnectionError):  # closed with messages unread: the same end
            self._serve()

    def _serve(self) -> None:
        while (commands := self._take()) is not None:
            for command in commands:
                if command is not None:
                    self._worker.apply(command)
            has_stepped = self._worker.has_work and self._worker.step()
            self._num_batches += has_stepped
            outputs = self._worker.take_outputs()
            if commands or has_stepped or outputs:
                self._report(outputs)

    def _report(self, outputs: Sequence[Output]) -> None:
        """Send them all; one that is too large for a message ends its request with an error, and no other."""
        failed: list[Output] = []

        def fail(output: Output, size: int) -> None:
            text = f"its answer takes {size} bytes, more than the {MAX_FRAME} of a message: ask for less at once"
            reason, index = "error", output.sample_index
            failed.append(Output(output.request_id, "", [], finish_reason=reason, error=text, sample_index=index))
            self._worker.apply(Abort(output.request_id))

        stats, num_batches = self._worker.stats, self._num_batches
        for data in frames(outputs, lambda some: Report(some, stats, num_batches), fail):
            self._connection.sendall(data)
        if failed:
            self._connection.sendall(frame(Report(failed, stats, num_batches)))

    def _take(self) -> list[Command | None] | None:
        """Commands that have arrived; waits for some when there is no work. None: the other end is closed.

        An empty `Commands` gives one None: nothing to do but report.
        """
        timeout = None if not self._worker.has_work else _STALLED_WAIT if self._worker.is_stalled else 0
        commands: list[Command | None] = []
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
        worker = load_worker(engine, RuntimeConfig(**start.runtime))
    except TritiumError as error:
        connection.sendall(frame(Failed(type(error).__name__, str(error))))
        return
    connection.sendall(frame(Ready(worker.limits)))
    EngineProcess(connection, worker).run()


def load_worker(engine: Engine, config: RuntimeConfig) -> Worker:
    """What an engine of this kind does in a server. Raises `EngineError` for a kind that does nothing there."""
    if engine.manifest.kind == "decoder":
        return DecoderWorker.load(engine, config)
    if engine.manifest.kind == "encoder":
        return EncoderWorker.load(engine, config)
    raise EngineError(
        f"{engine.path} is of kind {engine.manifest.kind!r}: the server serves language models and encoders"
    )


def main() -> None:
    """The process. Ctrl-C at a terminal reaches it too: the server decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="tritium engine: %(message)s", stream=sys.stderr)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            serve(connection)
        except (BrokenPipeError, ConnectionResetError):  # the server is gone
            sys.exit(0)
        except TritiumError as error:
            sys.exit(f"tritium engine: {error}")


if __name__ == "__main__":
    main()

"""A rank of a model that several processes share, but the first: it does, step by step, what the first one does.

    python -m tritium.runtime.ranks.process FD
    python -m tritium.runtime.ranks.process HOST:PORT RANK NUM_RANKS ENGINE

FD: one end of a Unix socket pair. The process ends when the other end closes, whatever it waits for. The second form
comes from another machine to the first rank's address, with an engine that lies on its own.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, NoReturn

import msgspec
import torch
from torch import distributed

from tritium.config import RuntimeConfig, host_and_port, rendezvous_secret
from tritium.engine.engine import Engine
from tritium.engine.refit import new_weights, open_source
from tritium.errors import EngineError, TritiumError
from tritium.kernels.communicator import Communicator
from tritium.runtime.assemble import load_tokenizer, make_loop
from tritium.runtime.engine_loop import error_text
from tritium.runtime.gloo import TIMEOUT
from tritium.runtime.ranks.alike import describe_model, whole_weights
from tritium.runtime.ranks.connect import connect
from tritium.runtime.ranks.executor import Tokens
from tritium.runtime.ranks.messages import (
    TO_RANK,
    Chosen,
    Connect,
    Drop,
    Loaded,
    Opened,
    Renew,
    StartRank,
    Take,
    Turn,
)
from tritium.runtime.ranks.nodes import come
from tritium.runtime.weight_updates import WeightUpdate
from tritium.wire import Failed, FrameBuffer, frame

STEPS_A_WORD = 32  # steps between two hashes of what was chosen, while there is work
_READ_SIZE = 1 << 18


class RankProcess:
    """Talks to the first rank. Also the `Watch` of this rank's executor."""

    def __init__(self, connection: socket.socket, engine: str = "") -> None:
        """engine: on this machine, in place of the first rank's word."""
        self._connection = connection
        self._engine = engine
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self._tokens = Tokens()
        threading.Thread(target=self._read, daemon=True).start()

    def run(self) -> NoReturn:
        """Open the engine that the first message names, then take turns; does not return."""
        start = self._messages.get()
        try:
            if not isinstance(start, StartRank):
                raise EngineError("the first rank did not say which engine to open")
            logging.basicConfig(level=logging.WARNING, format=f"tritium rank {start.rank}: %(message)s")
            self._serve(start)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the end of all ranks
            self._fail(error)

    def _serve(self, start: StartRank) -> NoReturn:
        engine = Engine.load(self._engine or start.engine, plugins=start.plugins)
        if engine.manifest.backend == "cuda":
            torch.cuda.set_device(start.local_rank)
        self._say(Loaded(describe_model(engine), whole_weights(engine)))
        place = self._messages.get()
        assert isinstance(place, Connect), place
        ranks = self._connect(engine, start, place)
        loop = make_loop(engine, RuntimeConfig(**start.runtime), load_tokenizer(engine), communicator=ranks, watch=self)
        self._say(Opened())
        while True:
            turn = self._messages.get()
            assert isinstance(turn, Turn), turn
            for command in turn.commands:
                if isinstance(command, Take):
                    loop.submit(command.request(), lambda output: None, is_streaming=command.is_streaming)
                elif isinstance(command, Drop):
                    loop.abort(command.request_id)
                else:
                    update = _update(engine, command)
                    update.done.add_done_callback(self._check_update)
                    loop.update_weights(update)
            if not turn.is_whole:
                continue
            loop.step()
            if not loop.has_work:
                self._say_chosen()

    def _check_update(self, done: "Future[int]") -> None:
        if (error := done.exception()) is not None:  # the other ranks have the new weights, or will
            self._fail(EngineError(f"it could not take new weights: {error_text(error)}"))

    def _connect(self, engine: Engine, start: StartRank, place: Connect) -> Communicator:
        if not place.port:
            return connect(engine, distributed.FileStore(place.store, start.num_ranks), start.rank, start.num_ranks)
        is_here = self._connection.family == socket.AF_UNIX  # where the first rank is
        address = place.store if is_here else self._connection.getsockname()[0]
        store = distributed.TCPStore(place.store, place.port, start.num_ranks, False, TIMEOUT)
        return connect(engine, store, start.rank, start.num_ranks, address=address)

    @contextmanager
    def working(self) -> Iterator[None]:
        """See `Watch`: whatever is raised ends this process."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - the loop would go on without the others
            self._fail(error)

    def chose(self, token_ids: Sequence[int]) -> None:
        """See `Watch`."""
        self._tokens.add(token_ids)
        if self._tokens.num_steps % STEPS_A_WORD == 0:
            self._say_chosen()

    def _say_chosen(self) -> None:
        self._say(Chosen(self._tokens.num_steps, self._tokens.digest))

    def _say(self, message: msgspec.Struct) -> None:
        try:
            self._connection.sendall(frame(message))
        except OSError:  # the first rank is gone
            os._exit(0)

    def _fail(self, error: BaseException) -> NoReturn:
        """Say why, and end: other threads may wait for a GPU that waits for ever."""
        kind = type(error).__name__ if isinstance(error, TritiumError) else EngineError.__name__
        text = str(error) if isinstance(error, TritiumError) else f"{type(error).__name__}: {error}"
        self._say(Failed(kind, text))
        os._exit(1)

    def _read(self) -> None:
        """On a thread of its own: the process ends with the first rank's, also in the middle of a step."""
        buffer = FrameBuffer()
        try:
            while data := self._connection.recv(_READ_SIZE):
                for body in buffer.feed(data):
                    self._messages.put(TO_RANK.decode(body))
        except ConnectionError:
            pass
        except (EngineError, msgspec.DecodeError) as error:
            self._fail(error)
        os._exit(0)


def _update(engine: Engine, command: Renew) -> WeightUpdate:
    """The first rank's, for this one's engine."""
    source = new_weights(engine.path, engine.manifest, engine.plan, open_source(command.path)[0])
    return WeightUpdate(source, command.on_inflight)


def main() -> None:
    """The process. Ctrl-C at a terminal reaches it too: the first rank decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if len(sys.argv) == 2:
        RankProcess(socket.socket(fileno=int(sys.argv[1]))).run()
    address, rank, num_ranks, engine = sys.argv[1:]
    try:
        connection = come(host_and_port(address), rendezvous_secret(), int(rank), int(num_ranks))
    except TritiumError as error:
        sys.exit(f"tritium rank {rank}: {error}")
    RankProcess(connection, engine).run()


if __name__ == "__main__":
    main()

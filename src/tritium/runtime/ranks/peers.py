"""The first rank's end of the other ranks: starts their processes, sends them its steps, and notices when one is lost.

A thread reads what they say. When one ends, fails, chooses another token, or no step ends for a long time, that is the
failure of all: the others are killed and `on_failure` lets go of whatever waits for them.
"""

import logging
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import msgspec

from tritium import errors
from tritium.errors import EngineError
from tritium.kernels.communicator import LostRanks
from tritium.runtime.ranks.executor import Tokens
from tritium.runtime.ranks.messages import FROM_RANK, Chosen, Loaded, Opened, StartRank
from tritium.wire import Failed, FrameBuffer, frame

logger = logging.getLogger("tritium")

START_SECONDS = 600.0  # in which the others load their parts
STEP_SECONDS = 300.0  # in which a step ends, a first one that compiles kernels too
END_SECONDS = 5.0  # that the others get to end by themselves
COMMAND = (sys.executable, "-P", "-m", "tritium.runtime.ranks.process")
_CAUSE_SECONDS = 3.0  # that a failed call waits for the thread to hear why
_OTHERS_SECONDS = 1.0  # that a rank which has lost others waits to be explained by one of them
_READ_SIZE = 1 << 16
T = TypeVar("T")
_KEPT_STEPS = 4096  # of whose tokens hashes are kept until the others have said theirs


class Peers:
    """The processes of ranks 1 and up. Also the `Watch` of the first rank's executor."""

    def __init__(
        self,
        starts: Sequence[StartRank],
        command: Sequence[str] = COMMAND,
        come: Mapping[int, socket.socket] | None = None,
    ) -> None:
        """Start a process for each, but for those that have come from other machines. command: what is run, with a file
        descriptor as its argument. come: connections by rank."""
        self.failure: EngineError | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._said: list[list[Loaded | Opened]] = [[] for _ in starts]
        self._tokens = Tokens()
        self._digests: dict[int, int] = {}  # by the number of steps
        self._lost: dict[int, tuple[float, EngineError]] = {}  # when, and by whom, it was said that others are gone
        self._early: dict[int, list[tuple[int, int]]] = {}  # hashes of steps that end here later: rank's index, digest
        self._busy_since: float | None = None
        self._is_closing = False
        self._num_ranks = len(starts) + 1
        self._sockets: list[socket.socket] = []
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # by index, those of this machine
        try:
            for index, start in enumerate(starts):
                is_there = come is not None and start.rank in come
                self._sockets.append(come[start.rank] if come and is_there else self._started(index, command))
        except OSError as error:
            for process in self._processes.values():
                process.kill()
                process.wait()
            raise EngineError(f"a rank's process cannot be started by {' '.join(command)!r}: {error}") from error
        self._thread = threading.Thread(target=self._listen, name="tritium-ranks", daemon=True)
        self._thread.start()  # before anything is said: it hears how one ends that does not even read
        for connection, start in zip(self._sockets, starts, strict=True):
            self._send_to(connection, frame(start))

    def _started(self, index: int, command: Sequence[str]) -> socket.socket:
        ours, its = socket.socketpair()
        with its:
            self._processes[index] = subprocess.Popen(
                [*command, str(its.fileno())], pass_fds=(its.fileno(),), stdin=subprocess.DEVNULL, stdout=2
            )
        return ours

    def wait(self, kind: type[Loaded | Opened]) -> list[Any]:
        """What each has said of this kind, by rank from 1 on. Raises why one never will."""
        with self._changed:
            is_said = self._changed.wait_for(
                lambda: self.failure or all(any(isinstance(m, kind) for m in said) for said in self._said),
                START_SECONDS,
            )
            if self.failure is not None:
                raise self.failure
            if not is_said:
                raise EngineError(f"a rank of {self._num_ranks} was not ready within {START_SECONDS:g} s: see its log")
            return [next(m for m in said if isinstance(m, kind)) for said in self._said]

    def send(self, message: msgspec.Struct) -> None:
        """To all of them; what goes wrong is a failure, also when one does not read for as long as a step may take."""
        self._busy_since = time.monotonic()
        try:
            data = frame(message)
            for connection in self._sockets:
                self._send_to(connection, data)
        finally:
            self._busy_since = None

    def unless_lost(self, call: Callable[[], T]) -> T:
        """What `call` returns, which waits for the others: on a thread that is left behind when one is lost first."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(call())
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for us
                done.set_exception(error)
            with self._changed:
                self._changed.notify_all()

        threading.Thread(target=run, name="tritium-connect", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or done.done())
        if self.failure is not None:
            raise self.failure
        return done.result()

    @contextmanager
    def working(self) -> Iterator[None]:
        """See `Watch`. Raises `failure` in place of what is raised inside, or of a result that cannot be trusted."""
        self._busy_since = time.monotonic()
        try:
            yield
        except Exception as error:
            with self._changed:
                self._changed.wait_for(lambda: self.failure is not None, _CAUSE_SECONDS)
            self.fail(EngineError(f"rank 0 of {self._num_ranks} failed: {type(error).__name__}: {error}"))
            assert self.failure is not None
            raise self.failure from error
        finally:
            self._busy_since = None
        if self.failure is not None:
            raise self.failure

    def chose(self, token_ids: Sequence[int]) -> None:
        """See `Watch`."""
        with self._changed:
            self._tokens.add(token_ids)
            num_steps, digest = self._tokens.num_steps, self._tokens.digest
            self._digests[num_steps] = digest
            self._digests.pop(num_steps - _KEPT_STEPS, None)
            early = self._early.pop(num_steps, [])
        for index, theirs in early:
            self._check_alike(index, num_steps, digest, theirs)

    def explain(self, error: Exception) -> Exception:
        """Why a call that needs the others failed: their reason, if there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None, _CAUSE_SECONDS)
        return self.failure or error

    def fail(self, error: EngineError) -> None:
        """End all, for this reason, unless there is one already."""
        with self._changed:
            if self.failure is not None or self._is_closing:
                return
            self.failure = error
            self._changed.notify_all()
        logger.error("%s; all ranks of this model end", error)
        for process in self._processes.values():
            process.kill()
        for connection in self._sockets:  # which ends those of other machines
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.on_failure()

    def close(self) -> None:
        """End the processes, at first politely. May be called again."""
        self._is_closing = True
        deadline = time.monotonic() + END_SECONDS
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._thread.join()
        for connection in self._sockets:
            connection.close()

    def _send_to(self, connection: socket.socket, data: bytes) -> None:
        try:
            connection.sendall(data)
        except OSError:  # the thread hears the reason, if it has one
            with self._changed:
                self._changed.wait_for(lambda: self.failure is not None, _CAUSE_SECONDS)
            self.fail(EngineError(f"a rank of {self._num_ranks} takes no more messages"))

    def _listen(self) -> None:
        """The thread. Whatever ends it is heard: without it nobody would notice a lost rank."""
        try:
            self._hear()
        except Exception as error:
            logger.exception("the thread that hears the other ranks failed")
            self.fail(
                EngineError(f"rank 0 of {self._num_ranks} cannot hear the others: {type(error).__name__}: {error}")
            )

    def _hear(self) -> None:
        buffers = [FrameBuffer() for _ in self._sockets]
        with selectors.DefaultSelector() as selector:
            for index, connection in enumerate(self._sockets):
                selector.register(connection, selectors.EVENT_READ, index)
            while not self._is_closing and self.failure is None:
                for key, _ in selector.select(timeout=0.1 if self._lost else 0.5):
                    if self._read(key.data, buffers[key.data]):
                        selector.unregister(key.fileobj)
                for said, error in self._lost.values():
                    if time.monotonic() - said > _OTHERS_SECONDS:
                        self.fail(error)
                since = self._busy_since
                if since is not None and time.monotonic() - since > STEP_SECONDS:
                    self.fail(EngineError(f"no step of {self._num_ranks} ranks ended within {STEP_SECONDS:g} s"))

    def _read(self, index: int, buffer: FrameBuffer) -> bool:
        """Take what a rank has said; True when it says no more."""
        try:
            data = self._sockets[index].recv(_READ_SIZE)
        except OSError:
            data = b""
        try:
            for body in buffer.feed(data):
                self._note(index, FROM_RANK.decode(body))
        except (EngineError, msgspec.DecodeError) as error:
            self.fail(EngineError(f"rank {index + 1} of {self._num_ranks} said what cannot be read: {error}"))
        if not data and not self._is_closing and index not in self._lost:
            self.fail(EngineError(f"rank {index + 1} of {self._num_ranks} {self._how_it_ended(index)}"))
        return not data

    def _note(self, index: int, message: Loaded | Opened | Chosen | Failed) -> None:
        if isinstance(message, Failed):
            kind = getattr(errors, message.kind, EngineError)
            error = kind(f"rank {index + 1} of {self._num_ranks}: {message.message}")
            if message.kind == LostRanks.__name__:  # the one that it has lost may still be heard
                self._lost[index] = (time.monotonic(), error)
            else:
                self.fail(error)
        elif isinstance(message, Chosen):
            self._compare(index, message)
        else:
            with self._changed:
                self._said[index].append(message)
                self._changed.notify_all()

    def _compare(self, index: int, chosen: Chosen) -> None:
        """Its tokens and ours, after as many steps: now, or when we have come as far."""
        with self._changed:
            ours = self._digests.get(chosen.num_steps)
            if chosen.num_steps > self._tokens.num_steps:
                self._early.setdefault(chosen.num_steps, []).append((index, chosen.digest))
        if ours is not None:
            self._check_alike(index, chosen.num_steps, ours, chosen.digest)

    def _check_alike(self, index: int, num_steps: int, ours: int, theirs: int) -> None:
        if ours != theirs:
            self.fail(
                EngineError(
                    f"rank {index + 1} of {self._num_ranks} chose other tokens than rank 0 by step {num_steps}: its GPU"
                    " or its weights differ; build the engine again, and use GPUs of one kind"
                )
            )

    def _how_it_ended(self, index: int) -> str:
        process = self._processes.get(index)
        if process is None:
            return "of another machine closed its connection"
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        code = process.returncode
        ended = "was ended by signal" if code is not None and code < 0 else "ended with exit code"
        return f"{ended} {abs(code) if code is not None else 'unknown'}"

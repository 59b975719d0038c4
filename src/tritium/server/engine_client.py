"""The server's end of an engine process: starts it, hands requests over, passes outputs on, starts it again if it dies.

All of it belongs to one event loop. Commands that come up while the loop turns once go out as one message.
"""

import asyncio
import dataclasses
import itertools
import logging
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tritium import errors
from tritium.config import RuntimeConfig
from tritium.errors import EngineError, EngineUnavailable, RequestTooLarge
from tritium.server.arrivals import Arrivals
from tritium.server.health import EngineHealth
from tritium.wire import (
    MAX_FRAME,
    Abort,
    Command,
    Commands,
    Encode,
    Failed,
    FrameBuffer,
    Output,
    Ready,
    Report,
    Start,
    Submit,
    Text,
    decode_for_server,
    frame,
    frames,
)

logger = logging.getLogger("tritium")

HEARTBEAT_SECONDS = 1.0
FIRST_RESTART_DELAY, LONGEST_RESTART_DELAY = 0.2, 30.0  # seconds; doubled by each start that fails
END_SECONDS = 5.0  # that an engine gets to end by itself
_READ_SIZE = 1 << 18
_MAX_UNSENT = 64 << 20  # bytes of commands that an engine may leave unread


@dataclasses.dataclass
class _Unfinished:
    """A request in the engine: where its outputs go, and how many answers are to come."""

    arrivals: Arrivals
    num_answers: int


class EngineClient:
    """One engine process, kept alive. Make one with `start`, end it with `close`."""

    def __init__(self, engine: Path, runtime: RuntimeConfig, health: EngineHealth) -> None:
        self.health = health
        self.limits: dict[str, Any] = {}
        self.pid = 0  # of the engine process
        self._start_message = Start(str(engine), dataclasses.asdict(runtime))
        self._ids = map("{:x}".format, itertools.count(1))
        self._unfinished: dict[str, _Unfinished] = {}  # by request id
        self._commands: list[Command] = []
        self._is_asked = False  # a report is on its way
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, engine: Path, runtime: RuntimeConfig, health: EngineHealth) -> "EngineClient":
        """Start the process and wait until the engine is loaded; what it could not load is raised here."""
        client = cls(engine, runtime, health)
        await client._launch()
        client._tasks = [asyncio.create_task(client._keep_alive()), asyncio.create_task(client._ask_regularly())]
        return client

    @property
    def num_unfinished(self) -> int:
        """Answers asked for and not finished."""
        return sum(one.num_answers for one in self._unfinished.values())

    def submit(
        self,
        arrivals: Arrivals,
        token_ids: list[int],
        params: dict[str, Any],
        *,
        num_answers: int,
        is_streaming: bool,
        priority: int = 0,
        cache_salt: str = "",
    ) -> str:
        """Hand a request over; returns its id. Its outputs arrive in the queue, each answer's last has a finish_reason.

        An `EngineUnavailable` arrives instead when the engine ends first, and is raised as by `check_available`. A
        request whose outputs are not taken out of the queue is aborted when it holds too many.
        """
        request_id = self._register(arrivals, num_answers)
        self._send(Submit(request_id, token_ids, params, is_streaming, priority, cache_salt))
        return request_id

    def encode(self, arrivals: Arrivals, texts: list[Text]) -> str:
        """Hand texts over to an encoder; as `submit`: each text is an answer with one output, its embedding."""
        request_id = self._register(arrivals, len(texts))
        self._send(Encode(request_id, texts))
        return request_id

    def check_available(self) -> None:
        """Raises `EngineUnavailable` while there is no engine, or it does not take what it is sent."""
        if self.health.state != "running":
            raise EngineUnavailable(f"the engine is {self.health.state}: try again in a moment")
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT:  # clients may leave and come again meanwhile
            raise EngineUnavailable("the engine has not read its requests for some time: try again in a moment")

    def abort(self, request_id: str) -> None:
        """End a request and forget it; nothing more of it arrives."""
        if self._unfinished.pop(request_id, None) is not None and self.health.state == "running":
            self._send(Abort(request_id))

    async def close(self) -> None:
        """End the process, at first politely; running requests end with an error."""
        self.health.state = "stopped"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end_process()
        self._fail_all("the server is shutting down")

    # -- one process ---------------------------------------------------------------------------------------------------

    async def _launch(self) -> None:
        """Start a process and wait for its word. Raises what it could not load."""
        ours, its = socket.socketpair()
        with its:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "tritium.runtime.engine_process", str(its.fileno())),
                pass_fds=(its.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # standard output is the server's own
            )
        self.pid = self._process.pid
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._buffer = FrameBuffer()
        self._commands.clear()
        self._is_asked = False
        self._writer.write(frame(self._start_message))
        try:
            first = await self._receive()
        except ConnectionError:
            first = []
        if not first:
            raise EngineUnavailable(f"the engine process {await self._how_it_ended()} while it loaded the engine")
        if isinstance(first[0], Failed):
            await self._end_process()
            raise getattr(errors, first[0].kind, EngineError)(first[0].message)
        assert isinstance(first[0], Ready)
        self.limits = first[0].limits
        self.health.note_start()

    async def _receive(self) -> list[Ready | Failed | Report]:
        """The next messages; none when the process has closed its end."""
        while data := await self._reader.read(_READ_SIZE):
            if bodies := self._buffer.feed(data):
                return [decode_for_server(body) for body in bodies]
        return []

    async def _pass_on(self) -> None:
        """Give outputs to those who wait for them, until the process ends."""
        with suppress(ConnectionError):
            while messages := await self._receive():
                for message in messages:
                    if not isinstance(message, Report):
                        raise EngineError("the engine process said twice how its start went")
                    self._is_asked = False
                    self.health.note_report(message)
                    for output in message.outputs:
                        self._deliver(output)

    def _deliver(self, output: Output) -> None:
        one = self._unfinished.get(output.request_id)
        if one is None:  # aborted
            return
        one.num_answers -= output.finish_reason is not None
        if output.refusal is not None or not one.num_answers:
            del self._unfinished[output.request_id]
        if not one.arrivals.put(output):
            self.abort(output.request_id)

    async def _how_it_ended(self) -> str:
        """End the process if it has not, and say how it ended."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), 1.0)
        await self._end_process()
        code = self._process.returncode
        return f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"

    async def _end_process(self) -> None:
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), END_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    # -- for ever ------------------------------------------------------------------------------------------------------

    async def _keep_alive(self) -> None:
        """Pass outputs on; when the process ends, tell everybody, start another."""
        while True:
            reason = ""
            try:
                await self._pass_on()
            except EngineError as error:
                reason = f" ({error})"
            self.health.note_end()
            message = f"the engine process {await self._how_it_ended()}{reason}"
            logger.error("%s; %d requests end with an error; it is started again", message, self.num_unfinished)
            self._fail_all(message)
            await self._restart()

    async def _restart(self) -> None:
        delay = FIRST_RESTART_DELAY
        while True:
            await asyncio.sleep(delay)
            try:
                return await self._launch()
            except (errors.TritiumError, OSError) as error:
                delay = min(2 * delay, LONGEST_RESTART_DELAY)
                self.health.last_error = str(error)
                logger.error("the engine could not be started again: %s; next try in %.1f s", error, delay)

    async def _ask_regularly(self) -> None:
        """Ask for a report when none came by itself: an idle engine shows that it is alive."""
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            is_quiet = time.monotonic() - self.health.last_report > HEARTBEAT_SECONDS / 2
            if self.health.state == "running" and is_quiet and not self._is_asked:
                self._is_asked = True
                self._writer.write(frame(Commands([])))

    def _fail_all(self, message: str) -> None:
        lost, self._unfinished = self._unfinished, {}
        for one in lost.values():
            one.arrivals.end(EngineUnavailable(message))

    def _register(self, arrivals: Arrivals, num_answers: int) -> str:
        self.check_available()
        request_id = next(self._ids)
        self._unfinished[request_id] = _Unfinished(arrivals, num_answers)
        return request_id

    def _send(self, command: Command) -> None:
        if not self._commands:
            asyncio.get_running_loop().call_soon(self._flush)
        self._commands.append(command)

    def _flush(self) -> None:
        """Write what came up since; nothing when the process has ended meanwhile (then all were told so)."""
        commands, self._commands = self._commands, []
        if commands and self.health.state == "running":
            for data in frames(commands, Commands, self._refuse_too_large):
                self._writer.write(data)

    def _refuse_too_large(self, command: Command, size: int) -> None:
        text = f"the request takes {size} bytes, more than the {MAX_FRAME} of a message to the engine: send less"
        self._deliver(
            Output(command.request_id, "", [], finish_reason="error", error=text, refusal=RequestTooLarge.__name__)
        )

"""Connections that do nothing are ended, and there is a limit to their number; what makes progress is left alone."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.server import ServerState

from tritium.server.http_protocol import MAX_HEAD_BYTES, GuardedProtocol, Patience, keep_looking

HEAD = b"GET /small HTTP/1.1\r\nHost: x\r\n"
IMPATIENT = Patience(head=0.3, keep_alive=1, read=0.3, look=0.05)


class Running:
    """A server with two pages, on a thread of its own."""

    def __init__(self, max_connections: int = 4) -> None:
        async def answer(request: Request) -> Response:
            return Response(b"x" * (64 << 20 if request.url.path == "/large" else 5))

        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        config = uvicorn.Config(
            Starlette(routes=[Route("/small", answer), Route("/large", answer)]),
            http=partial(GuardedProtocol, max_connections=max_connections),  # type: ignore[arg-type]
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_keep_alive=int(IMPATIENT.keep_alive),
            lifespan="off",
            log_config=None,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=asyncio.run, args=(self._run(),), daemon=True)
        self.thread.start()

    async def _run(self) -> None:
        looking = asyncio.create_task(keep_looking(self.server.server_state.connections, IMPATIENT))
        await self.server.serve(sockets=[self._listener])
        looking.cancel()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=60)

    def wait_until_idle(self) -> None:
        while self.server.server_state.connections:
            threading.Event().wait(0.02)


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.server.should_exit = True
    running.thread.join(60)
    assert not running.thread.is_alive()


def read_all(connection: socket.socket) -> bytes:
    """Until the server ends the connection, in whatever way."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            data += piece
    return data


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"\r\n" + HEAD])
def test_a_head_that_does_not_come_or_not_whole_ends_its_connection(running: Running, sent: bytes) -> None:
    with running.connect() as connection:
        connection.sendall(sent)
        assert read_all(connection).endswith(b"xxxxx" if sent.endswith(b"\r\n" + HEAD) else b"")
    running.wait_until_idle()


def test_a_head_that_comes_byte_by_byte_has_no_more_time(running: Running) -> None:
    with running.connect() as connection, pytest.raises(OSError):
        connection.sendall(HEAD)
        while True:
            connection.sendall(b"x")
            threading.Event().wait(0.02)


def test_a_head_that_is_too_long_is_a_400(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HEAD + b"x-long: " + b"x" * (2 * MAX_HEAD_BYTES))
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_requests_follow_each_other_on_a_connection_until_it_idles(running: Running) -> None:
    with running.connect() as connection:
        for _ in range(3):
            connection.sendall(HEAD + b"\r\n")
            answer = b""
            while not answer.endswith(b"xxxxx"):
                answer += connection.recv(1 << 16)
        assert read_all(connection) == b""
    running.wait_until_idle()


def test_an_answer_that_is_not_read_is_dropped_with_its_connection(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HEAD.replace(b"small", b"large") + b"\r\n")
        connection.recv(100)
        running.wait_until_idle()


def test_one_connection_too_many_is_told_so_and_the_next_one_after_another_ended_is_taken(running: Running) -> None:
    taken = [running.connect() for _ in range(4)]
    while len(running.server.server_state.connections) < 4:
        threading.Event().wait(0.02)
    other = http.client.HTTPConnection(*running.address, timeout=60)
    other.request("GET", "/small")
    response = other.getresponse()
    error = json.loads(response.read())["error"]
    assert (response.status, response.headers["retry-after"], error["code"]) == (503, "2", "too_many_connections")
    assert "has 4 connections and takes no more" in error["message"]
    for connection in taken:
        connection.close()
    running.wait_until_idle()
    other.close()
    other.request("GET", "/small")
    assert other.getresponse().status == 200
    other.close()


class FakeTransport:
    unsent = 0
    is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.is_aborted = True

    def get_extra_info(self, name: str) -> Any:
        return None


def test_a_reader_that_is_slow_but_reads_is_left_alone_and_one_that_stops_is_not() -> None:
    async def scenario() -> None:
        config = uvicorn.Config(Starlette())
        protocol = GuardedProtocol(config, ServerState(), {}, _loop=asyncio.get_running_loop())
        transport, patience = FakeTransport(), Patience(head=1e9, read=10)
        protocol.connection_made(transport)  # type: ignore[arg-type]
        for now in range(0, 100, 9):  # a little is read between two looks
            transport.unsent = 1000 - now
            protocol.look(now, patience)
        assert not transport.is_aborted
        transport.unsent = 0
        protocol.look(200, patience)  # nothing waits: idle, not slow
        transport.unsent = 500
        protocol.look(300, patience)
        transport.unsent = 700  # more is sent, nothing read
        protocol.look(311, patience)
        assert transport.is_aborted

    asyncio.run(scenario())

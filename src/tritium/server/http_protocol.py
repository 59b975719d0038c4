"""uvicorn's HTTP protocol, guarded: connections are limited in number, and none may stay that does nothing.

A client may be slow in three ways: with the head of its request, with its body (`body.py`), and with reading what it is
sent. One task looks at all connections every so often.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from tritium.server.api_error import ApiError

MAX_HEAD_BYTES = 16 << 10  # of a request's first line and headers


@dataclass(frozen=True)
class Patience:
    """Seconds. head: for a request's head to arrive, from the connection's start or the head's first byte.

    keep_alive: between two requests. read: without a byte read of what waits to be sent. look: between two looks.
    """

    head: float = 30.0
    keep_alive: float = 30.0
    read: float = 60.0
    look: float = 1.0


class GuardedProtocol(H11Protocol):
    """One connection. Its fields are of one event loop."""

    def __init__(self, *args: Any, max_connections: int = 1024, **options: Any) -> None:
        super().__init__(*args, **options)
        self._max_connections = max_connections
        self._head_since: float | None = None  # when the head that is awaited began
        self._unsent, self._unsent_since = 0, 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, or say that there are too many."""
        super().connection_made(transport)
        self._head_since = time.monotonic()
        if len(self.connections) > self._max_connections:
            message = f"the server has {self._max_connections} connections and takes no more: try again in a moment"
            transport.write(_refusal(ApiError(503, message, code="too_many_connections")))
            transport.close()

    def data_received(self, data: bytes) -> None:
        """A head is awaited from its first byte on; between two requests uvicorn's own timer runs."""
        if self.transport.is_closing():
            return
        if self._is_between_requests and self._head_since is None:
            self._head_since = time.monotonic()
        super().data_received(data)
        if not self._is_between_requests:
            self._head_since = None

    def look(self, now: float, patience: Patience) -> None:
        """End the connection when it has been waited for long enough."""
        if self._head_since is not None and now - self._head_since > patience.head:
            self.transport.abort()
            return
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent or not self._unsent:
            self._unsent_since = now
        self._unsent = unsent
        if unsent and now - self._unsent_since > patience.read:
            self.transport.abort()

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete


async def keep_looking(connections: Iterable[Any], patience: Patience) -> None:
    """Look at every connection, for ever. connections: uvicorn's own set."""
    while True:
        await asyncio.sleep(patience.look)
        now = time.monotonic()
        for connection in list(connections):
            connection.look(now, patience)


def _refusal(error: ApiError) -> bytes:
    body = error.response().body
    head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}retry-after: 2\r\nconnection: close\r\n\r\n".encode() + bytes(body)

"""Responses that end their work when the client has gone."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

SEND_SECONDS = 60.0  # that a client may take to make room for the next event

Event = dict[str, Any]


class ClientGone(Exception):
    """The client has closed its connection, or does not read from it."""


async def until_gone(request: Request, work: Callable[[], Awaitable[Response]]) -> Response:
    """`work()`, cancelled and answered by nothing when the client leaves before it is done."""
    task = asyncio.ensure_future(work())
    gone = asyncio.ensure_future(_wait_until_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else Response(status_code=499)
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events: one `data:` line each, and `[DONE]` after the last.

    events: closed (its `finally` runs) when the client leaves or does not read for `SEND_SECONDS`.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[Event | None]) -> None:
        """A None among the events ends the stream at once, without `[DONE]`: an error was its last event."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end or the client has gone, whichever comes first."""
        task = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_wait_until_gone(receive))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                with suppress(ClientGone):
                    await task
        finally:
            for other in (task, gone):
                other.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            async for event in events:
                if event is None:
                    return await self._send(send, b"", more=False)
                await self._send(send, b"data: " + msgspec.json.encode(event) + b"\n\n", more=True)
        await self._send(send, b"data: [DONE]\n\n", more=False)

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError as error:
            raise ClientGone(f"the client has not read for {SEND_SECONDS:.0f} s") from error


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

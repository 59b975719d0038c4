"""Bodies of requests: each within a limit, and all that are being worked at within one."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request

from tritium.server.api_error import ApiError
from tritium.server.body import Bodies


def request(*pieces: bytes) -> Request:
    async def messages() -> AsyncIterator[dict[str, Any]]:
        for piece in pieces:
            yield {"type": "http.request", "body": piece, "more_body": True}
        yield {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", b"application/json")]}
    return Request(scope, messages().__anext__)


def test_all_bodies_together_are_bounded_and_release_makes_room() -> None:
    async def scenario() -> None:
        bodies = Bodies(max_bytes=1000, max_bytes_in_all=2000)
        first, second, third = (request(b'{"x": "' + b"y" * 600, b"y" * 290 + b'"}') for _ in range(3))
        assert len((await bodies.read_json(first))["x"]) == 890
        await bodies.read_json(second)
        with pytest.raises(ApiError, match="working at 1,798 bytes of requests and takes 2,000 at once") as caught:
            await bodies.read_json(third)
        assert (caught.value.status, caught.value.code) == (503, "bodies_full")
        assert caught.value.response().headers["retry-after"]
        bodies.release(third)
        bodies.release(first)
        bodies.release(first)
        await bodies.read_json(request(b'{"x": "' + b"y" * 890 + b'"}'))

    asyncio.run(scenario())


def test_a_body_that_is_too_long_by_itself_is_a_413_whoever_else_is_there() -> None:
    async def scenario() -> None:
        bodies = Bodies(max_bytes=10, max_bytes_in_all=20)
        with pytest.raises(ApiError, match="larger than 10 bytes") as caught:
            await bodies.read_json(request(b"{", b" " * 10))
        assert caught.value.status == 413

    asyncio.run(scenario())

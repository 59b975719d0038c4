"""Bodies of requests: each within a limit, and all that are being worked at within one."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request

from tritium.server.api_error import ApiError
from tritium.server.body import Bodies

JSON = [(b"content-type", b"application/json")]


def request(*pieces: bytes) -> Request:
    async def messages() -> AsyncIterator[dict[str, Any]]:
        for piece in pieces:
            yield {"type": "http.request", "body": piece, "more_body": True}
        yield {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": JSON}
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


def test_a_body_that_arrives_too_slowly_is_a_408_and_holds_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritium.server.body.BODY_SECONDS", 0.02)

    async def stalled() -> dict[str, Any]:
        if not sent:
            sent.append(True)
            return {"type": "http.request", "body": b'{"x": "' + b"y" * 1193, "more_body": True}
        return await asyncio.Event().wait()  # type: ignore[return-value]

    async def scenario() -> None:
        bodies = Bodies(max_bytes=2000, max_bytes_in_all=2000)
        slow = Request({"type": "http", "method": "POST", "path": "/", "headers": JSON}, stalled)
        with pytest.raises(ApiError, match=r"within 0\.02 s: 1,200 bytes did; send it faster") as caught:
            await bodies.read_json(slow)
        assert (caught.value.status, caught.value.code) == (408, "too_slow")
        assert caught.value.body()["error"]["type"] == "timeout_error"
        bodies.release(slow)
        await bodies.read_json(request(b'{"x": "' + b"y" * 1900 + b'"}'))

    sent: list[bool] = []
    asyncio.run(scenario())

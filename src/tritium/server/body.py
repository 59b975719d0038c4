"""Reads requests' JSON bodies within limits of size, time and depth, and all of them within one limit of memory."""

import asyncio
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from tritium.server.api_error import ApiError

BODY_SECONDS = 60.0  # for a whole body to arrive


class Bodies:
    """The bodies of all requests that are being read or worked at.

    max_bytes: of one body. max_bytes_in_all: of what has arrived of those there are at once; parsed, it may take ten
    times as much.
    """

    def __init__(self, max_bytes: int, max_bytes_in_all: int) -> None:
        self._max_bytes = max_bytes
        self._max_bytes_in_all = max_bytes_in_all
        self._held: dict[Request, int] = {}

    async def read_json(self, request: Request) -> dict[str, Any]:
        """The body, which must be one JSON object. Raises `ApiError`; NaN and infinity are no JSON and refused with it.

        A body must call itself JSON: a web page can send other kinds to a server on the reader's own machine unasked.
        It counts until `release`.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"content-type must be application/json, not {kind!r}")
        data = await self._read(request)
        try:
            value = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from error
        except RecursionError as error:
            raise ApiError(400, "the body is nested too deeply") from error
        if not isinstance(value, dict):
            raise ApiError(400, f"the body must be a JSON object, not {data[:40].decode(errors='replace')!r}")
        return value

    def release(self, request: Request) -> None:
        """The request has been answered, or its answer needs no more of its body."""
        self._held.pop(request, None)

    async def _read(self, request: Request) -> bytes:
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > self._max_bytes:
            raise self._too_large()
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    data += chunk
                    self._hold(request, len(data))
        except TimeoutError as error:
            said = f"the body did not arrive within {BODY_SECONDS:g} s: {len(data):,} bytes did; send it faster"
            raise ApiError(408, said, code="too_slow") from error
        except ClientDisconnect as error:
            raise ApiError(400, "the body ended early") from error
        return bytes(data)

    def _hold(self, request: Request, size: int) -> None:
        """Count so much for the request. Raises `ApiError` beyond a limit."""
        if size > self._max_bytes:
            raise self._too_large()
        others = sum(self._held.values()) - self._held.get(request, 0)
        if others + size > self._max_bytes_in_all:
            raise ApiError(
                503,
                f"the server is working at {others:,} bytes of requests and takes {self._max_bytes_in_all:,} at once, "
                f"not {size:,} more: try again in a moment",
                code="bodies_full",
            )
        self._held[request] = size

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_bytes:,} bytes", code="body_too_large")

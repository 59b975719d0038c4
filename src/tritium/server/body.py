"""Reads a request's JSON body within limits of size, time and depth."""

import asyncio
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from tritium.server.api_error import ApiError

BODY_SECONDS = 60.0  # for a whole body to arrive


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body, which must be one JSON object. Raises `ApiError`; NaN and infinity are no JSON and refused with it.

    A body must call itself JSON: a web page can send other kinds to a server on the reader's own machine unasked.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type must be application/json, not {kind!r}")
    data = await _read(request, max_bytes)
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {data[:40].decode(errors='replace')!r}")
    return value


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, f"the body is larger than {max_bytes:,} bytes", code="body_too_large")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the body ended early") from error
    return bytes(data)

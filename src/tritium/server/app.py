"""The HTTP application: routes, the key, errors in one shape."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tritium.errors import TritiumError
from tritium.server.api_error import ApiError, json_response
from tritium.server.chat import chat_completions
from tritium.server.completions import completions
from tritium.server.embeddings import embeddings
from tritium.server.service import Service

logger = logging.getLogger("tritium")

Endpoint = Callable[[Service, Request], Awaitable[Response]]
_OPEN_PATHS = {"/health"}  # asked by load balancers, which have no key


async def health(service: Service, request: Request) -> Response:
    """200 while requests are computed, or would be; else 503."""
    state = service.client.health
    return json_response(state.describe(), status=200 if state.status == "ok" else 503)


async def metrics(service: Service, request: Request) -> Response:
    """Counts for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def models(service: Service, request: Request) -> Response:
    """The one model there is; /v1/models/NAME is that one or 404."""
    about = {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "tritium",
        "kind": service.manifest.kind,
        "max_model_len": service.max_model_len,
    }
    name = request.path_params.get("name")
    if name is None:
        return json_response({"object": "list", "data": [about]})
    service.check_model(name)
    return json_response(about)


ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("GET", "/health", health),
    ("GET", "/metrics", metrics),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{name:path}", models),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/embeddings", embeddings),
)


def make_app(service: Service) -> Starlette:
    """The application in front of this service."""
    routes = [Route(path, partial(_answer, service, endpoint), methods=[method]) for method, path, endpoint in ROUTES]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _unexpected})


async def _answer(service: Service, endpoint: Endpoint, request: Request) -> Response:
    try:
        if request.url.path not in _OPEN_PATHS:
            _check_key(service.config.api_key, request)
        return await endpoint(service, request)
    except ApiError as error:
        return error.response()
    except TritiumError as error:
        return ApiError.of(error).response()
    finally:
        service.bodies.release(request)


def _check_key(key: str | None, request: Request) -> None:
    """Compared in a time that does not depend on where the first difference is."""
    if key is None:
        return
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode(), key.encode()):
        raise ApiError(
            401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`", code="invalid_api_key"
        )


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or another method."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}").response()


async def _unexpected(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return ApiError(500, f"the server failed on this request: {type(error).__name__}").response()

"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}} and an HTTP status."""

from typing import Any

import msgspec
from starlette.responses import Response

from tritium.errors import EngineUnavailable, RequestError, RequestTooLarge, TritiumError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_RETRY_SECONDS = {429: "1", 503: "2"}


class ApiError(Exception):
    """What a client is told. param: the field that is wrong. code: a word that programs can test for."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    @classmethod
    def of(cls, error: TritiumError) -> "ApiError":
        """A designed error, as a client should see it."""
        if isinstance(error, RequestTooLarge):
            return cls(400, str(error), code="context_length_exceeded")
        if isinstance(error, RequestError):
            return cls(400, str(error))
        if isinstance(error, EngineUnavailable):
            return cls(503, str(error), code="engine_unavailable")
        return cls(500, str(error))

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP response; it says when to come back, where that helps."""
        after = _RETRY_SECONDS.get(self.status)
        headers = {"retry-after": after} if after else {}
        return json_response(self.body(), status=self.status, headers=headers)


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with this value as JSON."""
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json", headers=headers)

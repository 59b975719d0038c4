"""POST /v1/embeddings: one embedding of each text, as the model's own files say how to pool and normalise."""

import base64
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tritium.errors import EngineUnavailable, RequestError
from tritium.server.api_error import ApiError, json_response
from tritium.server.arrivals import Arrivals
from tritium.server.connection import until_gone
from tritium.server.fields import convert, one_or_many
from tritium.server.generation import raise_unless_answer
from tritium.server.service import Service
from tritium.wire import Text

PATH = "/v1/embeddings"
MAX_INPUTS = 2048  # OpenAI's own limits, both of them
MAX_INPUT_TOKENS = 300_000
_IGNORED = {"user"}


class EmbeddingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """input: text, token ids, or a list of either. dimensions: the model's own, or a 400.

    encoding_format: "base64" is of float32, little-endian. truncate_prompt_tokens: longer texts are cut to so many
    tokens, -1 to the longest possible; without it they are refused.
    """

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None


async def embeddings(service: Service, request: Request) -> Response:
    """Embed one text or several."""
    wanted = parse_embedding(await service.bodies.read_json(request))
    service.check_model(wanted.model)
    service.check_kind("encoder", path=PATH)
    texts = await _texts(service, wanted)
    return await until_gone(request, _Embeddings(service, texts, wanted.encoding_format).whole)


def parse_embedding(body: Mapping[str, Any]) -> EmbeddingRequest:
    """Raises `ApiError` that names the field. A null counts as not sent."""
    sent = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    for name in sent.keys() - {field.name for field in msgspec.structs.fields(EmbeddingRequest)}:
        raise ApiError(400, f"unknown field {name!r}: see docs/serving.md for those there are", param=name)
    request: EmbeddingRequest = convert(sent, EmbeddingRequest)
    return request


async def _texts(service: Service, wanted: EmbeddingRequest) -> list[Text]:
    """Every input, tokenised, within all limits."""
    given = one_or_many(wanted.input, "input")
    most = min(MAX_INPUTS, service.config.max_queue)
    if len(given) > most:
        message = f"input has {len(given)} texts; at most {most} may be sent at once: send several requests"
        raise ApiError(400, message, param="input")
    size = service.client.limits["embedding_size"]
    if wanted.dimensions not in (None, size):
        raise ApiError(
            400,
            f"dimensions must be {size}, not {wanted.dimensions}: this model's embeddings are not made to be shortened",
            param="dimensions",
        )
    max_len = _max_len(wanted.truncate_prompt_tokens, service.max_model_len)
    service.check_room(len(given))
    if isinstance(given[0], str):
        try:
            texts = await service.encode_for_embedding(given, max_len)
        except RequestError as error:
            raise ApiError(400, str(error), param="input") from error
    else:
        texts = [Text(ids[:max_len]) for ids in given]
    _check(service, texts)
    return texts


def _max_len(limit: int | None, longest: int) -> int | None:
    if limit is None:
        return None
    if limit != -1 and not 1 <= limit <= longest:
        message = f"truncate_prompt_tokens must be -1 or from 1 to {longest}, not {limit}"
        raise ApiError(400, message, param="truncate_prompt_tokens")
    return longest if limit == -1 else limit


def _check(service: Service, texts: Sequence[Text]) -> None:
    for index, text in enumerate(texts):
        service.check_text(text.token_ids, param="input" if len(texts) == 1 else f"input[{index}]")
    total = sum(len(text.token_ids) for text in texts)
    if total > MAX_INPUT_TOKENS:
        message = f"input has {total} tokens; at most {MAX_INPUT_TOKENS} may be sent at once: send several requests"
        raise ApiError(400, message, param="input")


class _Embeddings:
    """One request's answer in OpenAI's shape."""

    def __init__(self, service: Service, texts: list[Text], encoding: str) -> None:
        self._service = service
        self._texts = texts
        self._encoding = encoding
        self._arrivals = Arrivals()

    async def whole(self) -> Response:
        """Raises `ApiError` for what was refused or failed. Left early, it aborts what is unfinished."""
        service, texts = self._service, self._texts
        service.check_room(len(texts))
        num_left = len(texts)
        data: list[msgspec.Raw] = [msgspec.Raw()] * num_left
        try:
            request_id = service.client.encode(self._arrivals, texts)
        except EngineUnavailable as error:
            raise ApiError.of(error) from error
        try:
            while num_left:
                output = await self._arrivals.get()
                num_left -= 1
                index = output.sample_index
                service.metrics.note_finish(output, len(texts[index].token_ids), 0)
                raise_unless_answer(output)
                data[index] = self._item(index, output.embedding)
        finally:
            if num_left:
                service.client.abort(request_id)
                service.metrics.note_aborts(num_left)
        num_tokens = sum(len(text.token_ids) for text in texts)
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return json_response({"object": "list", "data": data, "model": service.model_name, "usage": usage})

    def _item(self, index: int, embedding: bytes) -> msgspec.Raw:
        """Made as it comes: thousands at once would hold up everybody else's events."""
        value = base64.b64encode(embedding).decode() if self._encoding == "base64" else array("f", embedding).tolist()
        return msgspec.Raw(msgspec.json.encode({"object": "embedding", "index": index, "embedding": value}))

"""POST /v1/completions."""

import time
import uuid
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tritium.server.api_error import json_response
from tritium.server.connection import Event, EventStream, until_gone
from tritium.server.generation import Generation
from tritium.server.openai_logprobs import completion_logprobs
from tritium.server.openai_request import CompletionRequest, Parsed, parse_completion
from tritium.server.service import Service
from tritium.wire import Output


async def completions(service: Service, request: Request) -> Response:
    """Complete one prompt or several, streaming or not."""
    parsed = parse_completion(await service.bodies.read_json(request), service.manifest.vocab_size)
    service.check_model(parsed.request.model)
    service.check_kind("decoder", path=request.url.path)
    prompts, texts = await _prompts(service, parsed.request)
    service.check_logprobs(prompts, parsed.params)
    completion = _Completion(service, parsed, prompts, texts)
    if parsed.request.stream:
        return completion.stream()
    return await until_gone(request, completion.whole)


async def _prompts(service: Service, request: CompletionRequest) -> tuple[list[list[int]], list[str]]:
    """Token ids of each prompt and, for `echo`, their texts."""
    given: Any = request.prompts
    is_text = isinstance(given[0], str)
    prompts: list[list[int]] = await service.encode(given) if is_text else given
    for prompt in prompts:
        service.check_prompt(prompt, param="prompt")
    if not request.echo:
        return prompts, [""] * len(prompts)
    return prompts, given if is_text else [service.tokenizer.decode(prompt) for prompt in prompts]


class _Completion:
    """One request's answer in OpenAI's shape."""

    def __init__(self, service: Service, parsed: Parsed, prompts: list[list[int]], texts: list[str]) -> None:
        self._generation = Generation(service, prompts, parsed.params, parsed.request)
        self._request: CompletionRequest = parsed.request
        self._has_logprobs = parsed.params.get("logprobs") is not None
        self._tokenizer = service.tokenizer if service.has_tokenizer else None
        self._texts = texts
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }

    async def whole(self) -> Response:
        choices = [
            self._choice(index, self._echo(index) + one.text, one.logprobs, 0, one.finish_reason)
            for index, one in enumerate(await self._generation.whole())
        ]
        return json_response({**self._head, "choices": choices, "usage": self._generation.usage})

    def stream(self) -> Response:
        self._generation.check_room()
        has_usage = self._request.stream_options.include_usage
        extra = {"usage": None} if has_usage else {}
        lengths: dict[int, int] = {}

        def events_of(index: int, output: Output) -> Iterator[Event]:
            text = output.text if index in lengths else self._echo(index) + output.text
            offset = lengths.get(index, 0)
            lengths[index] = offset + len(text)
            if text or output.finish_reason or (self._has_logprobs and output.logprobs):
                choice = self._choice(index, text, output.logprobs, offset, output.finish_reason)
                yield {**self._head, "choices": [choice], **extra}

        return EventStream(self._generation.events(self._head, events_of, has_usage=has_usage))

    def _echo(self, index: int) -> str:
        return self._texts[index // self._request.n]

    def _choice(self, index: int, text: str, logprobs: Any, offset: int, reason: str | None) -> dict[str, Any]:
        shown = completion_logprobs(self._tokenizer, logprobs, offset) if self._has_logprobs else None
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}

"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tritium.server.api_error import ApiError, json_response
from tritium.server.connection import Event, EventStream, until_gone
from tritium.server.generation import Generation
from tritium.server.openai_logprobs import chat_logprobs
from tritium.server.openai_request import ChatRequest, Parsed, parse_chat
from tritium.server.service import Service
from tritium.wire import Output

_TAKEN = {"messages", "tools", "documents", "template", "add_generation_prompt"}  # not for chat_template_kwargs
_MAX_VARIABLES = 32


async def chat_completions(service: Service, request: Request) -> Response:
    """Answer a conversation, streaming or not."""
    parsed = parse_chat(await service.bodies.read_json(request), service.manifest.vocab_size)
    service.check_model(parsed.request.model)
    service.check_kind("decoder", path=request.url.path)
    prompt = await service.encode_chat(*_conversation(parsed.request))
    service.check_prompt(prompt, param="messages")
    service.check_logprobs([prompt], parsed.params)
    answer = _ChatAnswer(service, parsed, prompt)
    if parsed.request.stream:
        return answer.stream()
    return await until_gone(request, answer.whole)


def _conversation(request: ChatRequest) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages and the options for the template."""
    variables = request.chat_template_kwargs
    taken = sorted(_TAKEN & variables.keys())
    if taken or len(variables) > _MAX_VARIABLES:
        problem = f"{taken[0]!r} is not for chat_template_kwargs" if taken else f"more than {_MAX_VARIABLES} variables"
        raise ApiError(400, f"{problem}: leave it out", param="chat_template_kwargs")
    messages = [{**message, "content": _text(message)} for message in request.messages]
    return messages, {**variables, "add_generation_prompt": request.add_generation_prompt}


def _text(message: Mapping[str, Any]) -> Any:
    """The content: text, or parts of text, one a line."""
    content = message.get("content")
    if not isinstance(content, list):
        return content
    lines = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(
                400, f"messages: this model takes text only, not the content part {part!r:.100}", param="messages"
            )
        lines.append(part["text"])
    return "\n".join(lines)


class _ChatAnswer:
    """One request's answer in OpenAI's shape."""

    def __init__(self, service: Service, parsed: Parsed, prompt: list[int]) -> None:
        self._generation = Generation(service, [prompt], parsed.params, parsed.request)
        self._request: ChatRequest = parsed.request
        self._tokenizer = service.tokenizer
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.model_name}

    async def whole(self) -> Response:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": self._logprobs(one.logprobs),
                "finish_reason": one.finish_reason,
            }
            for index, one in enumerate(await self._generation.whole())
        ]
        head = {**self._head, "object": "chat.completion"}
        return json_response({**head, "choices": choices, "usage": self._generation.usage})

    def stream(self) -> Response:
        self._generation.check_room()
        has_usage = self._request.stream_options.include_usage
        head = {**self._head, "object": "chat.completion.chunk"}
        extra = {"usage": None} if has_usage else {}

        def chunk(index: int, delta: dict[str, str], logprobs: Any = None, reason: str | None = None) -> Event:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return {**head, "choices": [choice], **extra}

        started: set[int] = set()

        def events_of(index: int, output: Output) -> Iterator[Event]:
            if index not in started:
                started.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            if output.text or (self._request.logprobs and output.logprobs):
                yield chunk(index, {"content": output.text}, self._logprobs(output.logprobs))
            if output.finish_reason:
                yield chunk(index, {}, reason=output.finish_reason)

        return EventStream(self._generation.events(head, events_of, has_usage=has_usage))

    def _logprobs(self, tokens: Any) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, tokens) if self._request.logprobs else None

"""What OpenAI's clients send, checked: the protocol's own fields here, the sampling fields by `SamplingParams`.

Every field of `SamplingParams` may be sent under its own name, OpenAI's or not (top_k, min_p, min_tokens, ...). A field
that neither knows is refused, and so is one of OpenAI's that this server cannot honour, unless it has no effect.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from tritium.errors import RequestError
from tritium.sampling_params import MAX_PRIORITY, SamplingParams
from tritium.server.api_error import ApiError
from tritium.server.fields import convert, one_or_many

MAX_CHOICES = 128  # n, and prompts in one request
MAX_SALT = 1024  # characters of cache_salt
COMPLETION_MAX_TOKENS = 16  # when a completion does not say; chats go on until they stop
_NOT_FOR_CLIENTS = {"logits_processors", "best_of", "prompt_logprobs", "truncate_prompt_tokens"}
SAMPLING_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)} - _NOT_FOR_CLIENTS

# Fields of OpenAI's that change nothing here: who asks, and values that ask for what happens anyway.
_IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
    "store": (False,),
    "parallel_tool_calls": (True, False),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
}
_UNSUPPORTED = {
    *(
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "response_format",
        "suffix",
        "audio",
        "modalities",
        "store",
    ),
    *("prediction", "reasoning_effort", "verbosity", "web_search_options", "service_tier", "parallel_tool_calls"),
    *_NOT_FOR_CLIENTS,
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """include_usage: one more event with the request's counts of tokens, before the end."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Common(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of both endpoints. n: answers to each prompt. priority: lower runs sooner. cache_salt: see `Request`."""

    model: str
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)
    priority: int = 0
    cache_salt: str = ""


class CompletionRequest(Common, kw_only=True, forbid_unknown_fields=True):
    """/v1/completions. prompt: text, token ids, or a list of either. echo: the prompt is part of the text."""

    prompt: str | list[str | int | list[int]]
    echo: bool = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, all text or all token ids. Raises `ApiError` for a mixture."""
        return one_or_many(self.prompt, "prompt")


class ChatRequest(Common, kw_only=True, forbid_unknown_fields=True):
    """/v1/chat/completions. chat_template_kwargs: variables for the template."""

    messages: list[dict[str, Any]]
    logprobs: bool = False
    top_logprobs: int = 0
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True


class Parsed(NamedTuple):
    """params: for `SamplingParams`, only what was sent; already found valid."""

    request: Any
    params: dict[str, Any]


def parse_completion(body: Mapping[str, Any], vocab_size: int) -> Parsed:
    """Raises `ApiError` that names the field. vocab_size: of the model."""
    request, params = _parse(body, CompletionRequest, SAMPLING_FIELDS)
    _check_count(params, vocab_size)
    params.setdefault("max_tokens", max(COMPLETION_MAX_TOKENS, _int(params.get("min_tokens"))))
    _check(params)
    if len(request.prompts) * request.n > MAX_CHOICES:
        problem = f"{len(request.prompts)} prompts with n={request.n} are more than {MAX_CHOICES} answers"
        raise ApiError(400, f"{problem}: send several requests", param="prompt")
    if request.echo and params.get("logprobs") is not None:
        raise ApiError(400, "echo together with logprobs is not supported: leave one of them out", param="echo")
    return Parsed(request, params)


def parse_chat(body: Mapping[str, Any], vocab_size: int) -> Parsed:
    """Raises `ApiError` that names the field. vocab_size: of the model."""
    request, params = _parse(body, ChatRequest, SAMPLING_FIELDS - {"logprobs"})
    _check_count(params, vocab_size)
    most = request.max_completion_tokens
    if most is not None and params.setdefault("max_tokens", most) != most:
        raise ApiError(
            400, "max_tokens and max_completion_tokens differ: send one of them", param="max_completion_tokens"
        )
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if request.logprobs:
        params["logprobs"] = request.top_logprobs
    _check(params)
    if not request.messages:
        raise ApiError(400, "messages is empty: a conversation needs at least one message", param="messages")
    return Parsed(request, params)


def _parse(body: Mapping[str, Any], schema: type[Common], sampling_names: set[str]) -> Parsed:
    """Split the body into the protocol's fields and the sampling fields. A null counts as not sent."""
    sent = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    for name in _UNSUPPORTED & sent.keys():
        if sent[name] not in _HARMLESS.get(name, ()):
            raise ApiError(400, f"{name} is not supported by this server: leave it out", param=name, code="unsupported")
        del sent[name]
    own = {field.name for field in msgspec.structs.fields(schema)}
    for name in sent:
        if name not in own | sampling_names:
            raise ApiError(400, f"unknown field {name!r}: see docs/serving.md for those there are", param=name)
    request = convert({name: sent[name] for name in sent if name in own}, schema)
    if not 1 <= request.n <= MAX_CHOICES:
        raise ApiError(400, f"n must be an integer from 1 to {MAX_CHOICES}, not {request.n}", param="n")
    if abs(request.priority) > MAX_PRIORITY:  # here too: the engine's messages hold 64 bits
        message = f"priority must be an integer within ±{MAX_PRIORITY}, not {request.priority}"
        raise ApiError(400, message, param="priority")
    if len(request.cache_salt) > MAX_SALT:
        message = f"cache_salt may have at most {MAX_SALT} characters, not {len(request.cache_salt)}: send a hash of it"
        raise ApiError(400, message, param="cache_salt")
    params = {name: value for name, value in sent.items() if name in sampling_names - own}
    return Parsed(request, params if request.n == 1 else {**params, "n": request.n})


def _check_count(params: Mapping[str, Any], vocab_size: int) -> None:
    """Raises `ApiError` for more ids than there are, before anything walks them: a body has room for millions."""
    ids = params.get("allowed_token_ids")
    if isinstance(ids, list) and len(ids) > vocab_size:
        message = f"allowed_token_ids may hold at most {vocab_size} entries, all tokens of the model, not {len(ids)}"
        raise ApiError(400, message, param="allowed_token_ids")


def _check(params: Mapping[str, Any]) -> None:
    """Raises `ApiError`, with the field where the message starts with one."""
    try:
        SamplingParams(**params)
    except RequestError as error:
        name = str(error).split(" ", 1)[0]
        raise ApiError(400, str(error), param=name if name in SAMPLING_FIELDS else None) from error


def _int(value: object) -> int:
    """The value if it is one that counts; the check comes after."""
    return value if isinstance(value, int) and 0 < value <= 1 << 24 else 0

"""What the endpoints share: the engine's client, its tokenizer and limits, metrics, configuration."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tritium.config import RuntimeConfig, ServerConfig
from tritium.engine.manifest import Manifest, read_manifest
from tritium.engine.plan import PlanKind
from tritium.errors import EngineUnavailable, RequestError
from tritium.server.api_error import ApiError
from tritium.server.body import Bodies
from tritium.server.engine_client import EngineClient
from tritium.server.health import EngineHealth
from tritium.server.metrics import ServerMetrics
from tritium.text.tokenizer import Tokenizer
from tritium.wire import Text

MAX_LOGPROBS_IN_ALL = 1 << 22  # of one HTTP request, about 100 bytes each
CUT_LENGTH_FACTOR = 8  # a text that will be cut may be so many times longer than one that must fit


class Service:
    """One model, served."""

    def __init__(self, config: ServerConfig, model_name: str, manifest: Manifest, client: EngineClient) -> None:
        self.config = config
        self.model_name = model_name
        self.manifest = manifest
        self.client = client
        self.metrics = ServerMetrics(client)
        self.bodies = Bodies(config.max_body_bytes, config.max_body_bytes_in_all)
        self.created = int(time.time())
        self._tokenizer: Tokenizer | None = None

    @classmethod
    async def start(cls, engine: Path, runtime: RuntimeConfig, config: ServerConfig) -> "Service":
        """Load tokenizer and engine. Raises what the engine process could not load."""
        manifest = read_manifest(engine)
        tokenizer = None
        if (engine / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_directory(engine, model_vocab_size=manifest.vocab_size)
        client = await EngineClient.start(engine, runtime, EngineHealth(config.stall_seconds))
        name = config.served_model_name or manifest.model.get("name") or engine.name
        service = cls(config, name, manifest, client)
        service._tokenizer = tokenizer
        return service

    @property
    def max_model_len(self) -> int:
        """Prompt and output at most, in tokens, as the engine's memory allows."""
        return self.client.limits["max_model_len"]

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `ApiError` when the engine has none."""
        if self._tokenizer is None:
            raise ApiError(400, f"{self.model_name} has no tokenizer: send prompts of token ids to /v1/completions")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """True when text can be sent and comes back."""
        return self._tokenizer is not None

    def check_model(self, name: str) -> None:
        """Raises `ApiError` unless that is what is served here."""
        if name != self.model_name:
            message = f"the model {name!r:.200} does not exist here; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_kind(self, kind: PlanKind, *, path: str) -> None:
        """Raises `ApiError` unless the engine does what the endpoint at `path` is for."""
        if self.manifest.kind == kind:
            return
        does, instead = {
            "decoder": ("generates text and embeds nothing", "/v1/completions or /v1/chat/completions"),
            "encoder": ("is an encoder and generates no text", "/v1/embeddings"),
        }[self.manifest.kind]
        message = f"{path}: the model {self.model_name!r} {does}; use {instead}, or a server with another model"
        raise ApiError(400, message, param="model", code="unsupported")

    def check_room(self, num_answers: int) -> None:
        """Raises `ApiError` unless so many more would be taken now."""
        try:
            self.client.check_available()
        except EngineUnavailable as error:
            raise ApiError.of(error) from error
        if self.client.num_unfinished + num_answers > self.config.max_queue:
            raise ApiError(
                429,
                f"the server has {self.client.num_unfinished} unfinished requests and accepts at most "
                f"{self.config.max_queue}: try again later",
                code="queue_full",
            )

    async def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, made beside the event loop. Raises `ApiError` for one that is too long to try."""
        tokenizer = self.tokenizer
        for text in texts:
            self._check_length(text, param="prompt")
        return await asyncio.to_thread(lambda: [tokenizer.encode(text) for text in texts])

    async def encode_for_embedding(self, texts: Sequence[str], max_len: int | None) -> list[Text]:
        """Token ids and types of each text, cut to `max_len` tokens if that is given. Raises as `encode` does."""
        tokenizer = self.tokenizer
        has_types = self.manifest.encoder is not None and self.manifest.encoder.num_token_types > 1
        for text in texts:
            self._check_length(text, param="input", factor=1 if max_len is None else CUT_LENGTH_FACTOR)

        def encode_all() -> list[Text]:
            pairs = (tokenizer.encode_pair(text, max_len=max_len) for text in texts)
            return [Text(ids, types if has_types and any(types) else []) for ids, types in pairs]

        return await asyncio.to_thread(encode_all)

    async def encode_chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        """Token ids of a conversation. Raises `ApiError` for one that the model's template refuses."""
        tokenizer = self.tokenizer
        try:
            text = await asyncio.to_thread(lambda: tokenizer.render_chat(messages, **options))
        except RequestError as error:
            raise ApiError(400, str(error), param="messages") from error
        self._check_length(text, param="messages")
        return await asyncio.to_thread(lambda: tokenizer.encode(text, add_special_tokens=False))

    def _check_length(self, text: str, *, param: str, factor: int = 1) -> None:
        """Raises `ApiError` when even the longest tokens could not fit it in: to tokenise megabytes takes long."""
        fitting = self.max_model_len * self.tokenizer.longest_token
        if len(text) > factor * fitting:
            cut = f" (and {factor * fitting} when it is to be cut)" if factor > 1 else ""
            raise ApiError(
                400,
                f"{param} has {len(text)} characters; this model's context of {self.max_model_len} tokens holds at "
                f"most {fitting}{cut}: send a shorter text",
                param=param,
                code="context_length_exceeded",
            )

    def check_logprobs(self, prompts: Sequence[Sequence[int]], params: Mapping[str, Any]) -> None:
        """Raises `ApiError` when an answer's logprobs could take too much memory, here and in the engine."""
        if params.get("logprobs") is None:
            return
        most = params.get("max_tokens") or self.max_model_len
        num_tokens = params.get("n", 1) * sum(min(most, self.max_model_len - len(prompt)) for prompt in prompts)
        count = num_tokens * (2 + params["logprobs"])
        if count > MAX_LOGPROBS_IN_ALL:
            raise ApiError(
                400,
                f"logprobs: {num_tokens} tokens with {params['logprobs']} alternatives each are {count} entries; at "
                f"most {MAX_LOGPROBS_IN_ALL} may be asked for at once: lower max_tokens, n or logprobs",
                param="logprobs",
            )

    def check_prompt(self, token_ids: Sequence[int], *, param: str) -> None:
        """Raises `ApiError` unless the model knows the ids and has room for them and one more."""
        if not token_ids:
            raise ApiError(400, f"{param} is empty: it needs at least one token", param=param)
        if len(token_ids) >= self.max_model_len:
            raise ApiError(
                400,
                f"{param} has {len(token_ids)} tokens; this model's context of {self.max_model_len} tokens leaves room "
                f"for at most {self.max_model_len - 1} and one output token",
                param=param,
                code="context_length_exceeded",
            )
        self._check_known(token_ids, param)

    def check_text(self, token_ids: Sequence[int], *, param: str) -> None:
        """Raises `ApiError` unless an encoder has room for the text and knows its ids."""
        if not token_ids:
            raise ApiError(400, f"{param} is empty: it needs at least one token", param="input")
        if len(token_ids) > self.max_model_len:
            raise ApiError(
                400,
                f"{param} has {len(token_ids)} tokens, the model takes {self.max_model_len}: send a shorter text, or "
                "truncate_prompt_tokens=-1 to have it cut",
                param="input",
                code="context_length_exceeded",
            )
        self._check_known(token_ids, param)

    def _check_known(self, token_ids: Sequence[int], param: str) -> None:
        vocab_size = self.manifest.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            wrong = next(i for i in token_ids if not 0 <= i < vocab_size)
            message = f"token id {wrong} in {param} is not in 0..{vocab_size - 1}"
            raise ApiError(400, message, param=param.partition("[")[0])

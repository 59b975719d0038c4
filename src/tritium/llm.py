"""`LLM`: offline, in-process generation. One engine thread computes; this side only tokenises, waits and collects.

from tritium import LLM, SamplingParams
with LLM("path/to/model") as llm:
    for output in llm.generate(["def main("], SamplingParams(temperature=0, max_tokens=32)):
        print(output.outputs[0].text)
"""

import asyncio
import dataclasses
import itertools
import logging
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from tritium.build_child import build_in_child
from tritium.config import BuildConfig, RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.obtain import obtain_engine
from tritium.engine.refit import new_weights, open_source
from tritium.errors import ConfigError, RequestError
from tritium.kernels.plugin import Plugin, load_plugins
from tritium.keywords import check_known
from tritium.mailbox import AsyncMailbox
from tritium.progress import progress_bar
from tritium.prompts import Prompt, as_prompts
from tritium.runtime.assemble import load_tokenizer
from tritium.runtime.beam_search import BeamSearch, BeamSearchOutput, run_searches
from tritium.runtime.engine_thread import EngineThread
from tritium.runtime.gpu.device import check_device
from tritium.runtime.make_request import RequestMaker
from tritium.runtime.outputs import CompletionOutput, RequestOutput, StepOutput, join_steps
from tritium.runtime.ranks.launch import open_loop
from tritium.runtime.request import Request
from tritium.runtime.scheduler_config import SchedulerConfig, SchedulerStats
from tritium.runtime.weight_updates import OnInflight, WeightUpdate
from tritium.sampling_params import BeamSearchParams, SamplingParams
from tritium.text_encoder import EncoderMethods, TextEncoder
from tritium.weights.hub import model_directory

__all__ = ["LLM", "CompletionOutput", "RequestOutput"]

COMPLETION_MAX_TOKENS = 16  # when `max_tokens` is not given; chats go on until they stop

Message = Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM(EncoderMethods):
    """A model, ready to generate or, when it is an encoder, to embed, classify and score texts.

    Threads may share one; it is closed by `close`, or by leaving a `with` block.

    model: an engine directory, a Hugging Face model directory, or a hub id. A model is built into an engine on first
    use, in a child process, and cached by content; later starts compile nothing.
    plugins: ops and kernels of your own, as `Plugin` objects or "module:name": those that an engine was built with, or,
        for a model, those to build with (then named, since a child process builds).
    With `tensor_parallel=N`, or an engine that was built with it, N - 1 more processes are started, which compute each
    layer together with this one; with device="cuda" each has a GPU.
    options: the fields of `BuildConfig` (dtype, scheme, device, max_model_len, ...) and of `RuntimeConfig`
    (max_num_seqs, max_num_batched_tokens, kv_cache_memory, num_threads, seed, ...). An unknown one is a `ConfigError`.
    """

    def __init__(self, model: str | Path, *, plugins: Sequence[Plugin | str] = (), **options: Any) -> None:
        """Raises `ConfigError`, `CheckpointError`, `EngineError` or `OutOfMemory`, each naming what is wrong."""
        _speak()
        if options.get("rank") is not None:
            raise ConfigError(
                f"rank={options['rank']!r}: LLM opens all ranks of a model; leave it out (build() and `tritium build` "
                "take it)"
            )
        build, self.config = _split_options(options)
        check_device(build.device, build.tensor_parallel)
        own = load_plugins(plugins)
        keys = [f"{given} {plugin.name} {plugin.version}" for given, plugin in zip(plugins, own, strict=True)]
        path = obtain_engine(model, build, partial(build_in_child, plugins=plugins), plugins=keys)
        self.engine = Engine.load(path, plugins=own)
        if self.engine.manifest.kind == "module":
            raise ConfigError(
                f"{self.engine.path} is a stateless module, no language model: use Engine.load(...).run()"
            )
        self.tokenizer = load_tokenizer(self.engine)
        self._requests = RequestMaker(self.tokenizer, self.engine.manifest.eos_token_ids, self.engine.path)
        self._ids = map("request-{}".format, itertools.count())
        self._mailboxes: dict[asyncio.AbstractEventLoop, AsyncMailbox] = {}
        self._engine_thread: EngineThread | None = None
        if self.engine.manifest.kind == "encoder":
            self._encoder = TextEncoder(self.engine, self.config, self.tokenizer)
            return
        self._engine_thread = EngineThread(
            partial(open_loop, self.engine, self.config, self.tokenizer, plugins=plugins)
        )
        weakref.finalize(self, self._thread.close)  # also when the interpreter ends: no thread computes while it dies

    # -- offline -------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many (text or token ids); the outputs are in the order of the prompts.

        sampling_params: one for all, or one per prompt; `max_tokens` unset means 16.
        use_progress: a progress bar on standard error; None: when that is a terminal.

        Raises `RequestError` for the first prompt that is invalid or could never fit; then none of them is answered.
        A request that fails while it runs has finish_reason "error" and does not disturb the others.
        """
        many = as_prompts(prompts)
        params = [_with_max_tokens(p, COMPLETION_MAX_TOKENS) for p in _as_params(sampling_params, len(many))]
        return self._run([self._request(p, q) for p, q in zip(many, params, strict=True)], use_progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_progress: bool | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or many. `max_tokens` unset means until a stop or the end of the context.

        messages: {"role": ..., "content": ...}, as chat templates take them. template_options: for the template
        (`tools`, `add_generation_prompt`, ...). Raises as `generate` does.
        """
        if not messages:
            raise RequestError("messages is empty: a conversation needs at least one message")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        params = _as_params(sampling_params, len(conversations))
        tokenizer = self._requests.need_tokenizer("chat() needs a tokenizer")
        requests = []
        for conversation, q in zip(conversations, params, strict=True):
            text = tokenizer.render_chat(conversation, **template_options)  # type: ignore[arg-type]
            ids = tokenizer.encode(text, add_special_tokens=False)
            requests.append((text, self._make_request(ids, q, None)))
        return self._run(requests, use_progress)

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The likeliest sequences of each prompt, as transformers' beam search finds them.

        Raises `RequestError` for a prompt that is invalid, `EngineError` when a step fails; then nothing is answered.
        """
        texts, searches = [], {}
        for prompt in as_prompts(prompts):
            text, request = self._request(prompt, SamplingParams())
            room = max(1, self.limits.max_model_len - request.num_prompt_tokens)
            search = BeamSearch(params, request.eos_token_ids, min(room, params.max_tokens or room))
            texts.append(text)
            searches[request.request_id] = (request.prompt_token_ids, search)
        run_searches(searches, self._thread)
        outputs = []
        for text, (ids, search) in zip(texts, searches.values(), strict=True):
            sequences = search.sequences
            if self.tokenizer is not None:
                skip = params.skip_special_tokens
                for one in sequences:
                    one.text = self.tokenizer.decode(one.token_ids, skip_special_tokens=skip)
            outputs.append(BeamSearchOutput(prompt=text, prompt_token_ids=list(ids), sequences=sequences))
        return outputs

    # -- streaming -----------------------------------------------------------------------------------------------------

    async def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt, as it is computed: each RequestOutput holds only what is new (text and token ids).

        It has one entry in `outputs`, whose `index` says which of the `n` outputs goes on. The last one is `finished`.
        Leaving the iteration early aborts the request. Raises as `generate` does.
        """
        params = _with_max_tokens(sampling_params or SamplingParams(), COMPLETION_MAX_TOKENS)
        text, request = self._request(prompt, params, request_id)
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[StepOutput] = asyncio.Queue()
        self._thread.submit(request, partial(self._mailbox(loop).post, arrived), is_streaming=True)
        num_unfinished = params.n
        try:
            while num_unfinished:
                step = await arrived.get()
                if step.refusal is not None:
                    num_unfinished = 0
                    raise step.refusal
                num_unfinished -= step.finish_reason is not None
                yield join_steps(text, request, [step], finished=not num_unfinished)
        finally:
            if num_unfinished:
                self.abort(request.request_id)

    def abort(self, request_id: str) -> None:
        """End a request with finish_reason "abort"; one that is unknown or finished is ignored."""
        self._thread.abort(request_id)

    # -- new weights ---------------------------------------------------------------------------------------------------

    def update_weights(
        self, source: Mapping[str, torch.Tensor] | str | Path, *, on_inflight: OnInflight = "recompute"
    ) -> int:
        """Replace the model's weights while it runs; returns their generation, which outputs carry from then on.

        source: a state dict, a checkpoint directory or a hub id, as `Engine.refit` takes them. A state dict must not
            change until this returns; afterwards it may.
        on_inflight: what happens to requests that are running when the weights are exchanged, between two steps.
            "recompute": their prompt and the outputs they have are computed again with the new weights, and they go on;
            "finish_first": they end with the old weights, and nothing new starts until they have;
            "continue": they go on at once, with keys and values that the old weights made.

        All or nothing: the new weights are checked, computed and packed beside the old ones (there must be memory for
        both) while requests go on; what goes wrong changes nothing. Cached prefixes are forgotten. The engine on disk
        stays as it is. Raises `CheckpointError` that names each tensor which is missing, left over or does not fit,
        `OutOfMemory` or `EngineError`; where ranks share the model, one that cannot take them is the end of all, and a
        state dict, which is in this process alone, is refused. Not to be called on the engine thread.
        """
        path = None if isinstance(source, Mapping) else model_directory(source).absolute()
        tensors, _ = open_source(source if path is None else path)
        made = new_weights(self.engine.path, self.engine.manifest, self.engine.plan, tensors)
        return self._thread.update_weights(WeightUpdate(made, on_inflight, path=path))

    @property
    def weights_generation(self) -> int:
        """How often the weights were replaced, on disk and since."""
        return self._thread.running_loop.scheduler.weights_generation

    # -- life ----------------------------------------------------------------------------------------------------------

    @property
    def stats(self) -> SchedulerStats:
        """Requests in flight, KV blocks used, prefix hits, preemptions: as of now."""
        return self._thread.running_loop.scheduler.stats

    @property
    def limits(self) -> SchedulerConfig:
        """What memory and configuration led to: `max_model_len`, `num_blocks`, ... as they hold."""
        return self._thread.running_loop.scheduler.config

    def close(self) -> None:
        """End running requests with "abort", and the engine thread; the model's memory is free again, a GPU's too.

        May be called again.
        """
        if self._encoder is not None:
            self._encoder.close()
        if self._engine_thread is not None:
            self._engine_thread.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _thread(self) -> EngineThread:
        if self._engine_thread is None:
            raise ConfigError(
                f"{self.engine.path} ({self.engine.manifest.model['architecture']}) is an encoder and generates no "
                "text; use encode, embed, classify or score"
            )
        return self._engine_thread

    # -- inside --------------------------------------------------------------------------------------------------------

    def _request(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None = None
    ) -> tuple[str | None, Request]:
        """The prompt's text, if it is text, and its request."""
        if isinstance(prompt, str):
            ids = self._requests.need_tokenizer("a prompt of text needs a tokenizer; pass token ids").encode(prompt)
            return prompt, self._make_request(ids, params, request_id)
        return None, self._make_request(prompt, params, request_id)

    def _make_request(self, ids: Sequence[int], params: SamplingParams, request_id: str | None) -> Request:
        return self._requests.make(request_id if request_id is not None else next(self._ids), ids, params)

    def _mailbox(self, loop: asyncio.AbstractEventLoop) -> AsyncMailbox:
        """One per event loop; those of loops that are closed go."""
        for other in list(self._mailboxes):
            if other.is_closed():
                self._mailboxes.pop(other, None)
        return self._mailboxes.setdefault(loop, AsyncMailbox(loop))

    def _run(self, requests: Sequence[tuple[str | None, Request]], use_progress: bool | None) -> list[RequestOutput]:
        """Submit all, wait for all. An exception here (a refusal, Ctrl-C) aborts what is unfinished."""
        arrived: SimpleQueue[StepOutput] = SimpleQueue()
        steps: dict[str, list[StepOutput]] = {request.request_id: [] for _, request in requests}
        unfinished = {request.request_id: request.params.n for _, request in requests}
        try:
            for _, request in requests:
                self._thread.submit(request, arrived.put)
            with progress_bar(len(requests), use_progress) as bar:
                while unfinished:
                    step = arrived.get()
                    if step.refusal is not None:
                        raise step.refusal
                    steps[step.request_id].append(step)
                    if step.finish_reason is not None:
                        unfinished[step.request_id] -= 1
                    if not unfinished[step.request_id]:
                        del unfinished[step.request_id]
                        bar.finish_one(sum(len(one.token_ids) for one in steps[step.request_id]))
        finally:
            for request_id in unfinished:
                self.abort(request_id)
        return [join_steps(text, request, steps[request.request_id], finished=True) for text, request in requests]


def _speak() -> None:
    """Say on standard error what is built and how large the cache is, unless the program has set up logging itself."""
    logger = logging.getLogger("tritium")
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("tritium: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _as_params(params: Params, count: int) -> list[SamplingParams]:
    """One per prompt."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    for given in params if isinstance(params, (list, tuple)) else [params]:
        if not isinstance(given, SamplingParams):
            raise RequestError(f"sampling_params must be one SamplingParams or a list of them, not {given!r:.100}")
    if len(params) != count:
        raise RequestError(f"{count} prompts need one SamplingParams, or {count}, not {len(params)}")
    return list(params)


def _with_max_tokens(params: SamplingParams, max_tokens: int) -> SamplingParams:
    if params.max_tokens is not None:
        return params
    return dataclasses.replace(params, max_tokens=max(max_tokens, params.min_tokens))


def _split_options(options: Mapping[str, Any]) -> tuple[BuildConfig, RuntimeConfig]:
    """Each option goes where a field has its name, `max_model_len` to both. Unknown ones are refused.

    What is built and tuned here for a GPU is timed over the blocks that it runs over.
    """
    build = {field.name for field in dataclasses.fields(BuildConfig)}
    runtime = {field.name for field in dataclasses.fields(RuntimeConfig)}
    check_known(options, build | runtime, ConfigError)
    config = RuntimeConfig(**{name: value for name, value in options.items() if name in runtime})
    given = {name: value for name, value in options.items() if name in build}
    is_tuned = given.get("tune", "none") != "none" and given.get("device") == "cuda"
    if is_tuned and config.block_size != RuntimeConfig.block_size:
        given = {"tune_block_size": config.block_size, **given}
    return BuildConfig(**given), config

"""What a caller gets back: plain values, safe to keep and to pass between threads."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tritium.runtime.request import FinishReason, Request, SampledToken, Timings


class StepOutput(NamedTuple):
    """What one output of a request gained since its last StepOutput. The last one has a finish_reason.

    sample_index: which of the request's `n` outputs; each of them has a last one.
    cumulative_logprob: the sum of the logprobs of its tokens so far; None unless logprobs are computed.
    prompt_logprobs: once, with the first tokens: one entry per prompt token, the first None.
    text: whole characters only. token_ids, logprobs: the new outputs (logprobs empty unless asked for).
    stop_reason: the stop id or stop string that ended it. error: what went wrong, when finish_reason is "error".
    weights_generation: of the weights that chose the last of these tokens.
    refusal: the exception that kept the request from starting at all.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    timings: Timings | None = None
    weights_generation: int = 0
    refusal: Exception | None = None
    sample_index: int = 0
    prompt_logprobs: tuple[SampledToken | None, ...] | None = None
    cumulative_logprob: float | None = None


@dataclass(kw_only=True)
class CompletionOutput:
    """One output of a request.

    index: its place among the request's outputs. cumulative_logprob: the sum of its tokens' logprobs, if computed.
    logprobs: per token, the chosen token's log-probability and the likeliest alternatives; None unless asked for.
    finish_reason: "stop", "length", "abort" or "error"; None while it runs. stop_reason: the stop id or string met.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[SampledToken] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(kw_only=True)
class RequestOutput:
    """A request and its outputs.

    timings: seconds, on one monotonic clock. num_cached_tokens: prompt tokens that the prefix cache spared.
    weights_generation: how often the engine's weights had been replaced (`Engine.refit`, `LLM.update_weights`) when the
        last of these tokens was chosen.
    prompt_logprobs: per prompt token its log-probability and the likeliest, None for the first; None unless asked for.
    error: what went wrong, when an output's finish_reason is "error" (the first, if several went wrong).
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    timings: Timings = field(default_factory=Timings)
    num_cached_tokens: int = 0
    weights_generation: int = 0
    prompt_logprobs: list[SampledToken | None] | None = None
    finished: bool = False
    error: str | None = None


def join_steps(prompt: str | None, request: Request, steps: Sequence[StepOutput], *, finished: bool) -> RequestOutput:
    """What these steps of one request gave, joined by output; the outputs are in the order of their index."""
    by_index: dict[int, list[StepOutput]] = defaultdict(list)
    for step in steps:
        by_index[step.sample_index].append(step)
    last = steps[-1]
    return RequestOutput(
        request_id=request.request_id,
        prompt=prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=[_join(index, by_index[index], request) for index in sorted(by_index)],
        timings=dataclasses.replace(last.timings or request.timings),
        num_cached_tokens=min(step.num_cached_tokens for step in steps),
        weights_generation=last.weights_generation,
        prompt_logprobs=next((list(step.prompt_logprobs) for step in steps if step.prompt_logprobs is not None), None),
        finished=finished,
        error=next((step.error for step in steps if step.error is not None), None),
    )


def _join(index: int, steps: Sequence[StepOutput], request: Request) -> CompletionOutput:
    wants_logprobs = request.params.logprobs is not None
    return CompletionOutput(
        index=index,
        text="".join(step.text for step in steps),
        token_ids=[token_id for step in steps for token_id in step.token_ids],
        logprobs=[token for step in steps for token in step.logprobs] if wants_logprobs else None,
        cumulative_logprob=steps[-1].cumulative_logprob,
        finish_reason=steps[-1].finish_reason,
        stop_reason=steps[-1].stop_reason,
    )

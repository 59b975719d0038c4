"""What a caller gets back: plain values, safe to keep and to pass between threads."""

from dataclasses import dataclass, field
from typing import NamedTuple

from tritium.runtime.request import FinishReason, SampledToken, Timings


class StepOutput(NamedTuple):
    """What one request gained since its last StepOutput. The last one has a finish_reason.

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


@dataclass(kw_only=True)
class CompletionOutput:
    """One output of a request.

    logprobs: per token, the chosen token's log-probability and the likeliest alternatives; None unless asked for.
    finish_reason: "stop", "length", "abort" or "error"; None while it runs. stop_reason: the stop id or string met.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[SampledToken] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(kw_only=True)
class RequestOutput:
    """A request and its outputs.

    timings: seconds, on one monotonic clock. num_cached_tokens: prompt tokens that the prefix cache spared.
    weights_generation: how often the engine's weights had been replaced (`Engine.refit`, `LLM.update_weights`) when the
        last of these tokens was chosen.
    error: what went wrong, when an output's finish_reason is "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    timings: Timings = field(default_factory=Timings)
    num_cached_tokens: int = 0
    weights_generation: int = 0
    finished: bool = False
    error: str | None = None

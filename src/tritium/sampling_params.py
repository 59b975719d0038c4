"""How one request's tokens are chosen, and when it stops: one validated value shared by API, server and runtime."""

from dataclasses import dataclass
from typing import Any

from tritium.errors import RequestError
from tritium.keywords import refuse_unknown

MAX_TOKENS_LIMIT = 1 << 24
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 20


@refuse_unknown(RequestError)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request.

    max_tokens: output tokens at most; None: until a stop or the end of the context.
    min_tokens: no stop (eos, stop ids, stop strings) is honoured before that many output tokens.
    temperature: 0 is greedy; else logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all. top_p: keep the smallest set whose probability reaches p.
    min_p: keep tokens at least min_p times as likely as the likeliest. Applied in this order, after temperature.
    seed: makes this request's draws repeatable, whatever else runs; None takes one from the engine.
    stop: strings that end the output and are not part of it, unless `include_stop_str_in_output`.
    stop_token_ids: further ids that end the output, beside the model's own eos ids.
    ignore_eos: do not stop at the model's own eos ids.
    logprobs: report the chosen token's log-probability and the n likeliest (before temperature and filters).
    skip_special_tokens: leave special tokens out of the text.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens or MAX_TOKENS_LIMIT)
        _check_float("temperature", self.temperature, 0.0, 1e4)
        if 0.0 < self.temperature < 1e-2:  # dividing by less would overflow to inf and NaN
            object.__setattr__(self, "temperature", 1e-2)
        _check_int("top_k", self.top_k, 0, 1 << 31)
        _check_float("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, (1 << 64) - 1)
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop, str))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids, int))
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop may hold at most {MAX_STOP_STRINGS} strings, not {len(self.stop)}")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise RequestError(f"each stop string needs 1 to {MAX_STOP_LENGTH} characters, not {len(text)}")
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, 1 << 31)
        if len(self.stop_token_ids) > 1024:
            raise RequestError(f"stop_token_ids may hold at most 1024 ids, not {len(self.stop_token_ids)}")
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, not {getattr(self, name)!r}")

    @property
    def is_greedy(self) -> bool:
        """True when the likeliest token is always taken."""
        return self.temperature == 0.0 or self.top_k == 1


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be an integer from {low} to {high}, not {value!r}")


def _check_float(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NaN is in no range; and a huge int has no float, so that math.isfinite would raise
    if not is_number or not low <= value <= high or (above_low and value == low):  # type: ignore[operator]
        start = "above" if above_low else "from"
        raise RequestError(f"{name} must be a finite number {start} {low} to {high}, not {value!r}")


def _as_tuple(name: str, value: object, kind: type) -> tuple[Any, ...]:
    items = (value,) if isinstance(value, kind) else value
    if items is None:
        return ()
    if not isinstance(items, (list, tuple)) or not all(isinstance(i, kind) and not isinstance(i, bool) for i in items):
        raise RequestError(f"{name} must be one {kind.__name__} or a list of them, not {value!r}")
    return tuple(items)

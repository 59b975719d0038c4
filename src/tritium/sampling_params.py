"""How one request's tokens are chosen, and when it stops: one validated value shared by API, server and runtime.

docs/sampling.md states what each parameter does, in which order, with formulas and sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from tritium.errors import RequestError
from tritium.keywords import refuse_unknown

if TYPE_CHECKING:
    import numpy as np

MAX_TOKENS_LIMIT = 1 << 24
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 256
MAX_PROMPT_LOGPROBS = 20  # there are as many of them as the prompt is long
MAX_TOKEN_ID = (1 << 31) - 1
MAX_BIASES = 4096
MAX_ALLOWED_IDS = 1 << 20
MAX_BAD_WORDS = 256
MAX_PROCESSORS = 16
MAX_SAMPLES = 128
MAX_BEAMS = 64
MAX_STOP_IDS = 1024
MAX_PRIORITY = 1 << 31  # of a request, either way from 0
LOWEST_TEMPERATURE = 1e-2
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize")
_NUMBERS = (
    "n", "best_of", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "logprobs", "prompt_logprobs", "truncate_prompt_tokens",
)  # fmt: skip


@runtime_checkable
class LogitsProcessor(Protocol):
    """A user's own change of a request's logits, called before each of its tokens, on the engine thread.

    It gets the prompt, the outputs so far, and this row's logits: float32 [V], a copy that is its own to change; it
    returns the row to use (the same array or another of that shape) or None for the one it was given. Lists are not to
    be changed. All requests wait while it works. What it raises ends its own request with an error that names it.
    """

    def __call__(
        self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], logits_row: "np.ndarray"
    ) -> "np.ndarray | None":
        """The logits to sample from; -inf means never."""
        ...


@refuse_unknown(RequestError)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request.

    n: how many outputs to draw of one prompt, which is computed once. best_of: draw so many, return the n likeliest.
    max_tokens: output tokens at most; None: until a stop or the end of the context.
    min_tokens: that many output tokens come before any stop: eos and stop ids cannot be chosen, stop strings are text.
    temperature: 0 is greedy; else logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all. top_p: keep the smallest set whose probability reaches p.
    min_p: keep tokens at least min_p times as likely as the likeliest. Applied in this order, after temperature.
    seed: makes this request's draws repeatable, whatever else runs; None takes one from the engine.
    repetition_penalty: logits of tokens in prompt or output are divided by it when positive, else multiplied.
    presence_penalty, frequency_penalty: taken off the logits of tokens in the output, once and per occurrence.
    logit_bias: token id to what is added to its logit, from -100 to 100.
    allowed_token_ids: nothing else can be chosen; None allows all.
    bad_words: text that cannot come about, at the start of a word or within one (needs a tokenizer).
    logits_processors: see `LogitsProcessor`; in order, on the model's own logits, before everything above.
    stop: strings that end the output and are not part of it, unless `include_stop_str_in_output`.
    stop_token_ids: further ids that end the output, beside the model's own eos ids.
    ignore_eos: do not stop at the model's own eos ids.
    logprobs: report the chosen token's log-probability and the n likeliest, of the model's own logits.
    prompt_logprobs: the same of each prompt token but the first, which follows nothing; computes the whole prompt anew.
    detokenize: False: no text is made of the tokens. skip_special_tokens: leave special tokens out of the text.
    truncate_prompt_tokens: keep only the last n tokens of a longer prompt.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    logits_processors: tuple[LogitsProcessor, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens or MAX_TOKENS_LIMIT)
        _check_float("temperature", self.temperature, 0.0, 1e4)
        if 0.0 < self.temperature < LOWEST_TEMPERATURE:  # dividing by less would overflow to inf and NaN
            object.__setattr__(self, "temperature", LOWEST_TEMPERATURE)
        _check_int("top_k", self.top_k, 0, 1 << 31)
        self._check_samples()
        _check_float("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, (1 << 64) - 1)
        _check_float("repetition_penalty", self.repetition_penalty, 1e-2, 1e2)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        object.__setattr__(self, "logit_bias", _as_biases(self.logit_bias))
        if self.allowed_token_ids is not None:
            self._take("allowed_token_ids", int, MAX_ALLOWED_IDS)
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty: nothing could be chosen; leave it out to allow all")
        self._take("stop_token_ids", int, MAX_STOP_IDS)
        self._take("bad_words", str, MAX_BAD_WORDS)
        self._take("stop", str, MAX_STOP_STRINGS)
        object.__setattr__(self, "logits_processors", _as_processors(self.logits_processors))
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_PROMPT_LOGPROBS)
        if self.truncate_prompt_tokens is not None:
            _check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, MAX_TOKENS_LIMIT)
        for name in _FLAGS:
            _check_flag(name, getattr(self, name))
        for name in _NUMBERS:
            object.__setattr__(self, name, _plain(getattr(self, name)))
        if self.stop and not self.detokenize:
            raise RequestError(
                f"stop is {self.stop!r}, which needs text, but detokenize is False: leave one of them out"
            )

    @property
    def num_samples(self) -> int:
        """How many outputs are drawn."""
        return self.n if self.best_of is None else self.best_of

    @property
    def is_greedy(self) -> bool:
        """True when the likeliest token is always taken."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        """True when a token's logit depends on which tokens there were before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def _take(self, name: str, kind: type, limit: int) -> None:
        """Make the field a tuple of `kind`, each item in its bounds."""
        object.__setattr__(self, name, _bounded(name, getattr(self, name), kind, limit))

    def _check_samples(self) -> None:
        _check_int("n", self.n, 1, MAX_SAMPLES)
        if self.best_of is not None:
            _check_int("best_of", self.best_of, self.n, MAX_SAMPLES)
        if self.num_samples > 1 and self.is_greedy:
            raise RequestError(
                f"n={self.n}, best_of={self.best_of} with temperature={self.temperature}, top_k={self.top_k}: all "
                "outputs would be equal; draw one, or raise the temperature"
            )


@refuse_unknown(RequestError)
@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """A beam search, by the rules of transformers' `generate(num_beams=...)`.

    beam_width: how many beginnings are kept, and sequences returned. max_tokens: of each; None: to the end of the
    context. length_penalty: a sequence's score is its cumulative log-probability / length ** length_penalty.
    early_stopping: True ends when beam_width sequences have ended; False also asks whether the likeliest beam, scored
    at its present length, could still win; "never" asks that for the best length it could get.
    stop_token_ids, ignore_eos, skip_special_tokens: as in `SamplingParams`.
    """

    beam_width: int
    max_tokens: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_int("beam_width", self.beam_width, 1, MAX_BEAMS)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT)
        _check_float("length_penalty", self.length_penalty, -10.0, 10.0)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(f"early_stopping must be true, false or 'never', not {self.early_stopping!r}")
        object.__setattr__(self, "stop_token_ids", _bounded("stop_token_ids", self.stop_token_ids, int, MAX_STOP_IDS))
        for name in ("ignore_eos", "skip_special_tokens"):
            _check_flag(name, getattr(self, name))


def child_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request with `n` or `best_of`; the first sample has the request's own.

    The others are outputs of SplitMix64 (Steele, Lea, Flood 2014), whose state `seed` is.
    """
    mask = (1 << 64) - 1
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    if index == 0:
        return seed
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def _plain(value: Any) -> Any:
    """The number itself of a kind of int, float or str with more to it, as NumPy's float64 is one: what is said to
    another process is made of plain ones."""
    for kind in (int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return str.__str__(value) if isinstance(value, str) else value


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {value!r}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be an integer from {low} to {high}, not {value!r}")


def _check_float(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NaN is in no range; and a huge int has no float, so that math.isfinite would raise
    if not is_number or not low <= value <= high or (above_low and value == low):  # type: ignore[operator]
        start = "above" if above_low else "from"
        raise RequestError(f"{name} must be a finite number {start} {low} to {high}, not {value!r}")


def _bounded(name: str, value: object, kind: type, limit: int) -> tuple[Any, ...]:
    """At most `limit` ids or strings, each in its bounds."""
    items = _as_tuple(name, value, kind)
    if len(items) > limit:
        raise RequestError(f"{name} may hold at most {limit} entries, not {len(items)}")
    if kind is int and (not items or (min(items) >= 0 and max(items) <= MAX_TOKEN_ID)):
        return items
    for item in items:
        if kind is int:
            _check_int(name, item, 0, MAX_TOKEN_ID)
        elif not 1 <= len(item) <= MAX_STOP_LENGTH:
            raise RequestError(f"each string of {name} needs 1 to {MAX_STOP_LENGTH} characters, not {len(item)}")
    return items


def _as_tuple(name: str, value: object, kind: type) -> tuple[Any, ...]:
    items = (value,) if isinstance(value, kind) else value
    if items is None:
        return ()
    kinds: set[type] = set(map(type, items)) if isinstance(items, (list, tuple)) else set()
    if not isinstance(items, (list, tuple)) or not all(issubclass(k, kind) and k is not bool for k in kinds):
        raise RequestError(f"{name} must be one {kind.__name__} or a list of them, not {value!r:.200}")
    return tuple(items) if kinds <= {kind} else tuple(map(_plain, items))


def _as_biases(value: object) -> dict[int, float]:
    """A copy with int keys: JSON objects can only spell them as text."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, not {value!r:.200}")
    if len(value) > MAX_BIASES:
        raise RequestError(f"logit_bias may hold at most {MAX_BIASES} entries, not {len(value)}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        is_digits = isinstance(key, str) and len(key) <= 10 and key.isascii() and key.isdecimal()
        token_id = int(key) if is_digits else key
        _check_int("a token id of logit_bias", token_id, 0, MAX_TOKEN_ID)
        _check_float(f"logit_bias of token {token_id}", bias, -100.0, 100.0)
        biases[int(token_id)] = float(bias)
    return biases


def _as_processors(value: object) -> tuple[LogitsProcessor, ...]:
    items = (value,) if callable(value) else () if value is None else value
    if not isinstance(items, (list, tuple)) or not all(map(callable, items)):
        raise RequestError(f"logits_processors must be callables (see LogitsProcessor), not {value!r:.200}")
    if len(items) > MAX_PROCESSORS:
        raise RequestError(f"logits_processors may hold at most {MAX_PROCESSORS}, not {len(items)}")
    return tuple(items)

"""A request's whole state, and the values that pass between scheduler and executor. Pure Python.

A request's life: WAITING -> RUNNING (prefill in chunks, then decode) -> FINISHED; on the way it may be PREEMPTED, which
takes its KV blocks away and keeps its outputs: they are recomputed with the prompt when it runs again.
"""

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tritium.errors import RequestError
from tritium.sampling_params import MAX_PRIORITY, MAX_TOKEN_ID, SamplingParams

PENDING = -1  # in place of a token that is sampled and not known to the host yet
NULL_BLOCK = 0  # the block that nobody owns: padding, and what lies behind a sliding window

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestStatus(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class RowError(NamedTuple):
    """In place of a token: why this row has none. It ends its own request."""

    message: str


class SampledToken(NamedTuple):
    """One chosen token. `top_logprobs` holds (token id, log-probability), likeliest first; empty if not asked for."""

    token_id: int
    logprob: float = 0.0
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Timings:
    """When things happened to a request, in seconds of the scheduler's clock; None: not yet."""

    arrival: float | None = None
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One prompt on its way to an output. Compared by identity.

    The first eight fields are the caller's; the rest belongs to the scheduler and is read-only for everyone else.

    prompt_token_ids: any sequence of ints; kept as a list. Anything else is a `RequestError`.
    priority: a lower number runs sooner; equal ones in order of arrival.
    arrival: seconds of the scheduler's clock; None: when it is added. Read it in `timings`.
    eos_token_ids: the model's own end-of-sequence ids, obeyed unless `params.ignore_eos`.
    cache_salt: requests share cached prefixes only with equal salts.
    bad_word_ids: `params.bad_words` as token ids: the last id of each cannot follow the ones before it.

    token_ids: prompt and outputs, every token known. The KV cache holds the first `num_computed_tokens` of them.
    prompt_logprobs: one entry per prompt token as far as it is scored, the first None; empty unless asked for. The
        executor appends to it.
    cumulative_logprob: the sum of the outputs' logprobs, if `params.logprobs` is not None.
    output_logprobs: one `SampledToken` per output when `params.logprobs` is not None, else empty.
    block_tables: per KV group, the block of every `block_size` tokens from the first on; behind a window NULL_BLOCK.
        Entries are only appended or become NULL_BLOCK, until a preemption (see `num_preemptions`) empties the tables.
    weights_generation: of the weights that chose its last output token; see `LLM.update_weights`.
    num_cached_tokens: prompt tokens found in the prefix cache when it first ran.
    stop_reason: the stop token id or stop string that ended it; None after an eos id or any other reason.
    stop_ids: every id that ends it.
    max_total_tokens: prompt plus outputs at most, from max_tokens and max_model_len; set when added.
    """

    request_id: str
    prompt_token_ids: Sequence[int] = field(repr=False)
    params: SamplingParams
    priority: int = 0
    arrival: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    bad_word_ids: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    status: RequestStatus = field(default=RequestStatus.WAITING, init=False)
    token_ids: list[int] = field(init=False, repr=False)
    output_token_ids: list[int] = field(default_factory=list, init=False, repr=False)
    cumulative_logprob: float = field(default=0.0, init=False)
    prompt_logprobs: list[SampledToken | None] = field(default_factory=list, init=False, repr=False)
    output_logprobs: list[SampledToken] = field(default_factory=list, init=False, repr=False)
    num_computed_tokens: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    num_preemptions: int = field(default=0, init=False)
    weights_generation: int = field(default=0, init=False)
    block_tables: list[list[int]] = field(default_factory=list, init=False, repr=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    stop_reason: int | str | None = field(default=None, init=False)
    timings: Timings = field(init=False)
    stop_ids: frozenset[int] = field(init=False, repr=False)
    max_total_tokens: int = field(default=0, init=False)

    # bookkeeping of the scheduler and the KV manager
    queue_key: tuple[int, int] = field(default=(0, 0), init=False, repr=False)
    num_slots: int = field(default=0, init=False, repr=False)
    num_held_blocks: int = field(default=0, init=False, repr=False)
    num_reserved_blocks: int = field(default=0, init=False, repr=False)
    num_published_blocks: int = field(default=0, init=False, repr=False)
    block_digests: list[bytes] = field(default_factory=list, init=False, repr=False)
    can_publish: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.request_id, str) or not self.request_id:
            raise RequestError(f"request_id must be a non-empty string, not {self.request_id!r}")
        if not isinstance(self.cache_salt, str):
            raise RequestError(f"request {self.request_id!r}: cache_salt must be a string, not {self.cache_salt!r}")
        if isinstance(self.priority, bool) or not isinstance(self.priority, int) or abs(self.priority) > MAX_PRIORITY:
            raise RequestError(
                f"request {self.request_id!r}: priority must be an integer within ±{MAX_PRIORITY}, not "
                f"{self.priority!r}"
            )
        self.prompt_token_ids = _checked_token_ids(self.request_id, self.prompt_token_ids)
        self.token_ids = list(self.prompt_token_ids)
        self.timings = Timings(arrival=self.arrival)
        self.prompt_logprobs = [None] if self.params.prompt_logprobs is not None else []
        self.stop_ids = frozenset(self.params.stop_token_ids)
        if not self.params.ignore_eos:
            self.stop_ids |= frozenset(self.eos_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and outputs so far."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Outputs so far."""
        return len(self.output_token_ids)

    @property
    def num_reusable_tokens(self) -> int:
        """How many of its first tokens need not be computed if the KV cache has them: logits may be wanted of them."""
        is_scoring = len(self.prompt_logprobs) not in (0, self.num_prompt_tokens)
        return len(self.prompt_logprobs) - 1 if is_scoring else self.num_tokens - 1

    @property
    def is_finished(self) -> bool:
        """True once it has a finish_reason; it holds no blocks any more."""
        return self.status is RequestStatus.FINISHED

    def append_output(self, token: SampledToken) -> None:
        """Take one sampled token as the next output."""
        self.token_ids.append(token.token_id)
        self.output_token_ids.append(token.token_id)
        self._note_logprob(token)

    def _note_logprob(self, token: SampledToken) -> None:
        if self.params.logprobs is not None and token.token_id != PENDING:
            self.output_logprobs.append(token)
            self.cumulative_logprob += token.logprob

    @property
    def has_pending(self) -> bool:
        """The last output is one that the host does not know yet."""
        return bool(self.output_token_ids) and self.output_token_ids[-1] == PENDING

    def drop_pending(self) -> None:
        """Forget an output that will never be known."""
        if self.has_pending:
            self.token_ids.pop()
            self.output_token_ids.pop()

    def resolve_pending(self, token: SampledToken) -> None:
        """The pending output is this token; there must be one."""
        self.token_ids[-1] = self.output_token_ids[-1] = token.token_id
        self._note_logprob(token)


class ScheduledSequence(NamedTuple):
    """One request's part of a step: compute `token_ids[start : start + num_tokens]`.

    Its tables cover these positions. is_sampled: the last one is the last token known, so its logits give the next.
    """

    request: Request
    start: int
    num_tokens: int
    is_sampled: bool


class ScheduledBatch(NamedTuple):
    """What one step computes: decodes (one token each) first, then prefill chunks; a request appears at most once.

    preempted: lost their blocks while this batch was made. finished: ended, for any reason, since the batch before.
    num_tokens, num_sampled: sums over `sequences`.
    """

    sequences: tuple[ScheduledSequence, ...]
    preempted: tuple[Request, ...]
    finished: tuple[Request, ...]
    num_tokens: int
    num_sampled: int

    @property
    def is_decode(self) -> bool:
        """Every sequence has one token, and is sampled."""
        return self.num_tokens == len(self.sequences) == self.num_sampled


def _checked_token_ids(request_id: str, token_ids: Sequence[int]) -> list[int]:
    """The ids as a list of plain ints; array() checks every one at C speed (8,192 ids: 0.4 ms)."""
    try:
        if isinstance(token_ids, (str, bytes, bytearray)):
            raise TypeError("a string is not a list of token ids")
        ids = array("q", token_ids).tolist()
    except (TypeError, OverflowError) as error:
        raise RequestError(f"request {request_id!r}: prompt_token_ids must be a list of integers: {error}") from error
    if ids and (min(ids) < 0 or max(ids) > MAX_TOKEN_ID):
        wrong = next(i for i in ids if not 0 <= i <= MAX_TOKEN_ID)
        raise RequestError(
            f"request {request_id!r}: prompt token id {wrong} at position {ids.index(wrong)} is not in "
            f"0..{MAX_TOKEN_ID}"
        )
    return ids

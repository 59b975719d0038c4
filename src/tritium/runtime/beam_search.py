"""Beam search: keep the `beam_width` likeliest beginnings, extend each by every token, until no better end can come.

The rules, scores included, are those of transformers' `generate(num_beams=...)` (5.23, `GenerationMixin._beam_search`).
Each beam's next step is an ordinary request for one token and its likeliest alternatives; the prefix cache gives it the
blocks of the beam that it continues, so that beams share what they have in common.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from tritium.errors import EngineError, RequestError
from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import Request
from tritium.sampling_params import MAX_LOGPROBS, BeamSearchParams, SamplingParams

Continuations = Sequence[tuple[int, float]]  # (token id, log-probability), likeliest first


class Beam(NamedTuple):
    """A beginning, or an end: its tokens beyond the prompt and the sum of their log-probabilities."""

    token_ids: tuple[int, ...]
    cumulative_logprob: float


@dataclass(kw_only=True)
class BeamSequence:
    """One result, an eos included. score: cumulative_logprob / len(token_ids) ** length_penalty."""

    token_ids: list[int]
    score: float
    cumulative_logprob: float
    text: str = ""


@dataclass(kw_only=True)
class BeamSearchOutput:
    """A prompt and its sequences, the best score first; at most `beam_width`."""

    prompt: str | None
    prompt_token_ids: list[int]
    sequences: list[BeamSequence] = field(default_factory=list)


class BeamSearch:
    """The search of one prompt. Pure bookkeeping: `beams` are to be continued, `advance` takes the continuations.

    max_tokens: how many the sequences may have. num_continuations: how many are needed of each beam.
    """

    def __init__(self, params: BeamSearchParams, eos_token_ids: Iterable[int], max_tokens: int) -> None:
        self._params = params
        self._eos = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_token_ids))
        self._max_tokens = max_tokens
        self.num_continuations = max(2, 1 + len(self._eos)) * params.beam_width
        if self.num_continuations > MAX_LOGPROBS:
            raise RequestError(
                f"beam_width={params.beam_width} with {len(self._eos)} stop ids needs {self.num_continuations} "
                f"alternatives of each token, (1 + stop ids) * beam_width; there are at most {MAX_LOGPROBS}"
            )
        self.beams = [Beam((), 0.0)]
        self._ends: list[tuple[float, Beam]] = []
        self.is_done = False

    @property
    def sequences(self) -> list[BeamSequence]:
        """What ended so far, the best first."""
        return [
            BeamSequence(token_ids=list(beam.token_ids), score=score, cumulative_logprob=beam.cumulative_logprob)
            for score, beam in self._ends
        ]

    def advance(self, continuations: Sequence[Continuations]) -> None:
        """One step: `continuations[i]` are those of `beams[i]`."""
        width = self._params.beam_width
        candidates = [
            Beam((*beam.token_ids, token_id), beam.cumulative_logprob + logprob)
            for beam, tops in zip(self.beams, continuations, strict=True)
            for token_id, logprob in tops
        ]
        candidates = sorted(candidates, key=_likeliest)[: self.num_continuations]
        self._ends += [(self._score(beam), beam) for beam in candidates[:width] if self._ends_with(beam)]
        self._ends = sorted(self._ends, key=lambda end: -end[0])[:width]
        self.beams = [beam for beam in candidates if not self._ends_with(beam)][:width]
        self.is_done = not self.beams or not self._can_improve()

    def _ends_with(self, beam: Beam) -> bool:
        return beam.token_ids[-1] in self._eos or len(beam.token_ids) >= self._max_tokens

    def _score(self, beam: Beam, length: int | None = None) -> float:
        return float(beam.cumulative_logprob / (length or len(beam.token_ids)) ** self._params.length_penalty)

    def _can_improve(self) -> bool:
        """Whether the likeliest beam could still beat the worst of enough ends; transformers' heuristics."""
        early_stopping, penalty = self._params.early_stopping, self._params.length_penalty
        if len(self._ends) < self._params.beam_width:
            return True
        if early_stopping is True:
            return False
        longest = self._max_tokens if early_stopping == "never" and penalty > 0 else None
        return self._score(self.beams[0], longest) > self._ends[-1][0]


class Door(Protocol):
    """The part of an engine thread that a search needs."""

    def submit(self, request: Request, listener: Callable[[StepOutput], None]) -> None:
        """Hand a request over."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request."""
        ...


def run_searches(searches: Mapping[str, tuple[Sequence[int], BeamSearch]], door: Door) -> None:
    """Run all searches to their end, each at its own pace, in flight together.

    searches: by a request id, the prompt and its search. Raises what a request was refused with, and `EngineError` when
    one failed; then none goes on.
    """
    arrived: SimpleQueue[StepOutput] = SimpleQueue()
    waiting: dict[str, dict[int, Continuations | None]] = {}
    running: set[str] = set()

    def continue_beams(search_id: str) -> None:
        prompt, search = searches[search_id]
        params = SamplingParams(
            max_tokens=1, temperature=0, logprobs=search.num_continuations, ignore_eos=True, detokenize=False
        )
        waiting[search_id] = dict.fromkeys(range(len(search.beams)))
        for index, beam in enumerate(search.beams):
            request_id = f"{search_id}/{index}"
            running.add(request_id)
            door.submit(Request(request_id, [*prompt, *beam.token_ids], params), arrived.put)

    try:
        for search_id in searches:
            continue_beams(search_id)
        while waiting:
            output = arrived.get()
            running.discard(output.request_id)
            if output.refusal is not None:
                raise output.refusal
            if output.finish_reason != "length":
                raise EngineError(
                    f"beam search ended early ({output.finish_reason}): {output.error or 'it was aborted'}"
                )
            search_id, _, index = output.request_id.rpartition("/")
            found, search = waiting[search_id], searches[search_id][1]
            found[int(index)] = output.logprobs[0].top_logprobs
            if all(tops is not None for tops in found.values()):
                del waiting[search_id]
                search.advance([tops for tops in found.values() if tops is not None])
                if not search.is_done:
                    continue_beams(search_id)
    finally:
        for request_id in running:
            door.abort(request_id)


def _likeliest(beam: Beam) -> float:
    return -beam.cumulative_logprob

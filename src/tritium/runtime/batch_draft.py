"""A batch in the making: the sequences taken so far, in order, and what is left of the step's budget of tokens."""

from collections.abc import Iterable

from tritium.runtime.request import Request, ScheduledBatch, ScheduledSequence


class BatchDraft:
    """budget: tokens that may still be added; the caller keeps to it."""

    def __init__(self, budget: int) -> None:
        self.budget = self._whole = budget
        self._num_sampled = 0
        self.preempted: list[Request] = []
        self._sequences: dict[Request, ScheduledSequence] = {}

    def add(self, sequence: ScheduledSequence) -> None:
        """Take one sequence; of each request only one."""
        self._sequences[sequence.request] = sequence
        self.budget -= sequence.num_tokens
        self._num_sampled += sequence.is_sampled

    def drop(self, request: Request) -> None:
        """It was preempted, perhaps after it had its place in this batch."""
        self.preempted.append(request)
        if (sequence := self._sequences.pop(request, None)) is not None:
            self.budget += sequence.num_tokens
            self._num_sampled -= sequence.is_sampled

    def seal(self, finished: Iterable[Request], *, displaced: Iterable[Request] = ()) -> ScheduledBatch:
        """The batch, together with the requests that finished, or were preempted, since the one before."""
        return ScheduledBatch(
            sequences=tuple(self._sequences.values()),
            preempted=(*displaced, *self.preempted),
            finished=tuple(finished),
            num_tokens=self._whole - self.budget,
            num_sampled=self._num_sampled,
        )

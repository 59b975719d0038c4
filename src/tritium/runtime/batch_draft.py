"""A batch in the making: the sequences taken so far, in order, and what is left of the step's budget of tokens."""

from collections.abc import Iterable

from tritium.runtime.request import Request, ScheduledBatch, ScheduledSequence


class BatchDraft:
    """budget: tokens that may still be added; the caller keeps to it."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.preempted: list[Request] = []
        self._sequences: dict[Request, ScheduledSequence] = {}

    def add(self, sequence: ScheduledSequence) -> None:
        """Take one sequence; of each request only one."""
        self._sequences[sequence.request] = sequence
        self.budget -= sequence.num_tokens

    def drop(self, request: Request) -> None:
        """It was preempted, perhaps after it had its place in this batch."""
        self.preempted.append(request)
        if (sequence := self._sequences.pop(request, None)) is not None:
            self.budget += sequence.num_tokens

    def seal(self, finished: Iterable[Request], *, displaced: Iterable[Request] = ()) -> ScheduledBatch:
        """The batch, together with the requests that finished, or were preempted, since the one before."""
        sequences = tuple(self._sequences.values())
        return ScheduledBatch(
            sequences=sequences,
            preempted=(*displaced, *self.preempted),
            finished=tuple(finished),
            num_tokens=sum(sequence.num_tokens for sequence in sequences),
            num_sampled=sum(sequence.is_sampled for sequence in sequences),
        )

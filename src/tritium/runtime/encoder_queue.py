"""Waiting encoder requests, and the batches they leave in: by turn of their call, the longest of a call first.

Long ones first, because what is left of a batch's budget is then filled by short ones. Pure Python.
"""

import heapq
import itertools
from collections.abc import Sequence
from typing import Generic, TypeVar

from tritium.runtime.encoder_request import EncoderRequest

T = TypeVar("T")
LOOKAHEAD = 64  # requests that are tried at most when one did not fit into what is left of a batch


class EncoderQueue(Generic[T]):
    """max_tokens, max_requests: of a batch. A request must fit into one by itself. `T`: what travels with a request."""

    def __init__(self, max_tokens: int, max_requests: int) -> None:
        self.max_tokens, self.max_requests = max_tokens, max_requests
        self._calls = itertools.count()
        self._waiting: list[tuple[int, int, int, EncoderRequest, T]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, requests: Sequence[tuple[EncoderRequest, T]]) -> None:
        """The requests of one call."""
        call = next(self._calls)
        for index, (request, tag) in enumerate(requests):
            heapq.heappush(self._waiting, (call, -len(request.token_ids), index, request, tag))

    def next_batch(self) -> list[tuple[EncoderRequest, T]]:
        """Remove and return what is to be computed together; empty when nothing waits."""
        batch: list[tuple[EncoderRequest, T]] = []
        passed_over: list[tuple[int, int, int, EncoderRequest, T]] = []
        left = self.max_tokens
        while self._waiting and len(batch) < self.max_requests and len(passed_over) < LOOKAHEAD and left:
            entry = heapq.heappop(self._waiting)
            length = -entry[1]
            if length > left:
                passed_over.append(entry)
                continue
            batch.append((entry[3], entry[4]))
            left -= length
        for entry in passed_over:
            heapq.heappush(self._waiting, entry)
        return batch

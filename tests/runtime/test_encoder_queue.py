"""Batches of encoder requests: within their limits, longest first, calls in turn, nothing lost."""

from hypothesis import given
from hypothesis import strategies as st

from tritium.runtime.encoder_queue import EncoderQueue
from tritium.runtime.encoder_request import EncoderRequest


def request(length: int) -> EncoderRequest:
    return EncoderRequest(token_ids=[0] * length, token_types=[0] * length, task="embed")


def lengths(batch: list[tuple[EncoderRequest, int]]) -> list[int]:
    return [len(request.token_ids) for request, _ in batch]


def test_what_is_left_of_a_batch_is_filled_by_shorter_requests() -> None:
    queue: EncoderQueue[int] = EncoderQueue(max_tokens=10, max_requests=8)
    queue.add([(request(n), n) for n in (3, 8, 6, 2, 7)])
    assert [lengths(queue.next_batch()) for _ in range(4)] == [[8, 2], [7, 3], [6], []]


def test_an_earlier_call_comes_first_however_short_its_requests_are() -> None:
    queue: EncoderQueue[int] = EncoderQueue(max_tokens=10, max_requests=2)
    queue.add([(request(1), 0), (request(2), 0)])
    queue.add([(request(9), 1)])
    assert [lengths(queue.next_batch()) for _ in range(2)] == [[2, 1], [9]]


@given(
    st.lists(st.lists(st.integers(1, 20), max_size=12), max_size=5),
    st.integers(20, 60),
    st.integers(1, 6),
)
def test_every_request_leaves_once_in_a_batch_within_the_limits(
    calls: list[list[int]], max_tokens: int, max_requests: int
) -> None:
    queue: EncoderQueue[tuple[int, int]] = EncoderQueue(max_tokens, max_requests)
    for number, call in enumerate(calls):
        queue.add([(request(length), (number, i)) for i, length in enumerate(call)])
    seen = []
    while batch := queue.next_batch():
        assert len(batch) <= max_requests
        assert sum(len(r.token_ids) for r, _ in batch) <= max_tokens
        seen += [tag for _, tag in batch]
    assert len(queue) == 0
    assert sorted(seen) == [(number, i) for number, call in enumerate(calls) for i in range(len(call))]

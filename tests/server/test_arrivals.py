"""The queue between the engine and a client: in order, and bounded when nobody takes anything out."""

import asyncio

import pytest

from tritium.errors import EngineUnavailable, RequestError
from tritium.server.arrivals import Arrivals
from tritium.wire import Output, TokenLogprob


def output(index: int, *, num_alternatives: int = 0) -> Output:
    token = TokenLogprob(index, -0.5, [(i, -1.0) for i in range(num_alternatives)])
    return Output("a", "", [index], [token] if num_alternatives else [])


def test_outputs_come_in_order_and_an_error_after_what_was_there() -> None:
    async def scenario() -> list[int]:
        arrivals, got = Arrivals(), []

        async def take() -> None:
            while True:
                got.append((await arrivals.get()).token_ids[0])

        reader = asyncio.create_task(take())
        assert arrivals.put(output(0))
        await asyncio.sleep(0)
        assert arrivals.put(output(1)) and arrivals.put(output(2))
        arrivals.end(EngineUnavailable("gone"))
        with pytest.raises(EngineUnavailable, match="gone"):
            await reader
        assert not arrivals.put(output(3))
        return got

    assert asyncio.run(scenario()) == [0, 1, 2]


def test_a_stream_that_nobody_reads_is_bounded_by_what_it_weighs_and_ends_with_an_error() -> None:
    async def scenario() -> int:
        arrivals, taken = Arrivals(max_waiting=1000), 0
        while arrivals.put(output(taken, num_alternatives=8)):
            taken += 1
        with pytest.raises(RequestError, match="was not read for some time and too much of it waits: read it faster"):
            await arrivals.get()
        assert not arrivals._waiting
        return taken

    assert asyncio.run(scenario()) == 1000 // 11 + 1  # one output, one token, nine logprobs


def test_a_stream_that_is_read_goes_on_for_ever_and_a_whole_answer_may_be_of_any_size() -> None:
    async def scenario() -> None:
        stream, whole = Arrivals(max_waiting=10), Arrivals()
        for i in range(1000):
            assert stream.put(output(i)) and whole.put(output(i))
            assert (await stream.get()).token_ids == [i]
        assert [(await whole.get()).token_ids[0] for _ in range(1000)] == list(range(1000))

    asyncio.run(scenario())

"""Block arithmetic of the KV manager against counting positions one by one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.runtime.kv_manager import KVManager
from tritium.runtime.request import Request
from tritium.sampling_params import SamplingParams


def make_manager(*, num_blocks=64, block_size=4, windows=(0,), caching=True):
    return KVManager(
        num_blocks=num_blocks,
        block_size=block_size,
        windows=windows,
        fingerprint="",
        enable_prefix_caching=caching,
    )


def make_request(num_tokens, request_id="r"):
    return Request(request_id, list(range(num_tokens)), SamplingParams())


def compute(manager, request, num_tokens):
    """Grow to `num_tokens` and pretend that they were computed."""
    manager.trim(request)
    manager.grow(request, num_tokens)
    request.num_computed_tokens = num_tokens
    manager.publish(request)


@given(
    num_tokens=st.integers(1, 40),
    chunks=st.lists(st.integers(1, 9), min_size=40, max_size=40),
    block_size=st.integers(1, 5),
    windows=st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple),
)
@settings(max_examples=200, deadline=None)
def test_a_request_never_holds_more_than_its_peak_and_always_all_it_can_see(num_tokens, chunks, block_size, windows):
    manager = make_manager(num_blocks=200, block_size=block_size, windows=windows)
    request = make_request(num_tokens)
    manager.open(request, manager.lookup(request))
    peak = manager.peak_blocks(num_tokens, max(chunks))
    start = request.num_computed_tokens  # a window of 1 needs no key of the past: all but the last are "cached"
    for chunk in chunks:
        if start == num_tokens:
            break
        end = min(num_tokens, start + chunk)
        needed = manager.missing_blocks(request, end)
        manager.trim(request)
        assert manager.missing_blocks(request, end) == needed
        assert manager.reach(request, needed) >= end and (needed == 0 or manager.reach(request, needed - 1) < end)
        compute(manager, request, end)
        assert manager.pool.num_used == request.num_held_blocks <= peak
        for window, table in zip(windows, request.block_tables, strict=True):
            assert len(table) * block_size == request.num_slots >= end
            visible = range(max(0, start - window + 1) if window else 0, end)
            assert all(table[position // block_size] != 0 for position in visible)
        start = end
    manager.close(request)
    assert manager.pool.num_used == 0


@pytest.mark.parametrize(("window", "expected"), [(0, 10), (1, 1), (4, 2), (5, 2), (6, 3)])
def test_the_peak_of_a_decode_is_what_its_window_can_touch(window, expected):
    assert make_manager(windows=(window,)).peak_blocks(40, chunk=1) == expected


def test_a_windows_blocks_become_null_and_free_and_stay_hittable():
    manager = make_manager(block_size=2, windows=(3,))
    request = make_request(9)
    manager.open(request, manager.lookup(request))
    compute(manager, request, 8)
    first = list(request.block_tables[0])
    compute(manager, request, 9)
    assert request.block_tables[0][:3] == [0, 0, 0] and request.block_tables[0][3] == first[3]
    assert manager.pool.num_used == request.num_held_blocks == 2
    assert all(block in manager.cache for block in first)


def test_at_least_one_token_is_always_computed():
    manager = make_manager(block_size=2)
    request = make_request(4, "a")
    manager.open(request, manager.lookup(request))
    compute(manager, request, 4)
    manager.close(request)
    assert manager.lookup(make_request(4, "b")).num_blocks == 1
    assert manager.lookup(make_request(5, "c")).num_blocks == 2


def test_two_requests_that_compute_the_same_block_both_keep_theirs():
    manager = make_manager(block_size=2)
    twins = [make_request(4, "a"), make_request(4, "b")]
    for twin in twins:
        manager.open(twin, manager.lookup(twin))
    for twin in twins:
        compute(manager, twin, 4)
    tables = [twin.block_tables[0] for twin in twins]
    assert not set(tables[0]) & set(tables[1])
    assert manager.lookup(make_request(5, "c")).tables == [tables[0]]
    mine = list(tables[0])
    manager.close(twins[1])
    assert manager.lookup(make_request(5, "c")).tables == [mine]


def test_the_end_of_a_chain_is_evicted_before_its_beginning():
    manager = make_manager(num_blocks=5, block_size=2)
    request = make_request(8, "a")
    manager.open(request, manager.lookup(request))
    compute(manager, request, 8)
    manager.close(request)
    hits = []
    for _ in range(4):
        manager.pool.allocate(1)
        hits.append(manager.lookup(make_request(9, "b")).num_blocks)
    assert hits == [3, 2, 1, 0]


def test_without_prefix_caching_nothing_is_published():
    manager = make_manager(block_size=2, caching=False)
    request = make_request(8, "a")
    manager.open(request, manager.lookup(request))
    compute(manager, request, 8)
    assert len(manager.cache) == 0 and request.block_digests == []
    assert manager.lookup(make_request(8, "b")).num_blocks == 0

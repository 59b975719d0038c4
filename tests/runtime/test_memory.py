"""The KV cache's size from given numbers, and what a person is told."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.config import RuntimeConfig
from tritium.engine.plan import KVGroup
from tritium.errors import EngineError, OutOfMemory
from tritium.runtime.kv_cache import KVCache, block_bytes
from tritium.runtime.memory import blocks_needed, gpu_out_of_memory, longest_sequence, plan_memory

FULL = KVGroup(layers=(0, 1), window=0, num_kv_heads=2, head_size=8, dtype="float32")
WINDOW = KVGroup(layers=(2, 3), window=64, num_kv_heads=2, head_size=8, dtype="float32")
BLOCK = 2 * 2 * 2 * 16 * 8 * 4  # layers, K and V, heads, tokens, head size, bytes


def plan(groups=(FULL,), *, available=10**9, weights=0, model_len=1024, **config):
    return plan_memory(
        groups,
        RuntimeConfig(**config),
        engine_max_model_len=model_len,
        weights_bytes=weights,
        arena_bytes=0,
        available_bytes=available,
    )


def test_the_cache_takes_sixty_percent_of_what_the_weights_leave():
    memory = plan(available=100 * BLOCK + 5000, weights=5000, model_len=256)
    assert memory.num_blocks == 60
    assert memory.num_tokens == 59 * 16
    assert memory.num_sequences == 59 // 16


def test_given_memory_is_taken_as_given():
    assert plan(kv_cache_memory=70 * BLOCK).num_blocks == 70


def test_the_cache_is_never_larger_than_all_sequences_could_fill():
    memory = plan(max_num_seqs=3, model_len=160)
    assert memory.num_blocks == 1 + 3 * 10
    assert memory.num_sequences == 3


def test_max_model_len_shrinks_with_one_warning(caplog):
    with caplog.at_level(logging.WARNING, "tritium"):
        memory = plan(kv_cache_memory=21 * BLOCK)
    assert memory.max_model_len == 20 * 16
    [record] = caplog.records
    assert "from 1024 to 320 tokens" in record.getMessage()


def test_a_shorter_limit_of_the_user_holds_without_a_warning(caplog):
    assert plan(kv_cache_memory=21 * BLOCK, max_model_len=300).max_model_len == 300
    assert plan(max_model_len=10**6).max_model_len == 1024
    assert caplog.records == []


def test_too_little_for_one_useful_sequence_is_refused_with_the_numbers():
    with pytest.raises(OutOfMemory, match=r"holds 64 tokens, not one sequence of 128.*available 1.00 GB"):
        plan(kv_cache_memory=5 * BLOCK)


def test_a_model_larger_than_the_memory_is_refused_with_the_numbers():
    with pytest.raises(OutOfMemory, match=r"does not fit.*available 1.0 MB, weights 2.0 MB"):
        plan(available=10**6, weights=2 * 10**6)


def test_more_cache_than_there_is_memory_is_refused():
    with pytest.raises(OutOfMemory, match="kv_cache_memory does not fit"):
        plan(available=100 * BLOCK, kv_cache_memory=200 * BLOCK)


def test_a_window_needs_fewer_blocks_and_allows_longer_sequences():
    assert blocks_needed([WINDOW], 10_000, 16, 1) < blocks_needed([FULL], 10_000, 16, 1)
    assert longest_sequence([WINDOW], 10, 10_000, 16) == 10_000
    assert longest_sequence([FULL], 10, 10_000, 16) == 160
    assert longest_sequence([FULL, WINDOW], 12, 10_000, 16) == 112


@given(st.integers(0, 300), st.integers(1, 2000))
def test_the_longest_sequence_fits_and_one_block_more_does_not(num_blocks, limit):
    groups = [FULL, WINDOW]
    longest = longest_sequence(groups, num_blocks, limit, 16)
    assert longest == 0 or blocks_needed(groups, longest, 16, 1) <= num_blocks
    assert longest == limit or blocks_needed(groups, min(longest + 16, limit), 16, 1) > num_blocks


def test_the_description_counts_tokens_and_sequences():
    text = plan(kv_cache_memory=65 * BLOCK, model_len=256).describe()
    assert "1,024 tokens = 4 sequences of 256 tokens" in text


def test_layers_of_all_groups_share_blocks_and_never_overlap():
    cache = KVCache([FULL, WINDOW], 5, 16)
    assert cache.storage.shape == (5, block_bytes([FULL, WINDOW], 16)) == (5, BLOCK)
    for layer in range(4):
        assert cache.layer(layer).shape == (5, 2, 2, 16, 8)
    cache.storage.zero_()
    for group in ([0, 1], [2, 3]):
        for layer in group:
            cache.layer(layer).fill_(layer + 1)
        assert all((cache.layer(layer) == layer + 1).all() for layer in group)
    assert cache.layer(0).data_ptr() == cache.layer(2).data_ptr() == cache.storage.data_ptr()


def test_groups_of_unequal_layers_get_blocks_of_the_larger_ones_size():
    small = KVGroup(layers=(1,), window=0, num_kv_heads=1, head_size=8, dtype="bfloat16")
    cache = KVCache([FULL, small], 3, 16)
    cache.storage.zero_()
    cache.layer(1).fill_(2)
    assert cache.storage[2].count_nonzero() == 2 * 16 * 8  # bf16 2.0 has one byte of zeros
    assert cache.layer(1).stride(0) * 2 == BLOCK


def test_memory_that_the_system_refuses_is_said_with_its_size():
    with pytest.raises(OutOfMemory, match=f"refuses {BLOCK * 2**40:,} bytes"):
        KVCache([FULL], 2**40, 16)


def test_a_layer_without_a_group_is_a_damaged_plan():
    with pytest.raises(EngineError, match="attention layer 7"):
        KVCache([FULL], 2, 16).layer(7)


def test_a_gpu_that_is_full_is_named_with_what_the_engine_takes_and_what_to_give_less():
    error = gpu_out_of_memory(
        "running a step", "an H200", 3 * 10**8, 150 * 10**9, "weights 8.03 GB, KV cache 130.00 GB"
    )
    for part in ("running a step ran out of memory on an H200", "300.0 MB of 150.00 GB are free", "KV cache 130.00 GB"):
        assert part in str(error)
    assert isinstance(error, OutOfMemory) and "give less kv_cache_memory, less max_num_batched_tokens" in str(error)

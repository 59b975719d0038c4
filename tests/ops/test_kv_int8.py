"""How a KV cache in int8 lies in memory."""

import pytest
import torch

from tritium import ops
from tritium.ops.kv_int8 import parts_of, quantize_cache
from tritium.ops.quantized import quantize_rows


def test_of_a_block_and_head_come_all_integers_and_then_all_scales() -> None:
    rows = torch.randn(5, 2, 3, 4, 7)
    cache = quantize_cache(rows)
    integers, scales = quantize_rows(rows[1, 0, 2])
    wanted = torch.cat((integers.flatten(), scales.flatten().view(torch.int8)))
    assert cache.shape == (5, 2, 3, 4, 11) and torch.equal(cache[1, 0, 2].flatten(), wanted)


@pytest.mark.parametrize("block_size", [1, 4])
def test_storing_tokens_one_by_one_gives_the_cache_that_is_quantised_as_a_whole(block_size: int) -> None:
    k, v = torch.randn(8, 3, 6), torch.randn(8, 3, 6)
    cache = torch.zeros(8 // block_size, 4, 3, block_size, 10, dtype=torch.int8)[:, 1:3]  # inside wider blocks
    for slot in torch.randperm(8):
        ops.kv_store(k[slot, None], v[slot, None], cache, slot[None])
    whole = torch.stack((k, v), 1).unflatten(0, (-1, block_size)).permute(0, 2, 3, 1, 4)
    assert torch.equal(cache, quantize_cache(whole))


def test_its_parts_are_views_that_can_be_written() -> None:
    cache = torch.zeros(2, 2, 1, 4, 10, dtype=torch.int8)
    integers, scales = parts_of(cache)
    integers[1, 0, 0, 3], scales[1, 0, 0, 3] = 5, 6
    assert cache[1, 0, 0].flatten().tolist() == [0] * 18 + [5] * 6 + [0] * 12 + [6] * 4
    assert int(cache.count_nonzero()) == 10

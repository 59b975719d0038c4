"""Prompts' attention by groups of warps: right wherever chunks begin, however many there are. Needs a Hopper GPU."""

from typing import Any

import pytest
import torch

from tritium.ops.fp8 import FP8
from tritium.ops.kv_int8 import quantize_cache
from tritium.ops.quantized import quantize_rows
from tritium.testing.attention_problems import Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
# new tokens, context: whole prompts, chunks that begin anywhere, some of a few rows, single tokens before them
MIXED = [(1, 50), (1, 700), (2, 2), (5, 133), (130, 131), (257, 1000), (700, 700), (33, 1200), (128, 256), (64, 320)]
CACHES = [
    *((torch.bfloat16, cache) for cache in (FP8, torch.bfloat16, torch.int8)),
    *((torch.float16, cache) for cache in (torch.float16, FP8, torch.int8)),
]


def compute(args: dict[str, Any], cache_dtype: torch.dtype) -> torch.Tensor:
    from tritium.kernels.gpu import attention, attention_hopper
    from tritium.kernels.kernel import LaunchContext

    cache = args["cache_layer"]
    args["cache_layer"] = quantize_cache(cache) if cache_dtype == torch.int8 else cache.to(cache_dtype)
    args = {name: a.cuda() if isinstance(a, torch.Tensor) else a for name, a in args.items()}
    num_sequences, num_tokens, _, num_decodes = args["batch_counts"].tolist()
    context = LaunchContext(
        num_decodes=num_decodes,
        num_prefills=num_sequences - num_decodes,
        num_prefill_tokens=num_tokens - num_decodes,
        longest_prefill=max(args["context_lens_S"][num_decodes:num_sequences].tolist()),
    )
    out = torch.full_like(args["q_TNH"], float("nan"))
    assert attention_hopper.fits(args, out)
    thunk = attention.bind(args, [out], context)
    for _ in range(2):  # the counter of blocks begins anew
        thunk()
    return out.cpu()


def drawn(
    chunks: list[tuple[int, int]], shape: tuple[int, int, int], dtype: torch.dtype, cache: torch.dtype
) -> Problem:
    problem = Problem.draw([context for _, context in chunks], *shape, dtype)
    for part in (problem.k, problem.v):
        if cache == FP8:
            part[:] = [x.to(FP8).to(dtype) for x in part]
        if cache == torch.int8:  # kept in fp32, so that quantising them again finds the same integers
            part[:] = [integers * scales for integers, scales in map(quantize_rows, part)]
    return problem


@pytest.mark.parametrize(("dtype", "cache"), CACHES, ids=str)
@pytest.mark.parametrize("shape", [(8, 2, 128), (4, 4, 128), (3, 1, 256), (4, 4, 256)], ids=str)
@pytest.mark.parametrize("page", [16, 64])
def test_a_mixed_batch_is_right(shape: tuple[int, int, int], dtype: torch.dtype, cache: torch.dtype, page: int) -> None:
    problem = drawn(MIXED, shape, dtype, cache)
    out = problem.run(lambda args: compute(args, cache), list(enumerate(MIXED)), block_size=page)
    for i, chunk in enumerate(MIXED):
        want = problem.dense(i, chunk, torch.float32)
        most = 0.006 if cache == torch.int8 else 0.004  # probabilities are rounded to bf16, and keys that were in int8
        assert (out[i].float() - want).norm() <= most * want.norm(), (chunk, dtype)


def test_more_blocks_than_places_and_a_scratch_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    from tritium.kernels.gpu import scratch

    chunks = [(1 + 40 * i % 190, 200 + 11 * i) for i in range(60)]
    problem = drawn(chunks, (16, 4, 128), torch.bfloat16, FP8)
    for num_bytes in (scratch.HOPPER_BYTES, 1 << 20):
        monkeypatch.setattr(scratch, "HOPPER_BYTES", num_bytes)
        order = sorted(range(60), key=lambda i: chunks[i][0] > 1)
        out = problem.run(lambda args: compute(args, FP8), [(i, chunks[i]) for i in order], block_size=64)
        for i, got in zip(order, out, strict=True):
            want = problem.dense(i, chunks[i], torch.float32)
            assert (got.float() - want).norm() <= 0.004 * want.norm(), chunks[i]


def test_what_is_not_a_number_stays_so() -> None:
    problem = drawn([(300, 300)], (2, 1, 128), torch.bfloat16, FP8)
    problem.k[0][200, 0, 5] = float("nan")
    (out,) = problem.run(lambda args: compute(args, FP8), [(0, (300, 300))], block_size=64)
    assert out[:200].isfinite().all() and out[200:].isnan().all()

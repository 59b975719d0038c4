"""Decode attention over a cache in int8: right for few sequences and many, whatever the sizes of tokens beside another.

On a GPU in CUDA C++ (csrc/decode_bytes.cu), else Triton's kernel by its interpreter.
"""

from itertools import product
from typing import Any

import pytest
import torch

from tritium.kernels.kernel import LaunchContext
from tritium.ops.kv_int8 import quantize_cache
from tritium.ops.quantized import quantize_rows
from tritium.testing.attention_problems import Problem

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
DTYPES = (torch.float16, *((torch.bfloat16,) if HAS_GPU else ()))
SHAPES = [(8, 2, 128), (2, 2, 256), (16, 2, 64), (32, 4, 128), (3, 3, 128)] if HAS_GPU else [(4, 2, 64)]
COUNTS = (5, 150) if HAS_GPU else (3,)  # sequences: contexts read in parts, and whole


def compute(problem: Problem, device: torch.device, *, page: int, **tactics: Any) -> torch.Tensor:
    """Each sequence's last token, over the whole of it."""
    from tritium.kernels.gpu import attention

    chunks = [(i, (1, len(q))) for i, q in enumerate(problem.q)]
    args = problem.args(chunks, block_size=page)
    args["cache_layer"] = quantize_cache(args["cache_layer"])
    args["q_TNH"] = args["q_TNH"].to(problem.q[0].dtype)
    args = {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in args.items()}
    assert attention.fits_bytes_kernel(args) == HAS_GPU
    out = torch.full_like(args["q_TNH"], 77.0)
    attention.bind(args, [out], LaunchContext(num_decodes=len(chunks)), **tactics)()
    return out.cpu()


def drawn(count: int, shape: tuple[int, int, int], dtype: torch.dtype, **extra: Any) -> Problem:
    """Tokens whose keys and values are up to a hundred times larger and smaller than their neighbours'."""
    lengths = [1 + 37 * i % 200 for i in range(count)]
    problem = Problem.draw(lengths, *shape, dtype, **extra)
    for part, most in ((problem.k, 0.5), (problem.v, 2.0)):
        part[:] = [x.float() * 10 ** (torch.rand(len(x), 1, 1) * 2 * most - most) for x in part]
        part[:] = [integers * scales for integers, scales in map(quantize_rows, part)]
    return problem


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_error_is_at_most_twice_that_of_low_precision(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    slopes = torch.rand(shape[0]) / 4
    layouts = ((64, 0, {}), (16, 4, {"window": 40, "softcap": 20.0}), (8, 6, {"slopes": slopes}))
    for count, (page, blocks, extra) in product(COUNTS, layouts):
        problem = drawn(count, shape, dtype, **extra)
        out = compute(problem, device, page=page, blocks=blocks)
        for i in range(0, count, 1 + count // 25):
            chunk, row = (1, len(problem.q[i])), out[i]
            exact, low = (problem.dense(i, chunk, arithmetic)[0] for arithmetic in (torch.float64, dtype))
            limit = max((low - exact).norm().item(), (exact.to(dtype) - exact).norm().item())
            assert (row - exact).norm() <= 2 * limit + torch.finfo(dtype).eps * exact.norm(), (i, chunk)


def test_what_is_not_a_number_reaches_those_who_see_it_and_nobody_else(device: torch.device) -> None:
    problem = Problem.draw([100] * 4, 8, 2, 128 if HAS_GPU else 32, torch.float16, window=40)
    clean = compute(problem, device, page=16)
    problem.v[0][59, 0, 3] = float("nan")  # the window hides it
    problem.k[1][70, 0, 5] = float("nan")
    problem.v[2][60, 1, 5] = float("inf")
    problem.q[3][99, 2, 7] = float("nan")
    out = compute(problem, device, page=16)
    is_bad = torch.zeros(4, 8, dtype=torch.bool)
    is_bad[1, :4] = is_bad[2, 4:] = is_bad[3, 2] = True
    assert out[is_bad].isnan().all() and torch.equal(out[~is_bad], clean[~is_bad])

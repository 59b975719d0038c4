"""Paged attention on a GPU: right in every form, and blind to what no query sees (padding and stale slots are NaN)."""

from typing import Any

import pytest
import torch

from tritium.kernels.gpu.tactics import PAGED_ATTENTION
from tritium.testing.attention_problems import Problem, num_leading_singles

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if HAS_GPU else ()))
MIXED = [(1, 1), (1, 130), (1, 64), (1, 65), (3, 3), (17, 150), (70, 70), (1, 90), (66, 129)]
SHAPES = [(8, 2, 64), (4, 4, 80), (6, 3, 96), (2, 2, 256), (16, 2, 128), (3, 1, 16), (12, 12, 64)]


def compute(args: dict[str, Any], device: torch.device, *, is_fixed: bool = False, **tactics: Any) -> torch.Tensor:
    from tritium.kernels.gpu import attention, attention_fixed
    from tritium.kernels.kernel import LaunchContext

    args = {n: a.to(device) if isinstance(a, torch.Tensor) else a for n, a in args.items()}
    num_sequences, num_tokens, _, num_decodes = args["batch_counts"].tolist()
    context = LaunchContext(
        num_decodes=num_decodes,
        num_prefills=num_sequences - num_decodes,
        num_prefill_tokens=num_tokens - num_decodes,
        num_prefill_keys=sum(args["context_lens_S"][num_decodes:num_sequences].tolist()),
        longest_prefill=max(args["context_lens_S"][num_decodes:num_sequences].tolist(), default=0),
    )
    out = torch.full_like(args["q_TNH"], 77.0)
    if is_fixed:
        attention_fixed.bind(args, [out], context)()
    else:
        attention.bind(args, [out], context, **tactics)()
    return out.cpu()


def check(problem: Problem, device: torch.device, chunks: list, *, block_size: int, **tactics: Any) -> None:
    problem.check(problem.run(lambda args: compute(args, device, **tactics), chunks, block_size=block_size), chunks)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mixed_batch_is_right(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    for i, (window, softcap) in enumerate([(0, 0.0), (5, 20.0), (70, 0.0)]):
        if dtype != torch.float32 and i % 2 and not HAS_GPU:
            continue
        problem = Problem.draw([c for _, c in MIXED], *shape, dtype, window=window, softcap=softcap)
        for is_fixed in (False, True):
            check(problem, device, list(enumerate(MIXED)), block_size=(16, 8, 64)[i], is_fixed=is_fixed)


@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("shape", [(4, 4, 64), (6, 3, 96)], ids=str)
def test_alibi_adds_each_heads_slope_times_the_distance(
    shape: tuple[int, int, int], is_fixed: bool, device: torch.device
) -> None:
    slopes = torch.tensor([2.0 ** (-i - 1) for i in range(shape[0])])
    problem = Problem.draw([c for _, c in MIXED], *shape, torch.float32, slopes=slopes)
    check(problem, device, list(enumerate(MIXED)), block_size=16, is_fixed=is_fixed)


@pytest.mark.parametrize("form", ["vector", "dot"])
@pytest.mark.parametrize("shape", [(4, 4, 64), (8, 8, 256)], ids=str)
def test_both_forms_of_decode_agree_with_the_textbook(
    form: str, shape: tuple[int, int, int], device: torch.device
) -> None:
    from tritium.kernels.gpu.attention import DecodeTactic

    chunks = list(enumerate([(1, 1), (1, 77), (1, 160)]))
    problem = Problem.draw([c for _, (_, c) in chunks], *shape, torch.float16)
    tactic = DecodeTactic(form=form, tile=32, num_warps=4, num_stages=2)
    check(problem, device, chunks, block_size=16, decode=tactic)


@pytest.mark.parametrize("tactic", PAGED_ATTENTION[3:], ids=str)
def test_every_split_and_the_other_kernel_for_prompts_are_right(tactic: dict[str, Any], device: torch.device) -> None:
    shape = (8, 2, 128) if HAS_GPU else (4, 2, 32)
    problem = Problem.draw([c for _, c in MIXED], *shape, torch.float16)
    check(problem, device, list(enumerate(MIXED)), block_size=16, **tactic)


def test_more_sequences_than_are_split_are_right_too(device: torch.device) -> None:
    chunks = [(i % 3, (1, 1 + 7 * i % 60)) for i in range(70)]
    problem = Problem.draw([60, 60, 60], 16, 8, 32, torch.float16)
    assert num_leading_singles(chunks) * 8 > 264
    check(problem, device, chunks, block_size=16)


def test_a_later_tokens_nan_stays_with_those_who_see_it_where_bits_do_not_depend_on_company(
    device: torch.device,
) -> None:
    problem = Problem.draw([40], 4, 2, 32, torch.float16)

    def answers() -> torch.Tensor:
        return problem.run(lambda args: compute(args, device, is_fixed=True), problem.whole())[0]

    clean = answers()
    problem.v[0][30, 1, 5] = float("nan")
    spoilt = answers()
    assert torch.equal(spoilt[:30], clean[:30]) and torch.equal(spoilt[:, :2], clean[:, :2])
    assert spoilt[30:, 2:].isnan().all()

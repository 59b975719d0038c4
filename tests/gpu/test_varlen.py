"""Attention of packed texts on a GPU: right against a textbook, and in our own kernel a text's bits are its own."""

import itertools
from typing import Any

import pytest
import torch

from tritium.errors import KernelError
from tritium.testing.packed_attention import draw, limit, textbook

pytestmark = pytest.mark.gpu
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTHS = [1, 70, 3, 64, 65, 128, 30]
SHAPES = [(4, 4, 64), (8, 2, 40), (3, 1, 16), (2, 2, 128)]  # query heads, kv heads, head size
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if torch.cuda.is_available() else ()))


def compute(args: dict[str, Any], device: torch.device, kernel: str = "varlen", spare: int = 0) -> torch.Tensor:
    """spare: sequences that the kernel is told of and the batch does not have, as a graph for a bucket is."""
    from tritium.kernels.kernel import LaunchContext, resolve

    num_sequences, num_tokens = args["batch_counts"].tolist()[:2]
    starts = args["cu_seqlens_q"].tolist()
    longest = max(b - a for a, b in itertools.pairwise(starts))
    padded = torch.tensor([*starts[: num_sequences + 1], *[num_tokens] * spare], dtype=torch.int32)
    whole = args["q_TNH"]._base.to(device)  # q, k and v are parts of it
    moved = {
        n: whole.as_strided(args[n].shape, args[n].stride(), args[n].storage_offset())
        for n in ("q_TNH", "k_TKH", "v_TKH")
    }
    moved |= {"cu_seqlens_q": padded.to(device), "batch_counts": args["batch_counts"].to(device)}
    out = torch.full(args["q_TNH"].shape, 77.0, dtype=args["q_TNH"].dtype, device=device)
    context = LaunchContext(
        num_prefills=num_sequences + spare, num_prefill_tokens=len(out), longest_prefill=longest + 9 * (spare > 0)
    )
    resolve(f"tritium.kernels.gpu.{kernel}:bind")(args | moved, [out], context)()
    return out.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("shape", "softcap"), [*((shape, 0.0) for shape in SHAPES), (SHAPES[1], 5.0)])
def test_it_is_within_twice_the_error_of_the_textbook_in_low_precision(
    dtype: torch.dtype, shape: tuple[int, int, int], softcap: float, device: torch.device
) -> None:
    args = draw(LENGTHS, *shape, dtype) | {"softcap": softcap}
    exact = textbook(args, torch.float64)
    for spare in (0, 2):
        found = compute(args, device, spare=spare)
        error = (found[: sum(LENGTHS)].double() - exact).square().mean().sqrt()
        assert error <= limit(args, exact)
        assert bool((found[sum(LENGTHS) :] == 77.0).all())


@NEEDS_GPU
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES)
def test_so_is_torchs_flash_attention(dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> None:
    args = draw([*LENGTHS, 500], *shape, dtype)
    exact = textbook(args, torch.float64)
    for spare in (0, 2):
        found = compute(args, device, "varlen_flash", spare)[: len(exact)]
        assert (found.double() - exact).square().mean().sqrt() <= limit(args, exact)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
def test_a_texts_bits_do_not_depend_on_the_batch(dtype: torch.dtype, device: torch.device) -> None:
    args = draw(LENGTHS, *SHAPES[0], dtype)
    whole, starts = compute(args, device), args["cu_seqlens_q"].tolist()
    for i, length in enumerate(LENGTHS):
        alone = draw([length], *SHAPES[0], dtype)
        for name in ("q_TNH", "k_TKH", "v_TKH"):
            alone[name][:length] = args[name][starts[i] : starts[i + 1]]
        assert torch.equal(compute(alone, device)[:length], whole[starts[i] : starts[i + 1]]), length


def test_a_text_whose_numbers_are_not_finite_spoils_no_other(device: torch.device) -> None:
    args = draw(LENGTHS, *SHAPES[0], torch.float32)
    expected = compute(args, device)
    args["v_TKH"][5] = float("nan")  # of the second text
    found = compute(args, device)
    assert torch.equal(found[:1], expected[:1]) and torch.equal(found[71 : sum(LENGTHS)], expected[71 : sum(LENGTHS)])
    assert found[1:71].isnan().all()


def test_counts_of_another_type_are_refused_by_name(device: torch.device) -> None:
    args = draw([3], *SHAPES[0], torch.float32)
    with pytest.raises(KernelError, match=r"counts of varlen_attention are int32, not torch.int64"):
        compute(args | {"batch_counts": args["batch_counts"].long()}, device)

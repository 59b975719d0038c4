"""Every spelling against the reference of its op: bit for bit, a rounding apart, or within the bound it lists."""

import inspect

import pytest
import torch

from tritium import ops

CASES = [pytest.param(op, s, id=f"{op.name}-{s.name}") for op in ops.OPS for s in op.spellings]


def _three(op: ops.Op, spelling: ops.Spelling, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Each result as it is written, as the reference gives it, and as the reference gives it for the inputs in fp32."""
    tensors = spelling.example(dtype)
    fp32 = [t if t is None or not t.is_floating_point() else t.float() for t in tensors]
    names = [n for n, p in inspect.signature(spelling.fn).parameters.items() if p.kind is not p.KEYWORD_ONLY]
    written = spelling.fn(*tensors, **spelling.attributes)
    reference, exact = (
        op.reference(**dict(zip(names, values, strict=True)), **spelling.attributes, **spelling.binds)
        for values in (tensors, fp32)
    )
    return list(zip(*(x if isinstance(x, tuple) else (x,) for x in (written, reference, exact)), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "spelling"), CASES)
def test_a_spelling_gives_the_reference_within_its_bound(
    op: ops.Op, spelling: ops.Spelling, dtype: torch.dtype
) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        for written, reference, exact in _three(op, spelling, dtype):
            assert written.dtype == reference.dtype and written.shape == reference.shape
            if spelling.fp32_bound:
                slack = spelling.fp32_bound * torch.finfo(torch.float32).eps * exact.abs().max()
                assert ((exact - slack).to(dtype) <= written).all() and (written <= (exact + slack).to(dtype)).all()
            elif spelling.bound == 0.0 and dtype == torch.bfloat16:
                assert torch.equal(written, reference)
            difference = (written.double() - reference.double()).abs().max()
            limit = (spelling.bound or 1.0) * torch.finfo(dtype).eps * reference.double().abs().max()
            assert difference <= limit, f"{difference / limit:.2f} times the bound"

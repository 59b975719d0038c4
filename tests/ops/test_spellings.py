"""Every spelling against the reference of its op: bit for bit, or within the bound it lists."""

import inspect

import pytest
import torch

from tritium import ops

CASES = [pytest.param(op, s, id=f"{op.name}-{s.name}") for op in ops.OPS for s in op.spellings]


def _both(op: ops.Op, spelling: ops.Spelling, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each result as it is written, and as the reference gives it."""
    tensors = spelling.example(dtype)
    names = [n for n, p in inspect.signature(spelling.fn).parameters.items() if p.kind is not p.KEYWORD_ONLY]
    by_name = dict(zip(names, tensors, strict=True))
    written = spelling.fn(*tensors, **spelling.attributes)
    reference = op.reference(**by_name, **spelling.attributes, **spelling.binds)
    return list(zip(*(x if isinstance(x, tuple) else (x,) for x in (written, reference)), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "spelling"), CASES)
def test_a_spelling_gives_the_reference_within_its_bound(
    op: ops.Op, spelling: ops.Spelling, dtype: torch.dtype
) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        for written, reference in _both(op, spelling, dtype):
            assert written.dtype == reference.dtype and written.shape == reference.shape
            if spelling.bound == 0.0 and dtype == torch.bfloat16:
                assert torch.equal(written, reference)
            difference = (written.double() - reference.double()).abs().max()
            limit = (spelling.bound or 1.0) * torch.finfo(dtype).eps * reference.double().abs().max()
            assert difference <= limit, f"{difference / limit:.2f} times the bound"

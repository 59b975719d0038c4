"""The compiled kernels on an older instruction set: the portable code paths, which this machine would not take."""

import ctypes

import pytest
import torch

from tritium.kernels.cpu import library
from tritium.kernels.kernel import resolve
from tritium.kernels.table import KERNELS
from tritium.testing.isa_levels import LEVELS, compiled
from tritium.testing.kernel_cases import CASES, run

# In bf16 by AMX or dot products, where there are:
OWN_BITS = ("cpu.linear", "cpu.varlen_attention", "cpu.moe", "cpu.experts")


@pytest.fixture(scope="module")
def older() -> ctypes.CDLL:
    return compiled(LEVELS["avx2"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_an_older_instruction_set_gives_the_same_bits(
    older: ctypes.CDLL, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    num_compared = 0
    for case in CASES:
        for kernel in KERNELS:
            if kernel.backend != "cpu" or kernel.op != case.op:
                continue
            args = case.make(9, dtype)
            out_shape = resolve("tritium.ops:target")(case.op)(**args)
            native = run(kernel, args, tuple(out_shape.shape), out_shape.dtype)
            with monkeypatch.context() as patch:
                patch.setattr(library, "_load", lambda: (older, ""))
                other = run(kernel, args, tuple(out_shape.shape), out_shape.dtype)
            largest = 2**-7 * native.abs().max() if dtype == torch.bfloat16 and kernel.name in OWN_BITS else 0
            assert (native - other).abs().max() <= largest, f"{kernel.name} {case.name}: {(native - other).abs().max()}"
            num_compared += 1
    assert num_compared >= sum(kernel.backend == "cpu" for kernel in KERNELS)

"""activation_fp8, gated_activation_fp8 and activation_pair_fp8 of wide rows in CUDA C++ (csrc/activation_fp8.cu).

Triton keeps a row of 14,336 in so many registers that an SM has one at a time, which loads, sums up and stores in turn.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tritium.kernels.gpu.cuda import can_convert_fp8, launcher
from tritium.kernels.kernel import Thunk

_KINDS = ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu")
_LOADS = 4  # of eight numbers a thread
_PAIR_LOADS = 5  # the same of GPT-J's pair: 512 threads for its 20,480 numbers, 8 to 10 % faster than 640 (H200)
_MOST_THREADS = 1024


def fits(
    args: Mapping[str, Any],
    x: torch.Tensor,
    other: torch.Tensor | None,
    outputs: Sequence[torch.Tensor],
    *,
    first: torch.Tensor | None = None,
) -> bool:
    """16-byte rows of 16-bit numbers, at most `_LOADS` loads a thread; into e4m3, a scale a row. first: see `bind`."""
    if outputs[0].dtype != torch.float8_e4m3fn or args.get("scale") is not None:
        return False
    tensors = [t for t in (x, other, first) if t is not None]
    is_aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for t in tensors if t.dim() == 2)
    is_aligned = is_aligned and all(t.data_ptr() % 16 == 0 for t in tensors)
    is_known = all(t.dtype == x.dtype for t in tensors) and x.dtype in (torch.bfloat16, torch.float16)
    width = outputs[0].shape[1]
    is_even = x.shape[1] % 8 == 0 and width % 8 == 0
    return is_aligned and is_known and is_even and width <= 8 * _LOADS * _MOST_THREADS and can_convert_fp8(x.device)


def bind(
    x: torch.Tensor,
    other: torch.Tensor | None,
    outputs: Sequence[torch.Tensor],
    kind: str,
    *,
    first: torch.Tensor | None = None,
) -> Thunk:
    """Rows and scales into outputs. other: what the activation is multiplied by, if it is a matrix; else a bias. first:
    rows that stand as they are before the activation's."""
    num_rows, width = outputs[0].shape
    is_gated = other is not None and other.dim() == 2
    loads = _LOADS if first is None else _PAIR_LOADS
    threads = min(_MOST_THREADS, -(-width // (8 * loads * 32)) * 32)
    constants = {
        "IS_BF16": x.dtype == torch.bfloat16,
        "KIND": _KINDS.index(kind),
        "IS_GATED": is_gated,
        "HAS_OTHER": other is not None,
        "WIDTH": width,
        "FIRST": 0 if first is None else first.shape[1],
        "THREADS": threads,
    }
    by = x if other is None else other
    before = x if first is None else first
    args = (before, x, by, *outputs, before.stride(0), x.stride(0), by.stride(0))
    return partial(launcher("activation_fp8", constants, args, threads=threads), num_rows)

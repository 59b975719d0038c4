"""How compiled kernels see a tensor: rows of adjacent elements, reached by at most two strides.

A layout that they cannot walk is copied into a dense buffer of the bucket before each call, so the bits of a result
never depend on the layout of its inputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from tritium.errors import KernelError
from tritium.kernels.kernel import Thunk


class Rows(NamedTuple):
    """Row (o, i) starts `o * stride_outer + i * stride_inner` elements after the first; strides count elements."""

    num_outer: int
    num_inner: int
    stride_outer: int
    stride_inner: int


def rows_of(x: torch.Tensor) -> Rows | None:
    """The rows (last dimension) of x [..., D]; None when they are not adjacent elements or need three strides."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    levels: list[tuple[int, int]] = []  # (size, stride), inner first, merged where they run on
    for size, stride in reversed(list(zip(x.shape[:-1], x.stride()[:-1], strict=True))):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    (inner, stride_inner), (outer, stride_outer) = [*levels, (1, 0), (1, 0)][:2]
    return Rows(outer, inner, stride_outer, stride_inner)


def rows_alike(*tensors: torch.Tensor) -> list[Rows] | None:
    """The rows of tensors of one shape, cut into outer and inner alike; None when they cannot be."""
    first = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return [Rows(1, first.numel() // first.shape[-1], 0, first.shape[-1])] * len(tensors)
    if any(t.dim() not in (2, 3) or (t.shape[-1] > 1 and t.stride(-1) != 1) for t in tensors):
        return None
    sizes = (first.shape[0], first.shape[1] if first.dim() == 3 else 1)
    return [Rows(*sizes, t.stride(0), t.stride(1) if t.dim() == 3 else 0) for t in tensors]


class Reads:
    """The inputs of one bound kernel, and the copies that come before it for those whose layout it cannot walk."""

    def __init__(self) -> None:
        self._copies: list[Callable[[], object]] = []

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """x itself when it is contiguous, else a buffer that `before` keeps equal to it."""
        return x if x.is_contiguous() else self._copied(x)

    def adjacent(self, x: torch.Tensor) -> torch.Tensor:
        """x itself when the elements of its last dimension are adjacent, else such a buffer."""
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else self._copied(x)

    def rows(self, x: torch.Tensor) -> tuple[torch.Tensor, Rows]:
        """x, or such a buffer, and its rows."""
        rows = rows_of(x)
        if rows is None:
            x = self._copied(x)
            rows = rows_of(x)
        assert rows is not None
        return x, rows

    def before(self, thunk: Thunk) -> Thunk:
        """The thunk, after the copies."""
        if not self._copies:
            return thunk
        copies = tuple(self._copies)

        def copy_then_run() -> object:
            for copy in copies:
                copy()
            return thunk()

        return copy_then_run

    def _copied(self, x: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._copies.append(lambda: buffer.copy_(x))
        return buffer


def dense_output(out: torch.Tensor) -> torch.Tensor:
    """`out`, which must be contiguous: the arena's temporaries are. Raises `KernelError` otherwise."""
    if not out.is_contiguous():
        raise KernelError(f"the output with sizes {tuple(out.shape)} and strides {out.stride()} is not dense")
    return out

"""How compiled kernels see a tensor: rows of adjacent elements, reached by at most two strides."""

from typing import NamedTuple

import torch

from tritium.errors import KernelError


class Rows(NamedTuple):
    """Row (o, i) starts `o * stride_outer + i * stride_inner` elements after the first; strides count elements."""

    num_outer: int
    num_inner: int
    stride_outer: int
    stride_inner: int

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return self.num_outer * self.num_inner


def rows_of(name: str, x: torch.Tensor) -> Rows:
    """The rows (last dimension) of a view of a fused projection, [T, D], [T, N, H], ...; copies nothing.

    Raises `KernelError` when its rows are not adjacent elements or need three strides.
    """
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise KernelError(f"{name} has stride {x.stride(-1)} in its last dimension: the kernel needs adjacent elements")
    levels: list[tuple[int, int]] = []  # (size, stride), inner first, merged where they run on
    for size, stride in reversed(list(zip(x.shape[:-1], x.stride()[:-1], strict=True))):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        raise KernelError(f"{name} with sizes {tuple(x.shape)} and strides {x.stride()} needs more than two strides")
    (inner, stride_inner), (outer, stride_outer) = [*levels, (1, 0), (1, 0)][:2]
    return Rows(outer, inner, stride_outer, stride_inner)


def dense(name: str, x: torch.Tensor) -> torch.Tensor:
    """`x`, which must be contiguous; `KernelError` otherwise."""
    if not x.is_contiguous():
        raise KernelError(f"{name} with sizes {tuple(x.shape)} and strides {x.stride()} is not dense")
    return x

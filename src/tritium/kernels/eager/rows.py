"""Running torch's element-wise functions so that a row's bits do not depend on its neighbours.

torch vectorises an element-wise loop and ends it with scalar code, whose exp, erf and pow differ in the last bit. Where
a loop ends depends on the numbers of elements and threads, and on strides. Measured (torch 2.13, rows 1-64): sigmoid,
silu, gelu, tanh-gelu, pow and half-precision rsqrt change a row's bits with the number of rows when its size is 37 or
1000 (not 64, not 2048), and gelu even then when rows are strided. add, mul, div, sqrt, sums, softmax, layer_norm, exp,
tanh, sin and cos do not. So these run over blocks of rows that have no scalar end and no split over threads.
"""

import torch

_VECTOR = 64  # elements: twice torch's widest unrolled vector loop
_ONE_THREAD = 32768  # elements: at::internal::GRAIN_SIZE; below it a loop is not split over threads


def row_blocks(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The tensors cut along their first dimension into blocks that are safe to run element-wise functions on.

    On a GPU that is all of them: its functions treat every element alike.
    """
    first = tensors[0]
    if not first.dim() or first.device.type != "cpu":
        return [tensors]
    num_rows = first.shape[0]
    row_size = first.numel() // max(num_rows, 1)
    step = 1
    if row_size and row_size % _VECTOR == 0 and all(t.is_contiguous() for t in tensors):
        step = max(1, (_ONE_THREAD - 1) // row_size)
    return [tuple(t[start : start + step] for t in tensors) for start in range(0, num_rows, step)]

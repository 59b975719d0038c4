"""Drawn layouts of a kernel's inputs, with NaN wherever no element lies; drawn numbers of threads."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from hypothesis import strategies as st

NOWHERE = -(1 << 40)  # what lies between integers: no row has that number


def draw_layout(data: st.DataObject, x: torch.Tensor) -> torch.Tensor:
    """A view equal to x: dimensions in any order in memory, elements, rows and heads apart, anything around them."""
    if data.draw(st.booleans()):
        return x.contiguous()
    dims = range(x.dim())
    order = data.draw(st.permutations(dims)) if data.draw(st.booleans()) else list(dims)
    steps = [data.draw(st.sampled_from([1, 1, 1, 2])) for _ in dims]
    starts, ends = ([data.draw(st.sampled_from([0, 0, 1, 5, 16])) for _ in dims] for _ in range(2))
    sizes = [start + size * step + end for start, size, step, end in zip(starts, x.shape, steps, ends, strict=True)]
    poison = torch.nan if x.is_floating_point() else max(NOWHERE, torch.iinfo(x.dtype).min)
    storage = torch.full([sizes[dim] for dim in order], poison, dtype=x.dtype)
    whole = storage.permute([order.index(dim) for dim in dims])
    view = whole[tuple(slice(a, a + n * s, s) for a, n, s in zip(starts, x.shape, steps, strict=True))]
    return view.copy_(x)


def draw_layouts(data: st.DataObject, args: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments, every tensor in a layout of its own."""
    return {name: draw_layout(data, a) if isinstance(a, torch.Tensor) else a for name, a in args.items()}


@contextlib.contextmanager
def draw_threads(data: st.DataObject) -> Iterator[None]:
    """One to three threads while it is entered."""
    before = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    try:
        yield
    finally:
        torch.set_num_threads(before)

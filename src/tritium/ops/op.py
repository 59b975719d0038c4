"""What an op of the graph's vocabulary is: a schema, one reference function, and the ways people write it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Literal = bool | int | float | str | None
Example = Callable[[torch.dtype], tuple[torch.Tensor | None, ...]]


def like_first(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """An empty, dense tensor like the op's first argument: the fake of most ops."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """One way in which the op is written in plain torch: a pattern by which it is recognised.

    fn: `fn(*tensors, **attributes)`; its tensor parameters have the names of the op's.
    example: tensors for `fn`, in the dtype asked for; T is 8, the other sizes differ from each other where they may.
    attributes: op attributes that `fn` takes as keywords. The values are sentinels, numbers that appear nowhere else:
        a literal of the captured pattern that equals one stands for the attribute.
    binds: op arguments that a match fixes, beside those it reads from the graph.
    bound: a rewrite by this spelling changes a result by at most bound * eps(dtype) * max|reference|; 0: it equals the
        reference bit for bit in bf16 (and in fp32 and fp16 within 1 eps). Tested either way.
    fp32_bound: not bit for bit, though what is cast is cast once and last: torch's kernel adds in fp32 in an order of
        its own. A result is then the rounding of a value within fp32_bound * eps(fp32) * max|reference| of its.
    """

    name: str
    fn: Callable[..., Any]
    example: Example
    attributes: Mapping[str, Literal] = field(default_factory=dict)
    binds: Mapping[str, Literal] = field(default_factory=dict)
    bound: float = 0.0
    fp32_bound: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op. The reference is its semantics, its implementation outside engines, its fallback kernel and test oracle.

    schema: torch.library's, without the namespace. Parameter names carry the sizes (legend in `ops/library.py`).
    fake: an empty, dense tensor of the result's shape and dtype, for capture. Not the reference run on meta tensors: a
        capture holds real constants (inv_freq) beside meta weights, which arithmetic refuses to mix.
    is_fused: a pass makes it of other ops. Its spellings are written in those; nothing recognises it in plain torch.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    spellings: tuple[Spelling, ...] = ()
    is_fused: bool = False

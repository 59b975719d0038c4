"""Element-wise leftovers: torch functions that a plan may call as they are, each writing into its output.

The keys are the ops in a plan, as captured graphs name them; `ALLOWED` is all of them. Functions that could mix tokens
are here for dimensions that the compiler's locality proof has passed (reductions), or not at all (matrix products).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tritium.errors import KernelError
from tritium.kernels.eager.rows import row_blocks
from tritium.kernels.kernel import Bind, Thunk

aten = torch.ops.aten


def _copy(x: torch.Tensor, *_: object, out: torch.Tensor, **__: object) -> torch.Tensor:
    return out.copy_(x)


def _rsub(x: torch.Tensor, other: float, alpha: float = 1, *, out: torch.Tensor) -> torch.Tensor:
    return torch.sub(other, x, alpha=alpha, out=out)


def _softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None, *, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(torch.softmax(x, dim, dtype=dtype))


# Exactly rounded, or insensitive to where a loop ends (rows.py).
_WHOLE: dict[str, Callable[..., Any]] = {
    "aten.add.Tensor": torch.add,
    "aten.add.Scalar": torch.add,
    "aten.sub.Tensor": torch.sub,
    "aten.sub.Scalar": torch.sub,
    "aten.rsub.Scalar": _rsub,
    "aten.mul.Tensor": torch.mul,
    "aten.mul.Scalar": torch.mul,
    "aten.div.Tensor": torch.div,
    "aten.div.Scalar": torch.div,
    "aten.neg.default": torch.neg,
    "aten.abs.default": torch.abs,
    "aten.square.default": torch.square,
    "aten.sqrt.default": torch.sqrt,
    "aten.maximum.default": torch.maximum,
    "aten.minimum.default": torch.minimum,
    "aten.clamp.default": torch.clamp,
    "aten.relu.default": partial(torch.clamp, min=0),
    "aten.where.self": torch.where,
    "aten.cat.default": torch.cat,
    "aten.stack.default": torch.stack,
    "aten.mean.dim": torch.mean,
    "aten.sum.dim_IntList": torch.sum,
    "aten.amax.default": torch.amax,
    "aten.softmax.int": _softmax,
    "aten._softmax.default": aten._softmax.out,
    "aten.to.dtype": _copy,
    "aten._to_copy.default": _copy,
    "aten.clone.default": _copy,
}
# One tensor in, element by element; run over safe blocks of rows.
_BLOCKS: dict[str, Callable[..., Any]] = {
    "aten.exp.default": torch.exp,
    "aten.log.default": torch.log,
    "aten.sin.default": torch.sin,
    "aten.cos.default": torch.cos,
    "aten.tanh.default": torch.tanh,
    "aten.sigmoid.default": torch.sigmoid,
    "aten.erf.default": torch.erf,
    "aten.rsqrt.default": torch.rsqrt,
    "aten.reciprocal.default": torch.reciprocal,
    "aten.pow.Tensor_Scalar": torch.pow,
    "aten.silu.default": aten.silu.out,
    "aten.gelu.default": aten.gelu.out,
    "aten.expm1.default": torch.expm1,
    "aten.log1p.default": torch.log1p,
    "aten.softplus.default": aten.softplus.out,
}


ALLOWED: tuple[str, ...] = (*_WHOLE, *_BLOCKS)


def bind_name(op: str) -> str:
    """The attribute of this module that binds `op`: "aten.add.Tensor" -> "add_Tensor"."""
    return op.removeprefix("aten.").replace(".", "_")


def __getattr__(name: str) -> Bind:
    """The bind function of that name, for `kernel.resolve` (PEP 562)."""
    for op in ALLOWED:
        if bind_name(op) == name:
            return partial(_bind_blocks if op in _BLOCKS else _bind_whole, op)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _bind_whole(op: str, args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    positional, keywords = _call(op, args)
    return partial(_WHOLE[op], *positional, **keywords, out=outputs[0])


def _bind_blocks(op: str, args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    (x, *positional), keywords = _call(op, args)
    calls = [partial(_BLOCKS[op], x, *positional, **keywords, out=out) for x, out in row_blocks(x, outputs[0])]
    if len(calls) == 1:
        return calls[0]

    def thunk() -> None:
        for call in calls:
            call()

    return thunk


def _call(op: str, args: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments as torch's functions take them: positional in the schema's order, then those by keyword only."""
    _, name, overload = op.split(".")
    schema = getattr(getattr(aten, name), overload)._schema
    if unknown := set(args) - {a.name for a in schema.arguments}:
        raise KernelError(f"{op} has no argument {', '.join(sorted(unknown))}; it is {schema}")
    positional, keywords = [], {}
    for argument in schema.arguments:
        value = args.get(argument.name, argument.default_value)
        if argument.name == "dtype" and isinstance(value, str):
            value = getattr(torch, value)
        if argument.kwarg_only or argument.name == "alpha":
            if argument.name in args:
                keywords[argument.name] = value
        else:
            positional.append(value)
    return positional, keywords

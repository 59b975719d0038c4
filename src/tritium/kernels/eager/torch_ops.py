"""torch's own ops (`ops/torch_ops.py`) as kernels: run as they are, their results copied to where the plan wants them.

torch checks their arguments itself. A result of another size than the plan says is an `EngineError`: it is never
written. Whether a row's bits depend on its neighbours is torch's to decide, and for most of these it is not promised.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tritium.errors import EngineError, KernelError
from tritium.kernels.eager.index_checks import index_check
from tritium.kernels.kernel import Bind, Thunk
from tritium.ops.torch_ops import TORCH_OPS, overload

_PLACES = ("Optional[Device]", "Optional[Layout]", "Optional[MemoryFormat]")  # arguments that a plan leaves to torch


def bind_name(op: str) -> str:
    """The attribute of this module that binds `op`: "aten.conv2d.default" -> "conv2d_default"."""
    return op.removeprefix("aten.").replace(".", "_")


_BY_NAME = {bind_name(op): op for op in TORCH_OPS}


def __getattr__(name: str) -> Bind:
    """The bind function of that name, for `kernel.resolve` (PEP 562)."""
    if name not in _BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(_bind, _BY_NAME[name])


def _bind(op: str, args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    function = overload(op)
    positional, keywords = _call(op, function._schema, args)
    call = partial(function, *positional, **keywords)
    shapes = [out.shape for out in outputs]
    check = index_check(op, args) if outputs[0].device.type != "cpu" else None

    def thunk() -> None:
        if check is not None:
            check()
        found = call()
        results = found if isinstance(found, (tuple, list)) else (found,)
        if [x.shape for x in results] != shapes:
            raise EngineError(
                f"{op} gives sizes {[list(x.shape) for x in results]}, the plan says {[list(s) for s in shapes]}: the "
                "engine is damaged; build it again"
            )
        for out, x in zip(outputs, results, strict=True):
            out.copy_(x)

    return thunk


def _call(op: str, schema: Any, args: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments as torch takes them: positional in the schema's order, then those by keyword only."""
    if unknown := set(args) - {a.name for a in schema.arguments}:
        raise KernelError(f"{op} has no argument {', '.join(sorted(unknown))}; it is {schema}")
    positional, keywords = [], {}
    for argument in schema.arguments:
        if argument.name not in args and not argument.has_default_value():
            raise KernelError(f"{op} needs the argument {argument.name}; it is {schema}")
        value = args.get(argument.name, argument.default_value)
        if str(argument.type) in _PLACES:
            value = None
        elif argument.name == "dtype" and isinstance(value, str):
            value = getattr(torch, value)
        if argument.kwarg_only:
            keywords[argument.name] = value
        else:
            positional.append(value)
    return positional, keywords

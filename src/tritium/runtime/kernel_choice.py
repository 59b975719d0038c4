"""Which kernel runs each step here: the one the plan names, or, where that one cannot run, another that is valid."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.engine.plan import Arg, Extent, Plan, Ref, Step, Value
from tritium.errors import EngineError
from tritium.kernels.cpu import library
from tritium.kernels.kernel import Kernel, TensorSpec
from tritium.kernels.plugin import Plugin, kernel_rows
from tritium.kernels.select import choose

logger = logging.getLogger("tritium")


@functools.cache
def available_backends() -> frozenset[str]:
    """Backends that work in this process; says once why the compiled kernels do not, if so."""
    backends = {"eager"}
    if library.available():
        backends.add("cpu")
    else:
        logger.warning("compiled kernels are not available, torch runs everything, slowly: %s", library.why_not())
    return frozenset(backends)


def choose_kernels(plan: Plan, plugins: Sequence[Plugin] = ()) -> list[Kernel]:
    """One kernel per step, a plugin's or one of the table.

    Raises `KernelError` when nothing can run a step, `EngineError` for an unknown value.
    """
    values = {value.name: value for value in plan.values}
    available = available_backends()
    extra = kernel_rows(plugins)
    return [
        choose(step.op, _specs(step, values), available=available, preferred=step.kernel, extra=extra)
        for step in plan.steps
    ]


def _specs(step: Step, values: Mapping[str, Value]) -> dict[str, Any]:
    return {name: _spec(arg, values) for name, arg in step.args.items()}


def _spec(arg: Arg, values: Mapping[str, Value]) -> Any:
    if isinstance(arg, list):
        return [_spec(item, values) for item in arg]
    if not isinstance(arg, Ref):
        return arg
    value = values.get(arg.value)
    if value is None:
        raise EngineError(f"the plan has no value named {arg.value!r}: the engine is damaged; build it again")
    return TensorSpec(dtype=getattr(torch, value.dtype), shape=tuple(_size(dim) for dim in value.shape))


def _size(dim: str | int) -> int | None:
    extent = Extent.parse(dim)
    return extent.constant if extent.is_static and extent.constant >= 0 else None

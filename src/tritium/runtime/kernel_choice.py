"""Which kernel runs each step here: the one the plan names, or, where that one cannot run, another that is valid."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from tritium.engine.engine import Engine
from tritium.engine.environment import block_size_of, differences
from tritium.engine.plan import Arg, Extent, Plan, Ref, Step, Value
from tritium.engine.tactics import Choice, Tactics
from tritium.errors import EngineError
from tritium.kernels.cpu import library
from tritium.kernels.kernel import Kernel, Tactic, TensorSpec
from tritium.kernels.plugin import Plugin, kernel_rows
from tritium.kernels.select import choose, refuse_tactic, valid_kernels, valid_tactics, variance
from tritium.kernels.table import KERNELS

logger = logging.getLogger("tritium")


@functools.cache
def available_backends(device: str = "cpu") -> frozenset[str]:
    """Backends that work in this process; says once why the compiled kernels do not, if so.

    For "cuda" they are what an engine is built for, wherever that happens; `runtime/gpu` looks for the GPU itself.
    """
    if device == "cuda":
        return frozenset({"gpu", "eager"})
    backends = {"eager"}
    if library.available():
        backends.add("cpu")
    else:
        logger.warning("compiled kernels are not available, torch runs everything, slowly: %s", library.why_not())
    return frozenset(backends)


def choose_kernels(
    plan: Plan,
    plugins: Sequence[Plugin] = (),
    device: str = "cpu",
    *,
    tuned: Mapping[int, str] | None = None,
    is_bitwise: bool = False,
) -> list[Kernel]:
    """One kernel per step, a plugin's or one of the table. tuned: kernels to prefer to the plan's, by step.

    is_bitwise: a row's bits must not depend on its neighbours. A CPU's executor sees to that for every kernel.

    Raises `KernelError` when nothing can run a step, `EngineError` for an unknown value.
    """
    values = {value.name: value for value in plan.values}
    available = available_backends(device)
    extra = kernel_rows(plugins)
    return [
        choose(
            step.op,
            specs_of(step, values),
            available=available,
            preferred=(tuned or {}).get(index, step.kernel),
            extra=extra,
            is_bitwise=is_bitwise and device == "cuda",
        )
        for index, step in enumerate(plan.steps)
    ]


def candidates(
    plan: Plan,
    step: Step,
    plugins: Sequence[Plugin] = (),
    device: str = "cpu",
    *,
    is_bitwise: bool = False,
    capability: tuple[int, int] | None = None,
) -> list[tuple[Kernel, list[Tactic]]]:
    """Every kernel that can run a step here, by which tactics; the one that is used when nothing is tuned first.

    is_bitwise: as for `choose_kernels`. capability: the GPU's; None: any.
    """
    specs = specs_of(step, plan.by_name)
    rows = valid_kernels(step.op, specs, available=available_backends(device), extra=kernel_rows(plugins))
    if device == "cuda":
        rows = [row for row in rows if capability is None or row.min_capability <= capability]
        if is_bitwise:
            rows = [row for row in rows if variance(row) is None]
    return [(row, valid_tactics(row, specs)) for row in rows]


def usable_tactics(engine: Engine, here: dict[str, str], *, block_size: int | None = None) -> Tactics | None:
    """The engine's tactics, when they were measured in an environment like `here`, and all of them can run in it; else
    says why not.

    block_size: of the KV blocks that the engine will run over, where attention's times depend on it: on a GPU. Where it
    was timed over others its choices are left out, which is said, and those of other ops are kept.
    """
    tactics = engine.tactics
    if tactics is None:
        return None
    if different := differences(tactics.environment, here):
        logger.warning(
            "%s was tuned elsewhere (%s): defaults are used; `tritium tune %s` measures here",
            engine.path,
            different,
            engine.path,
        )
        return None
    if refused := _refused(engine, tactics):
        logger.warning(
            "%s has tactics that cannot run here (%s): defaults are used; `tritium tune %s` measures here",
            engine.path,
            refused,
            engine.path,
        )
        return None
    return tactics if block_size is None else _over_blocks(engine, tactics, block_size)


def _over_blocks(engine: Engine, tactics: Tactics, block_size: int) -> Tactics:
    """Those that hold over KV blocks of so many tokens."""
    if (measured := block_size_of(tactics.environment)) == str(block_size):
        return tactics
    kept = tuple(choice for choice in tactics.choices if not _reads_cache(engine.plan, choice))
    if len(kept) < len(tactics.choices):
        logger.warning(
            "%s was tuned for block_size=%s and runs with block_size=%d: its attention runs by defaults; open it with "
            "block_size=%s (--block-size), or `tritium tune %s --block-size %d`",
            engine.path,
            measured,
            block_size,
            measured,
            engine.path,
            block_size,
        )
    return msgspec.structs.replace(tactics, choices=kept)


def _reads_cache(plan: Plan, choice: Choice) -> bool:
    args = plan.steps[choice.steps[0]].args.values()
    return any(isinstance(arg, Ref) and plan.value(arg.value).kind == "kv" for arg in args)


def _refused(engine: Engine, tactics: Tactics) -> str | None:
    """The first tactic that its kernel refuses, and why. Of kernels that other steps run nothing is asked."""
    rows = {row.name: row for row in (*KERNELS, *kernel_rows(engine.plugins))}
    for choice in tactics.choices:
        row, step = rows.get(choice.kernel), engine.plan.steps[choice.steps[0]]
        if row is None or row.op != step.op:
            continue
        specs = specs_of(step, engine.plan.by_name)
        for _, tactic in choice.tactics:
            if reason := refuse_tactic(row, specs, tactic):
                return f"{row.name} with {', '.join(f'{name}={value!r}' for name, value in tactic.items())}: {reason}"
    return None


def specs_of(step: Step, values: Mapping[str, Value]) -> dict[str, Any]:
    """A step's arguments as far as they are known without a batch: `TensorSpec`s and literals."""
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

"""A plan's values, checked when an engine is opened: compiled kernels trust the sizes, dtypes and names in it.

Every value is made as a meta tensor for two batches, the way the runtime will make it: a base comes before its views, a
view is what torch says it is, inputs and KV are what the runtime provides. Steps are `engine/check_steps.py`'s.
"""

import re
from collections.abc import Mapping

import torch

from tritium.engine.arena import ITEM_SIZES
from tritium.engine.check_steps import check_steps
from tritium.engine.plan import Extent, KVGroup, Plan, Sizes, Value, damaged, kv_layer
from tritium.engine.views import view_of
from tritium.errors import EngineError
from tritium.ops.op import Op

SAMPLES = (Sizes(tokens=1009, sequences=11, rows=13), Sizes(tokens=1, sequences=1, rows=1))
ANY = 16  # stands for a size that only the runtime knows
Shape = tuple[str | int, ...]
INPUTS: Mapping[str, tuple[str, Shape]] = {
    "input_ids": ("int64", ("T",)),
    "positions": ("int64", ("T",)),
    "token_types": ("int64", ("T",)),
    "sampled_rows": ("int64", ("R",)),
    "cu_seqlens_q": ("int32", ("S+1",)),
    "context_lens": ("int32", ("S",)),
    "batch_counts": ("int32", (4,)),
}
GROUP_INPUTS: Mapping[str, tuple[str, Shape]] = {
    "slot_mapping": ("int64", ("T",)),
    "block_table": ("int32", ("S", -1)),
}


def check_plan(plan: Plan, plugin_ops: Mapping[str, Op] | None = None) -> None:
    """Raises `EngineError` that names the value or step which is not what a compiler of this version writes.

    plugin_ops: by their names in plans.
    """
    layers = _check_groups(plan.kv_groups)
    if len(plan.by_name) < len(plan.values):
        raise damaged("two of the plan's values have one name")
    if plan.kind != "decoder" and (not plan.outputs or plan.kv_groups):
        raise damaged(f"the plan is for a model of kind {plan.kind!r}, but has no outputs, or a KV cache")
    provided = _module_inputs(plan) if plan.kind == "module" else dict(INPUTS)
    for name, expected in GROUP_INPUTS.items():
        provided |= {f"{name}.{group}": expected for group in range(len(plan.kv_groups))}
    for value in plan.values:
        if plan.kind != "module" and value.dtype == "complex64":
            raise damaged(f"the plan's value {value.name!r} has dtype {value.dtype!r}")
        _check_value(value, provided, layers)
    for sizes in SAMPLES:
        tensors: dict[str, torch.Tensor] = {}
        for value in plan.values:
            tensors[value.name] = _tensor(value, tensors, sizes)
        check_steps(plan, tensors, plugin_ops or {})
        logits = tensors.get(plan.output)
        if plan.kind == "decoder" and (
            logits is None or list(logits.shape) != [sizes.rows, plan.vocab_size] or not logits.is_floating_point()
        ):
            raise damaged(f"the plan's output {plan.output!r} is not a floating value of sizes [R, {plan.vocab_size}]")
        for name in plan.outputs.values() if plan.kind == "encoder" else ():
            if tensors[name].dim() != 2 or len(tensors[name]) not in (sizes.tokens, sizes.rows):
                raise damaged(f"the plan's output {name!r} has sizes {list(tensors[name].shape)}, not [T or R, ...]")


def _module_inputs(plan: Plan) -> dict[str, tuple[str, Shape]]:
    """What a stateless module is given: inputs of its own, the batch in front of fixed sizes."""
    inputs = {value.name: value for value in plan.values if value.kind == "input"}
    for value in inputs.values():
        if value.shape[:1] != ("T",) or not all(_extent(value, dim).is_static for dim in value.shape[1:]):
            raise damaged(f"the plan's input {value.name!r} has sizes {list(value.shape)}, not ['T', ...]")
    return {name: (value.dtype, value.shape) for name, value in inputs.items()}


def _check_groups(groups: tuple[KVGroup, ...]) -> dict[int, KVGroup]:
    """The KV group of each layer."""
    layers = {layer: group for group in groups for layer in group.layers}
    for number, group in enumerate(groups):
        is_sound = min(group.num_kv_heads, group.head_size) > 0 and group.window >= 0 and group.dtype in ITEM_SIZES
        if not is_sound or not group.layers or len(group.layers) != len(groups[0].layers):
            raise damaged(f"the plan's KV group {number} is {group}")
    if len(layers) != sum(len(group.layers) for group in groups):
        raise damaged("the plan has an attention layer in two KV groups")
    return layers


def _check_value(value: Value, provided: Mapping[str, tuple[str, Shape]], layers: Mapping[int, KVGroup]) -> None:
    """dtype, sizes, and that the runtime has what the value stands for."""
    if value.dtype not in ITEM_SIZES:
        raise damaged(f"the plan's value {value.name!r} has dtype {value.dtype!r}")
    expected: tuple[str, Shape] | None = (value.dtype, value.shape)
    if value.kind == "input":
        expected = provided.get(value.name)
    elif value.kind == "kv":
        group = layers.get(kv_layer(value.name))
        expected = None if group is None else (group.dtype, (-1, 2, group.num_kv_heads, -1, group.head_size))
    if expected is None:
        raise damaged(f"the plan's {value.kind} value {value.name!r} is none that the runtime provides")
    if (value.dtype, value.shape) != expected:
        raise damaged(
            f"the plan's {value.kind} value {value.name!r} is {value.dtype} {list(value.shape)}, not "
            f"{expected[0]} {list(expected[1])}"
        )
    if value.kind == "weight" and not all(_extent(value, dim).is_static for dim in value.shape):
        raise damaged(f"the plan's weight {value.name!r} has sizes {list(value.shape)}, which depend on the batch")


def _tensor(value: Value, known: Mapping[str, torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """The value in this batch, without memory. `known`: the values before it."""
    is_open = value.kind in ("input", "kv")
    shape = [ANY if is_open and dim == -1 else _extent(value, dim).at(sizes) for dim in value.shape]
    dtype: torch.dtype = getattr(torch, value.dtype)
    if min(shape, default=0) < 0:
        raise damaged(f"the plan's value {value.name!r} has sizes {list(value.shape)}")
    if value.kind != "view":
        try:
            return torch.empty(shape, dtype=dtype, device="meta")
        except (RuntimeError, TypeError, OverflowError):
            raise damaged(f"the plan's value {value.name!r} has sizes {list(value.shape)}") from None
    if value.base not in known:
        raise damaged(f"the plan's view {value.name!r} is of {value.base!r}, which is no value before it")
    try:
        view = view_of(known[value.base], value.op, value.args, sizes)
    except (EngineError, RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
        reason = re.split(r"[\n;]", str(error))[0]
        raise damaged(f"the plan's view {value.name!r} cannot be made of {value.base!r} ({reason})") from None
    if list(view.shape) != shape or view.dtype != dtype:
        raise damaged(
            f"the plan's view {value.name!r} is {value.dtype} {list(value.shape)}, but {value.op} of {value.base!r} "
            f"gives {str(view.dtype)[6:]} {list(view.shape)} for {sizes.tokens} tokens"
        )
    return view


def _extent(value: Value, dim: str | int) -> Extent:
    try:
        return Extent.parse(dim)
    except EngineError as error:
        raise damaged(f"the plan's value {value.name!r}: {error}") from None

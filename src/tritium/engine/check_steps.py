"""A plan's steps, checked on meta tensors: arguments exist and fit the op and each other, outputs are what it gives."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from tritium import ops
from tritium.engine.plan import Plan, Ref, Step, Value, damaged
from tritium.errors import EngineError
from tritium.kernels.eager.aten import ALLOWED
from tritium.ops.quantized import SCALE_BYTES
from tritium.ops.torch_ops import is_torch_op, overload

REDUCTIONS = ("aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default")
TYPES: Mapping[str, tuple[type, ...]] = {  # of a schema's arguments, in a plan
    "Tensor": (torch.Tensor,), "Optional[Tensor]": (torch.Tensor, type(None)), "float": (float, int), "int": (int,),
    "bool": (bool,), "str": (str,),
}  # fmt: skip
Tensors = Mapping[str, torch.Tensor]


def _row(a: Tensors, heads: str) -> int:
    """Elements of a head's row in the cache."""
    return a[heads].shape[2] + (SCALE_BYTES if a["cache_layer"].dtype == torch.int8 else 0)


Sides = tuple[Sequence[int], Sequence[int | None]]  # what an argument's sizes are, and what they must be; None: any


def _of_quantized(a: Tensors) -> list[Sides]:
    num_in = a["x"].shape[-1] - (SCALE_BYTES if a["x"].dtype == torch.int8 else 0)
    packed = num_in if a["qweight"].dtype == torch.int8 else num_in // 2
    bias = [(b.shape, a["qweight"].shape[:1]) for b in [a.get("bias")] if b is not None]
    return [(a["qweight"].shape, (None, packed)), (a["scales_NG"].shape, (a["qweight"].shape[0], None)), *bias]


# What names like `q_TNH` do not say of the arguments' sizes.
RELATIONS: Mapping[str, Callable[[Tensors], list[Sides]]] = {
    "rms_norm": lambda a: [(a["weight"].shape, a["x"].shape[-1:])],
    "layer_norm": lambda a: [(a[name].shape, a["x"].shape[-1:]) for name in ("weight", "bias") if name in a],
    "linear": lambda a: [
        (a["weight_NK"].shape, (None, a["x"].shape[-1])),
        *((b.shape, a["weight_NK"].shape[:1]) for b in [a.get("bias")] if b is not None),
    ],
    "linear_activation": lambda a: RELATIONS["linear"](a),
    "linear_gated": lambda a: RELATIONS["linear"](a),
    "linear_add": lambda a: [
        *RELATIONS["linear"](a),
        (a["residual"].shape, (*a["x"].shape[:-1], a["weight_NK"].shape[0])),
    ],
    "linear_pair": lambda a: [
        (a["weight_NK"].shape, (None, a["x"].shape[-1] + a["y"].shape[-1])),
        (a["y"].shape[:-1], a["x"].shape[:-1]),
        *((b.shape, a["weight_NK"].shape[:1]) for b in [a.get("bias")] if b is not None),
    ],
    **dict.fromkeys(("quantized_linear", "quantized_linear_activation", "quantized_linear_gated"), _of_quantized),
    "quantized_linear_add": lambda a: [
        *_of_quantized(a),
        (a["residual"].shape, (*a["x"].shape[:-1], a["qweight"].shape[0])),
    ],
    "quantized_embedding": lambda a: [(a["scales_V1"].shape, (a["qweight_VD"].shape[0], 1))],
    "experts": lambda a: [(a["gate_up_EGD"].shape, (None, 2 * a["down_EDF"].shape[2], None))],
    "gated_activation": lambda a: [(a["up"].shape, a["gate"].shape)],
    "moe": lambda a: [(a["gate_up_EGD"].shape[1:2], (2 * a["down_EDF"].shape[2],))],
    "rope": lambda a: [(a["cos_sin"].shape, (a["x_TNH"].shape[0], None))],
    "kv_store": lambda a: [(a["cache_layer"].shape, (None, 2, a["k_TKH"].shape[1], None, _row(a, "k_TKH")))],
    "varlen_attention": lambda a: [
        (a["k_TKH"].shape[2:], a["q_TNH"].shape[2:]),
        (a["batch_counts"].shape, (4,)),
        (a["cu_seqlens_q"].shape, (None,)),
    ],
    "add_rms_norm": lambda a: [(a["weight"].shape, a["x"].shape[-1:]), (a["residual"].shape, a["x"].shape)],
    "add_layer_norm": lambda a: [
        *((a[name].shape, a["x"].shape[-1:]) for name in ("weight", "bias") if name in a),
        (a["residual"].shape, a["x"].shape),
    ],
    "quantized_rms_norm": lambda a: RELATIONS["rms_norm"](a),
    "quantized_layer_norm": lambda a: RELATIONS["layer_norm"](a),
    "quantized_add_rms_norm": lambda a: RELATIONS["add_rms_norm"](a),
    "quantized_add_layer_norm": lambda a: RELATIONS["add_layer_norm"](a),
    "rope_kv_store": lambda a: [
        (a["cache_layer"].shape, (None, 2, a["k_TKH"].shape[1], None, _row(a, "k_TKH"))),
        (a["cos_sin"].shape, (a["q_TNH"].shape[0], None)),
    ],
    "paged_attention": lambda a: [
        (a["cache_layer"].shape, (None, 2, None, None, _row(a, "q_TNH"))),
        (a["cu_seqlens_q"].shape, (a["block_table_SB"].shape[0] + 1,)),
        (a["batch_counts"].shape, (4,)),
    ],
}


def check_steps(plan: Plan, tensors: Tensors, plugin_ops: Mapping[str, ops.Op]) -> None:
    """tensors: the plan's values as meta tensors, for one batch. plugin_ops: by their names in plans.

    Raises `EngineError` that names the step.
    """
    values = plan.by_name
    written: set[str] = set()
    phase = "tokens"
    for index, step in enumerate(plan.steps):
        where = f"the plan's step {index} ({step.op})"
        if phase == "rows" and step.phase == "tokens":
            raise damaged(f"{where} runs over tokens after a step over sampled rows")
        phase = step.phase
        for name in _reads(step):
            if name not in values:
                raise damaged(f"{where} reads {name!r}, which is no value")
            root = _root(values, name)
            if values[root].kind == "temp" and root not in written:
                raise damaged(f"{where} reads {name!r} before it is written")
        for name in step.outputs:
            if name not in values or values[name].kind != "temp" or name in written:
                raise damaged(f"{where} writes {name!r}, which is no temporary of its own")
            written.add(name)
        _check_step(where, step, tensors, plugin_ops)
    for name in plan.results:
        output = _root(values, name) if name in values else name
        if output not in written and (plan.kind == "decoder" or output not in values):
            raise damaged(f"the plan's output {name!r} is written by no step")


def _check_step(where: str, step: Step, tensors: Tensors, plugin_ops: Mapping[str, ops.Op]) -> None:
    for name in ("cu_seqlens_q", "batch_counts") if step.op == "varlen_attention" else ():
        if step.args.get(name) != Ref(name):
            raise damaged(f"{where} does not read {name} as the runtime writes it")
    try:
        arguments = {name: _argument(arg, tensors) for name, arg in step.args.items()}
        if is_torch_op(step.op):
            return _check_torch_op(step, arguments)
        result = _result(step.op, arguments, plugin_ops.get(step.op))
    except (EngineError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise damaged(f"{where} cannot run: {str(error).partition(chr(10))[0]}") from None
    given = list(result) if isinstance(result, tuple) else [] if result is None else [result]
    declared = [tensors[name] for name in step.outputs]
    if [list(t.shape) for t in given] != [list(t.shape) for t in declared]:
        raise damaged(
            f"{where} gives sizes {[list(t.shape) for t in given]}, not those of {', '.join(step.outputs) or 'nothing'}"
        )
    if not step.op.startswith("aten.") and [t.dtype for t in given] != [t.dtype for t in declared]:
        raise damaged(f"{where} gives {given[0].dtype}, but {step.outputs[0]!r} is {declared[0].dtype}")


def _check_torch_op(step: Step, arguments: Mapping[str, Any]) -> None:
    """Names and number of outputs. Its kernel compares the sizes: torch would import its compiler for it here, 2 s."""
    schema = overload(step.op)._schema
    if unknown := arguments.keys() - {argument.name for argument in schema.arguments}:
        raise EngineError(f"it has no argument {', '.join(sorted(unknown))}")
    for argument in schema.arguments:
        if argument.name not in arguments:
            _default(argument)
    if len(schema.returns) > 1 and len(step.outputs) != len(schema.returns):
        raise EngineError(f"it has {len(step.outputs)} outputs, not {len(schema.returns)}")


def _check_sizes(op: str, arguments: Tensors) -> None:
    """Ranks and sizes: equal letters in the names (`q_TNH`, `slot_mapping_T`) are equal sizes."""
    letters: dict[str, int] = {}
    for name, tensor in arguments.items():
        if match := re.search(r"_([A-Z]+)$", name):
            if tensor.dim() != len(match[1]):
                raise EngineError(f"{name} has {tensor.dim()} dimensions")
            for letter, size in zip(match[1], tensor.shape, strict=True):
                if letters.setdefault(letter, size) != size:
                    raise EngineError(f"{name} has {letter} = {size}, another argument has {letters[letter]}")
    for sizes, expected in RELATIONS[op](arguments) if op in RELATIONS else ():
        is_equal = len(sizes) == len(expected) and all(b in (None, a) for a, b in zip(sizes, expected, strict=True))
        if not is_equal:
            raise EngineError(f"an argument has sizes {list(sizes)}, not {list(expected)} (None: any)")


def _result(op: str, arguments: Mapping[str, Any], foreign: ops.Op | None) -> Any:
    """What the op gives: a tensor, several, None; `foreign`, when a plugin has it. What is raised says why not."""
    if op in ALLOWED:
        return _of_torch(op, arguments)
    found = foreign or ops.op_named(op)
    known = torch._C.parse_schema(found.schema).arguments
    if unknown := arguments.keys() - {argument.name for argument in known}:
        raise EngineError(f"it has no argument {', '.join(sorted(unknown))}")
    in_order = [arguments[a.name] if a.name in arguments else _default(a) for a in known]
    for argument, given in zip(known, in_order, strict=True):
        types = TYPES[str(argument.type)]
        if not isinstance(given, types) or (isinstance(given, bool) and bool not in types):
            raise EngineError(f"its argument {argument.name} is a {type(given).__name__}, not {argument.type}")
    _check_sizes(op, {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)})
    return found.fake(*in_order)  # not the op: torch's dispatch to it would import torch's compiler, 2 s


def _of_torch(op: str, arguments: Mapping[str, Any]) -> torch.Tensor:
    """A tensor of the sizes that torch's op gives. Worked out here: torch would import its compiler for it, 2 s."""
    if op in ("aten.cat.default", "aten.stack.default"):
        shapes = [list(x.shape) for x in arguments["tensors"]]
        dim = range(len(shapes[0]) + ("stack" in op))[arguments.get("dim", 0)]
        if "stack" in op:
            shapes = [[*shape[:dim], 1, *shape[dim:]] for shape in shapes]
        if len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) > 1:
            raise EngineError(f"tensors have sizes {shapes}")
        shape = [*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :]]
    elif op in REDUCTIONS:
        x, dims = arguments["self"], arguments.get("dim")
        every = range(x.dim())
        over = {every[d] for d in ([dims] if isinstance(dims, int) else dims or every)}
        kept = [1 if d in over else size for d, size in enumerate(x.shape)]
        shape = kept if arguments.get("keepdim") else [size for d, size in enumerate(x.shape) if d not in over]
    else:
        tensors = [x.shape[::-1] for x in arguments.values() if isinstance(x, torch.Tensor)]
        sizes = [set(dims) - {1} or {1} for dims in zip_longest(*tensors, fillvalue=1)]
        if any(len(of_dim) > 1 for of_dim in sizes):
            raise EngineError(f"its arguments have sizes {[list(shape[::-1]) for shape in tensors]}")
        shape = [size for of_dim in reversed(sizes) for size in of_dim]
    return torch.empty(shape, device="meta")


def _default(argument: Any) -> Any:
    if not argument.has_default_value():
        raise EngineError(f"its argument {argument.name} is missing")
    return argument.default_value


def _argument(arg: Any, tensors: Tensors) -> Any:
    if isinstance(arg, Ref):
        return tensors[arg.value]
    if isinstance(arg, list):
        return [_argument(item, tensors) for item in arg]
    return arg


def _reads(step: Step) -> list[str]:
    items = [item for arg in step.args.values() for item in (arg if isinstance(arg, list) else [arg])]
    return [item.value for item in items if isinstance(item, Ref)]


def _root(values: Mapping[str, Value], name: str) -> str:
    """The value that a chain of views looks at."""
    while values[name].kind == "view":
        name = values[name].base
    return name

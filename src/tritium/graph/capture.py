"""Capture: an nn.Module becomes an fx graph, through torch.export on meta tensors.

A decoder's forward takes `input_ids` [T] and `positions` [T] (int64) and returns logits [T, V]; other modules have
named inputs of their own, each with the batch in front. Nothing of the module is executed on data and none of its
tensors is copied. The captured graph has one placeholder per input, parameter and buffer; every node carries

    meta["spec"]    dtype and shape (spec.py)
    meta["source"]  where in the model it comes from (source.py)
    meta["covers"]  the captured nodes it stands for: itself at first, several after a rewrite

and a placeholder meta["kind"] ("input", "weight", later "kv") and meta["name"], the parameter's own name. A constant's
has meta["value"], the tensor; a weight that a pass has made (derived.py) meta["recipe"].
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from tritium.errors import CaptureError
from tritium.graph.annotate import annotate, fixed_sizes, symbolic_sizes
from tritium.graph.conditions import holds_for_every_length
from tritium.graph.stamp import Unequal, choose, only_captured, stamp

EXAMPLE_TOKENS = 8  # T = 1 would be specialised on


class InputSpec(NamedTuple):
    """dtype and sizes of a module's input, the first size, of the batch, left out."""

    dtype: torch.dtype
    sizes: tuple[int, ...] = ()


TOKEN_INPUTS: Mapping[str, InputSpec] = {"input_ids": InputSpec(torch.int64), "positions": InputSpec(torch.int64)}


@dataclass(frozen=True)
class Captured:
    """A graph and the real tensors it refers to.

    graph: the fx graph; passes change it in place.
    constants: values of the module's real buffers, and of tensors made in its code, by weight name.
    outputs: the name of each tensor that the graph returns: "output" alone, keys of a dict, numbers in a tuple.
    restriction: set when the code holds for some lengths of the input only. Most often the locality proof finds the
        node that is to blame; where it does not, this is to be raised.
    """

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    outputs: tuple[str, ...]
    restriction: CaptureError | None = None


def capture(
    module: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    inputs: Mapping[str, InputSpec] = TOKEN_INPUTS,
    is_by_name: bool = False,
    learned: Collection[str] = (),
    max_model_len: int | None = None,
    blocks: str | None = None,
) -> Captured:
    """Export `module` with a dynamic number of tokens; floating parameters are taken as `dtype` when given.

    inputs: what forward takes, in order. is_by_name: by these names, else by place, whatever forward calls them.
    learned: names of buffers whose values are weights, which other weights may replace; the others are constants.
    max_model_len: tokens that a sequence has at most; code that cuts a table to the input's length relies on it.
    blocks: the module's list of blocks, each of which reads only what the one before it gives and what is made before
        all: equal ones are then captured once and copied (stamp.py). The graph is the same, and sooner there.
    The module is left as it was. Raises `CaptureError` when it cannot be exported.
    """
    example = {
        name: torch.zeros((EXAMPLE_TOKENS, *spec.sizes), dtype=spec.dtype, device="meta")
        for name, spec in inputs.items()
    }
    is_bounded = max_model_len is not None and max_model_len > 2 * EXAMPLE_TOKENS
    num_tokens = torch.export.Dim("T", min=2, max=max_model_len - 1 if is_bounded and max_model_len else None)
    sizes = {name: {0: num_tokens} for name in inputs}
    shapes: Any = sizes if is_by_name else tuple(sizes.values())
    args, kwargs = ((), example) if is_by_name else (tuple(example.values()), {})
    restriction = None
    buffers = module.named_buffers(remove_duplicate=False)
    constants = {name: buffer for name, buffer in buffers if not buffer.is_meta and name not in learned}
    stamping = None if blocks is None else choose(module, blocks)
    with _as_meta(module, dtype), only_captured(module, stamping), torch.no_grad():
        try:
            try:
                exported = _export(module, args, shapes, kwargs)
            except torch._dynamo.exc.UserError as error:
                restriction = CaptureError(_export_failed(module, error, inputs))
                exported = _export(module, args, shapes, kwargs, is_lenient=True)
        except Exception as error:
            raise CaptureError(_export_failed(module, error, inputs)) from error
    graph = exported.graph
    tokens = _name_placeholders(graph, exported.graph_signature, _input_names(exported, inputs))
    if restriction is not None and holds_for_every_length(graph, tokens):
        restriction = None
    made = {name: t for name, t in exported.constants.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    constants |= {name: t for name, t in made.items() if name not in learned}
    annotate(graph, symbolic_sizes(tokens, max_model_len))
    if stamping is not None:
        try:
            graph = stamp(graph, stamping)
        except Unequal:
            return capture(
                module, dtype=dtype, inputs=inputs, is_by_name=is_by_name, learned=learned, max_model_len=max_model_len
            )
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta["name"] in constants:
            node.meta["value"] = constants[node.meta["name"]]
    return Captured(graph, constants, _output_names(exported), restriction)


def _export(
    module: nn.Module,
    args: tuple[torch.Tensor, ...],
    dynamic_shapes: Any,
    kwargs: Mapping[str, torch.Tensor] | None = None,
    *,
    is_lenient: bool = False,
) -> torch.export.ExportedProgram:
    """is_lenient: conditions on the number of tokens become assertions in the graph instead of errors."""
    with warnings.catch_warnings():  # torch's recurrent layers renew a list of their own weights
        warnings.filterwarnings("ignore", ".*were assigned during export")
        exported = torch.export.export(
            module,
            args,
            dict(kwargs or {}),
            dynamic_shapes=dynamic_shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=is_lenient,
        )
    if any(_is_mutating(node) for node in exported.graph.nodes):
        exported = exported.run_decompositions({})  # doubles the time; decomposes nothing, makes it functional
    return exported


def _is_mutating(node: fx.Node) -> bool:
    """True for an op that writes to one of its arguments."""
    return (
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    )


def capture_function(
    fn: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    example: Sequence[torch.Tensor],
    attributes: Mapping[str, Any],
) -> fx.Graph:
    """Export `fn(*example, **attributes)`, a spelling of an op, like a model.

    The placeholders carry the names of fn's parameters and kind "input". A size of 8 is the number of tokens.
    """

    class Spelled(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
            return fn(*tensors, **attributes)

    tensors = tuple(tensor.to("meta") for tensor in example)
    with torch.no_grad():
        graph = _export(Spelled(), tensors, None).graph
    names = iter(inspect.signature(fn).parameters)
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta |= {"kind": "input", "name": next(names)}
    annotate(graph, fixed_sizes(EXAMPLE_TOKENS))
    return graph


def _input_names(exported: torch.export.ExportedProgram, inputs: Mapping[str, InputSpec]) -> list[str]:
    """The inputs in the order of the graph's placeholders: torch sorts those given by name."""
    spec = exported.call_spec.in_spec
    assert spec is not None
    return list(spec.child(1).context or inputs)


def _output_names(exported: torch.export.ExportedProgram) -> tuple[str, ...]:
    spec = exported.call_spec.out_spec
    assert spec is not None
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
    return tuple(".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) or "output"
                 for path, _ in paths)  # fmt: skip


def _name_placeholders(graph: fx.Graph, signature: Any, input_names: Sequence[str]) -> sympy.Symbol:
    """Set kind and name of every placeholder; return torch's symbol for the number of tokens."""
    names: dict[str, str] = {}
    for spec in signature.input_specs:
        if spec.kind != torch.export.graph_signature.InputKind.USER_INPUT:
            names[spec.arg.name] = spec.target
    inputs = iter(input_names)
    for node in graph.nodes:
        if node.op == "placeholder":
            weight = names.get(node.name)
            node.meta["kind"] = "weight" if weight is not None else "input"
            node.meta["name"] = weight if weight is not None else next(inputs)
            if weight is None:
                tokens = node.meta["val"].shape[0].node.expr
    return tokens


@contextlib.contextmanager
def _as_meta(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the module is in eval mode and its tensors are meta tensors (ties kept); afterwards it is as before."""
    saved: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    training = [m for m in module.modules() if m.training]
    memo: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        for tensors, is_parameter in _tensor_dicts(owner):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                saved.append((tensors, name, tensor))
                if id(tensor) not in memo:
                    to = dtype if is_parameter and dtype is not None and tensor.is_floating_point() else tensor.dtype
                    meta = torch.empty(tensor.shape, dtype=to, device="meta")
                    memo[id(tensor)] = nn.Parameter(meta, requires_grad=False) if is_parameter else meta
                tensors[name] = memo[id(tensor)]
    try:
        module.eval()
        yield
    finally:
        for tensors, name, tensor in saved:
            tensors[name] = tensor
        for m in training:
            m.training = True


def _tensor_dicts(owner: nn.Module) -> tuple[tuple[dict[str, Any], bool], ...]:
    """The module's own parameters and buffers, by name."""
    return (owner._parameters, True), (owner._buffers, False)


def _export_failed(module: nn.Module, error: Exception, inputs: Mapping[str, InputSpec]) -> str:
    """What to tell the author of a model that torch.export refused."""
    lines = [line.strip(" -").split("For more information")[0] for line in str(error).splitlines() if line.strip()]
    text = f"{type(module).__name__} could not be captured: {type(error).__name__}: {' '.join(lines[:2])[:400]}"
    if "Constraints violated" in str(error):
        text += f". The model's code fixes its batch: it must work for every length of {', '.join(inputs)}"
    elif "two different devices" in str(error) or "expected device meta" in str(error):
        text += ". A tensor made in forward() is on another device than its inputs: register it as a buffer"
    elif "data-dependent" in str(error):
        text += ". Control flow in forward() may not depend on tensor values"
    if inputs is not TOKEN_INPUTS:
        sizes = ", ".join(f"{name} {['batch', *spec.sizes]}".replace("'", "") for name, spec in inputs.items())
        return text + f". It was called with ({sizes})"
    return text + ". The module must take (input_ids [T], positions [T]) and return logits [T, V]"

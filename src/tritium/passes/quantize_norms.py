"""Quantise a norm's rows where they are made.

Matches: `tritium.rms_norm`, `tritium.layer_norm` or the first result of `tritium.add_rms_norm` and
    `tritium.add_layer_norm`, read by nothing but quantised linears with int8 activations, as what they multiply.
Replaces with: `tritium.quantized_<norm>` with the same arguments, which gives int8 rows with their scales; the linears
    read these and name the dtype of their results. Bits do not change: the norm is rounded before it is quantised.
"""

import operator

import torch
from torch import fx

from tritium.graph.edit import arguments, insert, replace
from tritium.graph.spec import Spec, args_of, dtype_name, has_spec, spec_of, target_of
from tritium.ops.quantized import QUANTIZED_OPS, SCALE_BYTES
from tritium.passes.result import PassResult

_OURS = torch.ops.tritium
_NORMS = {
    getattr(_OURS, name).default: getattr(_OURS, f"quantized_{name}").default
    for name in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
}
_LINEARS = frozenset(getattr(_OURS, op.name).default for op in QUANTIZED_OPS)


def quantize_norms(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
        if node.target not in _NORMS:
            continue
        norm = next((user for user in node.users if _is_first(user)), None) if _gives_sum(node) else node
        if norm is not None and norm.users and all(_reads_rows(linear, norm) for linear in norm.users):
            _rewrite(node, norm)
            count += 1
    return PassResult(count)


def _gives_sum(node: fx.Node) -> bool:
    return not has_spec(node)


def _is_first(node: fx.Node) -> bool:
    return node.target is operator.getitem and args_of(node)[1] == 0


def _reads_rows(linear: fx.Node, norm: fx.Node) -> bool:
    if linear.target not in _LINEARS:
        return False
    a = arguments(linear)
    return a["x"] is norm and bool(a["int8_activations"]) and all(a[name] is not norm for name in a if name != "x")


def _rewrite(node: fx.Node, norm: fx.Node) -> None:
    graph, spec = node.graph, spec_of(norm)
    size = int(spec.shape[-1])  # type: ignore[arg-type]  # a norm's weight has it: it is a number
    rows = Spec(torch.int8, (*spec.shape[:-1], size + SCALE_BYTES))
    with graph.inserting_before(node):
        new = insert(graph, _NORMS[target_of(node)], tuple(arguments(node).values()), rows, like=node, covers=[node])
    quantised = new
    if _gives_sum(node):
        new.meta["spec"] = (rows, node.meta["spec"][1])
        with graph.inserting_after(new):
            quantised = insert(graph, operator.getitem, (new, 0), rows, like=norm, covers=[norm])
    for linear in list(norm.users):
        values = {**arguments(linear), "x": quantised, "dtype": dtype_name(spec.dtype)}
        with graph.inserting_before(linear):
            target = target_of(linear)
            other = insert(graph, target, tuple(values.values()), spec_of(linear), like=linear, covers=[linear])
        replace(linear, other)
    if _gives_sum(node):
        graph.erase_node(norm)
        for part in list(node.users):
            part.replace_input_with(node, new)
    graph.erase_node(node)

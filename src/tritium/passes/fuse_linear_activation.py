"""Apply an activation to a linear's sums before they reach memory.

Matches: `tritium.activation(linear(x, w, b), kind)`, and `tritium.gated_activation(gate, up, kind)` of the first and
    the second half of one linear's result (merge_gate_up makes it), where nothing else reads the linear; the same of a
    `tritium.quantized_linear`.
Replaces with: `tritium.linear_activation(x, w, b, kind)`; `tritium.linear_gated(x, w, b, kind)`; of a quantized_linear,
    `tritium.quantized_linear_activation` or `..._gated` with its arguments and the kind. Bits do not change.
"""

import torch
from torch import fx

from tritium.graph.edit import arguments, given, insert, replace
from tritium.graph.spec import args_of, spec_of
from tritium.passes.dead_code import remove_dead_code
from tritium.passes.result import PassResult

_OURS = torch.ops.tritium
SLICE = torch.ops.aten.slice.Tensor
ACTIVATED = {
    _OURS.linear.default: _OURS.linear_activation.default,
    _OURS.quantized_linear.default: _OURS.quantized_linear_activation.default,
}
GATED = {
    _OURS.linear.default: _OURS.linear_gated.default,
    _OURS.quantized_linear.default: _OURS.quantized_linear_gated.default,
}


def fuse_linear_activation(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
        if node.target is _OURS.activation.default:
            linear, targets = args_of(node)[0], ACTIVATED
            is_match = linear.target in ACTIVATED and len(linear.users) == 1
        elif node.target is _OURS.gated_activation.default:
            linear, targets = _halved(*args_of(node)[:2]), GATED
            is_match = linear is not None
        else:
            continue
        if is_match:
            covers = [*node.all_input_nodes, linear, node]
            with graph.inserting_before(node):
                args = (*given(linear), arguments(node)["kind"])
                new = insert(graph, targets[linear.target], args, spec_of(node), like=node, covers=_calls(covers))
            replace(node, new)
            count += 1
    remove_dead_code(graph)  # the linears without their activations
    return PassResult(count)


def _halved(gate: fx.Node, up: fx.Node) -> fx.Node | None:
    """The linear whose two halves, read by nothing else, are `gate` and `up`."""
    if not all(n.target is SLICE and len(n.users) == 1 for n in (gate, up)):
        return None
    linear, size = args_of(gate)[0], spec_of(gate).shape[-1]
    if linear.target not in GATED or args_of(up)[0] is not linear or len(linear.users) != 2:
        return None
    last, total = spec_of(linear).rank - 1, spec_of(linear).shape[-1]
    halves = [(last, 0, size, 1), (last, size, total, 1)]
    is_halved = [args_of(gate)[1:], args_of(up)[1:]] == halves and spec_of(up).shape[-1] == size
    return linear if is_halved else None


def _calls(nodes: list[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if node.op == "call_function"]

"""What the finished graph of a stateless module may consist of: ops of ours, element-wise torch, `ops/torch_ops.py`."""

import operator

import torch
from torch import fx

from tritium import ops
from tritium.engine.plan import Extent
from tritium.errors import CaptureError
from tritium.graph.edit import Target, arguments, output_node
from tritium.graph.grammar import check_arguments, check_ours, refuse, verify_form
from tritium.graph.spec import Spec, args_of, has_spec, target_of
from tritium.graph.vocabulary import FINAL, VIEWS
from tritium.ops.torch_ops import TORCH_OPS, overload

_TORCH = frozenset(map(overload, TORCH_OPS))


def verify_module(graph: fx.Graph) -> None:
    """Check a finished graph. Raises `CaptureError` with the node and why it cannot be compiled."""
    verify_form(graph)
    for node in graph.nodes:
        if node.op == "call_function":
            _check_call(node)
    results = args_of(output_node(graph))[0]
    if not any(isinstance(result, fx.Node) for result in results):
        raise CaptureError("the module returns no tensor: an engine needs at least one named output")
    for result in results:
        if result is not None and not has_spec(result):
            raise CaptureError(f"the module returns {result}, which is no tensor: return tensors, or a dict of them")


def _check_call(node: fx.Node) -> None:
    specs = node.meta["spec"] if isinstance(node.meta["spec"], tuple) and not has_spec(node) else (node.meta["spec"],)
    if node.target is operator.getitem and args_of(node)[0].target in _TORCH:
        return
    if not all(isinstance(spec, Spec) for spec in specs):
        refuse(node, "is a number made from the size of the batch; only views and fills may depend on it")
    if any(isinstance(dim, Extent) and dim.tokens < 0 for spec in specs for dim in spec.shape):
        refuse(node, "has a size that is not a multiple of the batch, plus a number")
    if not isinstance(node.target, Target):
        refuse(node, "is no torch op")
    for name, value in arguments(node).items():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, fx.Node) and not has_spec(item):
                refuse(node, f"takes the size of the batch as {name}: only views and fills may depend on it")
    check_arguments(node)
    if target_of(node).namespace == ops.library.NAMESPACE:
        if node.target is not torch.ops.tritium.attention.default:  # stateless here: one sequence, no cache
            check_ours(node, set())
    elif node.target not in FINAL | VIEWS | _TORCH:
        refuse(node, "is an op that no kernel runs: ops/torch_ops.py lists torch's ops that an engine may hold")

"""Compute once, at build, what does not depend on any input.

Matches: a call of a torch op with one tensor of at most `MAX_ELEMENTS` elements as result, of which every tensor
    argument is a constant of the model (a buffer with real numbers, a tensor made in its code, something folded
    already), or which makes a tensor out of nothing (`arange(0, 64, 2)`). Not random numbers, not sizes of the batch.
Replaces with: a constant of the engine. Parameters are not folded: their values are not known before binding, and a
    refit changes them (fold_weights.py).
"""

import math

import torch
from torch import fx

from tritium.graph.derived import insert_weight, is_weight
from tritium.graph.edit import Target, replace
from tritium.graph.spec import has_spec, spec_of, target_of
from tritium.passes.result import PassResult
from tritium.weights.recipes import Constant

MAX_ELEMENTS = 1 << 24


def fold_constants(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    values = {node: node.meta["value"] for node in graph.nodes if is_weight(node) and "value" in node.meta}
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_foldable(node, values):
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        device = {"device": None} if "device" in kwargs else {}  # the graph was captured on meta tensors
        value = target_of(node)(*args, **{**kwargs, **device}).contiguous()
        assert value.dtype == spec_of(node).dtype and list(value.shape) == list(spec_of(node).shape), node.name
        name = f"constant.{node.name}"
        constant = insert_weight(graph, name, Constant(name), spec_of(node))
        constant.meta |= {"recipe": Constant(constant.meta["name"]), "value": value}
        values[constant] = value
        replace(node, constant)
        count += 1
    return PassResult(count)


def _is_foldable(node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> bool:
    target = target_of(node)
    if not isinstance(target, Target) or not has_spec(node) or target.namespace != "aten":
        return False
    spec = spec_of(node)
    if spec.batch_dims or math.prod(d for d in spec.shape if isinstance(d, int)) > MAX_ELEMENTS:
        return False
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return all(n in values for n in node.all_input_nodes)


def constants_of(graph: fx.Graph) -> dict[str, torch.Tensor]:
    """The values of all constants that something reads, by weight name."""
    nodes = [node for node in graph.nodes if is_weight(node) and node.users and "value" in node.meta]
    return {node.meta["name"]: node.meta["value"] for node in nodes}

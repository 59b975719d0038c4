"""Write repetitions along the batch so that no number of the graph depends on the batch's size.

Matches: `aten.expand`, `expand_as`, `broadcast_to` and `aten.repeat` of something that is repeated along the batch, and
    whose repeated sizes are all 1; `zeros`, `ones` and `full`, in every form, of sizes that depend on the batch.
Replaces with: `aten.expand` whose size along the batch is written as in a plan, "T"; of a constant with one element.
"""

import torch
from torch import fx

from tritium.engine.plan import Extent
from tritium.graph.derived import insert_weight
from tritium.graph.edit import arguments, insert, insert_inferred, replace
from tritium.graph.spec import Dim, Spec, args_of, has_spec, spec_of, target_of
from tritium.passes.result import PassResult
from tritium.weights.recipes import Constant

aten = torch.ops.aten
REPETITIONS = {aten.expand.default, aten.expand_as.default, aten.broadcast_to.default, aten.repeat.default}
FILLS = {
    aten.zeros.default: 0, aten.ones.default: 1, aten.new_zeros.default: 0, aten.new_ones.default: 1,
    aten.full.default: None, aten.new_full.default: None,
}  # fmt: skip


def expand_along_batch(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not has_spec(node):
            continue
        x = _repeated(node) if node.target in REPETITIONS else _filling(node) if node.target in FILLS else None
        if x is None:
            continue
        sizes = [str(dim) if isinstance(dim, Extent) else dim for dim in spec_of(node).shape]
        with graph.inserting_before(node):
            new = insert(graph, aten.expand.default, (x, sizes), spec_of(node), like=node, covers=[node])
        replace(node, new)
        count += 1
    return PassResult(count)


def _repeated(node: fx.Node) -> fx.Node | None:
    """What `node` repeats, with as many dimensions; None where fixed sizes say all (views.py writes those)."""
    x, shape = args_of(node)[0], spec_of(node).shape
    old: tuple[Dim, ...] = (1,) * (len(shape) - spec_of(x).rank) + spec_of(x).shape
    if len(node.all_input_nodes) < 2 or any(was not in (1, new) for was, new in zip(old, shape, strict=True)):
        return None
    if spec_of(x).rank == len(shape):
        return x
    with node.graph.inserting_before(node):
        sizes = [-1 if isinstance(dim, Extent) else dim for dim in old]
        return insert_inferred(node.graph, aten.view.default, (x, sizes), like=node)


def _filling(node: fx.Node) -> fx.Node | None:
    """A constant of one element with the number that fills the node's value."""
    fixed, spec = FILLS[target_of(node)], spec_of(node)
    number = arguments(node)["fill_value"] if fixed is None else fixed
    if not spec.batch_dims or not isinstance(number, (bool, int, float)):
        return None
    name, shape = f"constant.{node.name}", (1,) * spec.rank
    constant = insert_weight(node.graph, name, Constant(name), Spec(spec.dtype, shape))
    value = torch.full(shape, number, dtype=spec.dtype)
    constant.meta |= {"recipe": Constant(constant.meta["name"]), "value": value}
    return constant

"""Write bags of one length as a lookup and a sum: torch's bags need offsets, numbers made from the batch's size.

Matches: `aten.embedding_bag(weight, ids [n·B], arange(0, n·B, n), mode)` without weights of its own and without a
    padding id, of which only the bags are read: what `nn.EmbeddingBag` does with ids [B, n].
Replaces with: `tritium.embedding`, seen as [B, n, D], and its `sum`, `mean` or `amax` over n.
"""

import operator

import torch
from torch import fx

from tritium.graph.edit import arguments, insert_inferred, replace
from tritium.graph.spec import NUM_TOKENS, Extent, args_of, spec_of
from tritium.passes.result import PassResult

aten = torch.ops.aten
BAGS = {aten.embedding_bag.padding_idx, aten.embedding_bag.default}
MODES = {0: aten.sum.dim_IntList, 1: aten.mean.dim, 2: aten.amax.default}


def split_bags(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
        length = _bag_length(node) if node.target in BAGS else None
        if length is None:
            continue
        a = arguments(node)
        with graph.inserting_before(node):
            rows = insert_inferred(graph, torch.ops.tritium.embedding.default, (a["indices"], a["weight"]), like=node)
            bags = insert_inferred(graph, aten.view.default, (rows, [-1, length, spec_of(rows).shape[1]]), like=node)
            new = insert_inferred(graph, MODES[a["mode"]], (bags, [1]), like=node)
        new.meta["covers"] = node.meta["covers"]
        for user in list(node.users):
            replace(user, new)
        graph.erase_node(node)
        count += 1
    return PassResult(count)


def _bag_length(node: fx.Node) -> int | None:
    """How many ids each bag has, when all have as many."""
    a = arguments(node)
    offsets = a["offsets"]
    is_plain = a["per_sample_weights"] is None and not a["include_last_offset"] and a.get("padding_idx") in (None, -1)
    reads_bags = all(user.target is operator.getitem and args_of(user)[1] == 0 for user in node.users if user.users)
    if not is_plain or not reads_bags or offsets.target is not aten.arange.start_step or args_of(offsets)[0] != 0:
        return None
    length = args_of(offsets)[2]
    is_even = isinstance(length, int) and spec_of(offsets).shape == (NUM_TOKENS,)
    return length if is_even and spec_of(a["indices"]).shape == (Extent(tokens=length),) else None

"""Split a model over ranks that share every layer (tensor parallelism).

Matches: a linear of a value that comes, through views, rope, norms of single heads, activations, element-wise calls and
    attention alone, from linears with weights of their own, where heads and widths divide by the number of ranks;
    `tritium.moe` whose experts' width divides; a look-up of token ids in a table whose rows divide; the linear that
    gives the logits, when the vocabulary divides. What does not divide is computed by every rank.
Replaces with: linears of this rank's rows (whole heads; one kv head for several ranks when there are fewer than ranks),
    `tritium.all_reduce` of a linear, or moe, of this rank's columns, a bias added by rank 0 alone;
    `all_reduce(embedding_part(ids, rows))`; `all_gather` of this rank's logits. `all_reduce(x) + all_reduce(y)` becomes
    `all_reduce(x + y)`. Weights are recipes: slices of what they were. Results differ by the rounding of partial sums.
"""

import torch
from torch import fx

from tritium.graph.derived import insert_weight, is_weight, recipe_of
from tritium.graph.edit import arguments, insert, output_node, replace
from tritium.graph.spec import args_of, dtype_name, has_spec, spec_of
from tritium.graph.vocabulary import POINTWISE
from tritium.mapping import Ranks
from tritium.passes.cut_regions import Cut, cut_heads, region_before
from tritium.passes.merging import LINEAR, is_mergeable
from tritium.passes.result import PassResult
from tritium.weights.recipes import Concat, Recipe, Slice, Zeros

_OURS = torch.ops.tritium
MOE, EMBEDDING, ADD = _OURS.moe.default, _OURS.embedding.default, torch.ops.aten.add.Tensor
ALL_REDUCE = _OURS.all_reduce.default


def shard(graph: fx.Graph, ranks: Ranks) -> PassResult:
    """See the module's docstring."""
    if any(node.target is ALL_REDUCE for node in graph.nodes):
        return PassResult(0)  # it is a rank's graph already
    counts = {
        "linears": sum(_linear(node, ranks) for node in list(graph.nodes) if is_mergeable(node)),
        "moe": sum(_moe(node, ranks) for node in list(graph.nodes) if node.target is MOE),
        "vocabulary": _vocabulary(graph, ranks),
    }
    _reduce_sums(graph)
    return PassResult(sum(counts.values()), tuple(counts.items()))


def _linear(last: fx.Node, ranks: Ranks) -> bool:
    """Cut what `last` reads, and its columns."""
    region = region_before(last, ranks)
    if region is None:
        return False
    for node, cut in region.items():
        if node.target is LINEAR:
            _take_rows(node, cut, ranks)
        else:
            cut_heads(node, cut, ranks)
        shape = list(spec_of(node).shape)
        start, stop = _share(shape[cut.dim], cut.num_parts, ranks)
        shape[cut.dim] = stop - start
        node.meta["spec"] = spec_of(node).with_shape(tuple(shape))
    weight, bias = arguments(last)["weight_NK"], arguments(last)["bias"]
    part = _part(weight, 1, *_share(spec_of(weight).shape[1], ranks.tensor_parallel, ranks))
    if bias is not None and ranks.rank:
        zeros = Zeros(tuple(spec_of(bias).shape), dtype_name(spec_of(bias).dtype))  # type: ignore[arg-type]
        bias = insert_weight(last.graph, f"{bias.meta['name']}.shard", zeros, spec_of(bias))
    last.args = (args_of(last)[0], part, bias)
    _reduced(last)
    return True


def _take_rows(node: fx.Node, cut: Cut, ranks: Ranks) -> None:
    """This rank's rows of a linear's weight and bias."""
    x, weight, bias = args_of(node)[:3]
    rows = _share(spec_of(weight).shape[0], cut.num_parts, ranks)
    node.args = (x, _part(weight, 0, *rows), None if bias is None else _part(bias, 0, *rows))


def _moe(node: fx.Node, ranks: Ranks) -> bool:
    """This rank's part of every expert's width."""
    a = arguments(node)
    gate_up, down = a["gate_up_EGD"], a["down_EDF"]
    hidden = spec_of(down).shape[2]
    share = ranks.share(hidden, ranks.tensor_parallel) if isinstance(hidden, int) else None
    if share is None or not all(is_weight(w) and len(w.users) == 1 for w in (gate_up, down)):
        return False
    start, stop = share
    experts, _, width = spec_of(gate_up).shape
    tree = recipe_of(gate_up)
    halves = Concat((Slice(tree, 1, start, stop), Slice(tree, 1, hidden + start, hidden + stop)), 1)  # type: ignore[operator]
    spec = spec_of(gate_up).with_shape((experts, 2 * (stop - start), width))
    joint = insert_weight(node.graph, f"{gate_up.meta['name']}.shard", halves, spec)
    node.args = (*args_of(node)[:2], joint, _part(down, 2, start, stop), *args_of(node)[4:])
    _reduced(node)
    return True


def _vocabulary(graph: fx.Graph, ranks: Ranks) -> int:
    """Rows of the table of tokens and of the linear that gives the logits, which may be one weight."""
    logits = _before_logits(graph)
    tables = {args_of(n)[1]: n for n in graph.nodes if n.target is EMBEDDING and _are_token_ids(args_of(n)[0])}
    weights = dict.fromkeys([*tables, *([] if logits is None else [arguments(logits)["weight_NK"]])])
    count = 0
    for weight in weights:
        readers = list(weight.users)
        is_known = all(n is logits or n is tables.get(weight) for n in readers)
        rows = spec_of(weight).shape[0]
        share = ranks.share(rows, ranks.tensor_parallel) if is_weight(weight) and isinstance(rows, int) else None
        if share is None or not is_known:
            continue
        part = _part(weight, 0, *share)
        for node in readers:
            _look_up(node, part, share[0]) if node.target is EMBEDDING else _logits(node, part, ranks)
            count += 1
    return count


def _look_up(node: fx.Node, part: fx.Node, first: int) -> None:
    with node.graph.inserting_before(node):
        args = (args_of(node)[0], part, first)
        new = insert(node.graph, _OURS.embedding_part.default, args, spec_of(node), like=node, covers=[node])
    replace(node, new)
    _reduced(new)


def _logits(node: fx.Node, part: fx.Node, ranks: Ranks) -> None:
    bias = args_of(node)[2]
    whole = spec_of(node)
    share = _share(whole.shape[-1], ranks.tensor_parallel, ranks)
    node.args = (args_of(node)[0], part, None if bias is None else _part(bias, 0, *share))
    node.meta["spec"] = whole.with_shape((*whole.shape[:-1], share[1] - share[0]))
    with node.graph.inserting_after(node):
        new = insert(node.graph, _OURS.all_gather.default, (node, ranks.tensor_parallel), whole, like=node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _before_logits(graph: fx.Graph) -> fx.Node | None:
    """The linear that the logits are made of, element by element, when nothing else reads it."""
    (node,) = output_node(graph).all_input_nodes
    while node.target in POINTWISE and len([n for n in node.all_input_nodes if spec_of(n).batch_dims]) == 1:
        (node,) = [n for n in node.all_input_nodes if spec_of(n).batch_dims]
    is_owned = node.target is LINEAR and len(node.users) == 1 and is_weight(arguments(node)["weight_NK"])
    return node if is_owned else None


def _are_token_ids(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["name"] == "input_ids"


def _reduced(node: fx.Node) -> None:
    """Every reader of `node` reads the sum of all ranks'."""
    with node.graph.inserting_after(node):
        new = insert(node.graph, ALL_REDUCE, (node,), spec_of(node), like=node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _reduce_sums(graph: fx.Graph) -> None:
    """One reduction for two values that are added and read nowhere else."""
    for node in list(graph.nodes):
        if node.target is ADD and all(has_spec(n) for n in args_of(node)[:2]):
            parts = args_of(node)[:2]
            is_pair = all(n.target is ALL_REDUCE and len(n.users) == 1 for n in parts) and parts[0] is not parts[1]
            if is_pair and arguments(node)["alpha"] == 1 and spec_of(parts[0]) == spec_of(parts[1]):
                node.args = (args_of(parts[0])[0], args_of(parts[1])[0], *args_of(node)[2:])
                for part in parts:
                    graph.erase_node(part)
                _reduced(node)


def _share(size: object, num_parts: int, ranks: Ranks) -> tuple[int, int]:
    share = ranks.share(size, num_parts) if isinstance(size, int) else None
    assert share is not None, (size, num_parts)  # region_before has tried it
    return share


def _part(weight: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
    """A slice of a weight, as a weight."""
    shape = list(spec_of(weight).shape)
    shape[dim] = stop - start
    tree: Recipe = Slice(recipe_of(weight), dim, start, stop)
    return insert_weight(weight.graph, f"{weight.meta['name']}.shard", tree, spec_of(weight).with_shape(tuple(shape)))

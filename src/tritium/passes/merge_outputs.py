"""Let what leaves an attention and an MLP beside it share one linear, over both their inputs.

Matches: a sum, of any number of values of one shape and type, two of which are linears that nothing else reads, with
    weights that nothing else reads; in bf16 one of the two has inputs that fill whole tiles.
Replaces with: `tritium.linear_pair(x, y, w, b)` for the two, with the weight `concat(w1, w2)` along the inputs and the
    bias `sum(b1, b2)`; what else is summed stays, in its order, before it.
Bits change, towards the exact result: one fp32 sum over both parts' inputs, rounded once, where each part was rounded
    and then their sum. Not of quantised linears, where a row's one scale would have to serve two inputs of different
    size; but e4m3 has the same relative step at every size: quantize_rows.py runs this for pairs that it `accepts`.
"""

from collections.abc import Callable

import torch
from torch import fx

from tritium.graph.derived import insert_weight, joint_name, recipe_of
from tritium.graph.edit import arguments, insert, replace
from tritium.graph.spec import args_of, has_spec, spec_of
from tritium.passes.dead_code import remove_dead_code
from tritium.passes.merging import is_mergeable
from tritium.passes.result import PassResult
from tritium.weights.recipes import Concat, Sum

ADD, PAIR = torch.ops.aten.add.Tensor, torch.ops.tritium.linear_pair.default
TILE_INPUTS = 32  # of bf16: a kernel begins the second input at a tile of its own


def merge_outputs(graph: fx.Graph, accepts: Callable[[list[fx.Node]], bool] = lambda pair: True) -> PassResult:
    """See the module's docstring. accepts: whether the two linears, in the order of their inputs, shall be one."""
    count = 0
    for node in list(graph.nodes):
        if is_sum(node) and not any(is_sum(user) and len(node.users) == 1 for user in node.users):
            terms, sums = _terms(node)
            pair = _pair_of(terms)
            if pair is not None and accepts(pair):
                _rewrite(node, [term for term in terms if term not in pair], pair, sums)
                count += 1
    remove_dead_code(graph)  # the two linears, and their sums
    return PassResult(count)


def is_sum(node: fx.Node) -> bool:
    """True for a sum of two values of its own shape and type."""
    if node.target is not ADD or arguments(node)["alpha"] != 1:
        return False
    return all(has_spec(term) and spec_of(term) == spec_of(node) for term in args_of(node)[:2])


def _terms(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What is summed, through sums that nothing else reads, in order; and those sums, the last one first."""
    terms, sums = [], [node]
    for term in args_of(node)[:2]:
        if is_sum(term) and len(term.users) == 1:
            inner, more = _terms(term)
            terms += inner
            sums += more
        else:
            terms.append(term)
    return terms, sums


def _pair_of(terms: list[fx.Node]) -> list[fx.Node] | None:
    """The first two linears, the one with inputs in whole tiles before the other."""
    found = [term for term in terms if is_mergeable(term) and len(term.users) == 1][:2]
    found.sort(key=lambda linear: not _fills_tiles(linear))
    return found if len(found) == 2 and _fills_tiles(found[0]) else None


def _fills_tiles(linear: fx.Node) -> bool:
    weight = spec_of(arguments(linear)["weight_NK"])
    num_in = weight.shape[1]
    return isinstance(num_in, int) and (weight.dtype != torch.bfloat16 or num_in % TILE_INPUTS == 0)


def _rewrite(node: fx.Node, rest: list[fx.Node], pair: list[fx.Node], sums: list[fx.Node]) -> None:
    graph = node.graph
    (x, w1, _), (y, w2, _) = (args_of(linear)[:3] for linear in pair)
    first, second = spec_of(w1).shape, spec_of(w2).shape
    name = joint_name([w1.meta["name"], w2.meta["name"]])
    spec = spec_of(w1).with_shape((first[0], first[1] + second[1]))  # type: ignore[operator]  # numbers, both
    weight = insert_weight(graph, name, Concat((recipe_of(w1), recipe_of(w2)), 1), spec)
    total = node
    with graph.inserting_before(node):
        args = (x, y, weight, _bias(pair, name))
        new = insert(graph, PAIR, args, spec_of(node), like=pair[0], covers=[*pair, *sums])
        for i, term in enumerate([*rest, new]):
            total = term if i == 0 else insert(graph, ADD, (total, term), spec_of(node), like=node, covers=sums)
    replace(node, total)


def _bias(pair: list[fx.Node], weight_name: str) -> fx.Node | None:
    """The biases added up; None when neither has one."""
    given = [bias for linear in pair if (bias := arguments(linear)["bias"]) is not None]
    if len(given) < 2:
        return given[0] if given else None
    name = f"{weight_name.removesuffix('.weight')}.bias"
    return insert_weight(pair[0].graph, name, Sum(tuple(map(recipe_of, given))), spec_of(given[0]))

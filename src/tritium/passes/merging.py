"""What the passes that merge linears share: which may be merged, and the merged one with slices in their places."""

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from tritium.graph.derived import insert_weight, is_weight, joint_name, recipe_of
from tritium.graph.edit import arguments, insert, insert_inferred, replace
from tritium.graph.spec import Spec, args_of, dtype_name, spec_of, target_of
from tritium.graph.vocabulary import VIEWS
from tritium.weights.recipes import Concat, Zeros

_OURS = torch.ops.tritium
LINEAR = _OURS.linear.default
SLICE = torch.ops.aten.slice.Tensor
THROUGH = frozenset({*VIEWS, _OURS.rope.default, _OURS.rms_norm.default, _OURS.layer_norm.default})


def is_mergeable(node: object) -> bool:
    """True for a linear whose weight and bias are weights of the graph that nothing else reads."""
    if not isinstance(node, fx.Node) or node.target is not LINEAR:
        return False
    a = arguments(node)
    owned = [a["weight_NK"], *([] if a["bias"] is None else [a["bias"]])]
    return all(is_weight(n) and len(n.users) == 1 for n in owned)


def linear_behind(node: fx.Node, through: Iterable[object] = VIEWS) -> fx.Node | None:
    """The mergeable linear that `node` is, seen through calls of `through` that nothing else reads on the way."""
    while node.op == "call_function" and node.target in through:
        node = args_of(node)[0]
    return node if is_mergeable(node) else None


def by_input(linears: Iterable[fx.Node | None]) -> list[list[fx.Node]]:
    """Different linears of one dtype that read one value, two or more of them, in the order given."""
    groups: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = {}
    for node in dict.fromkeys(linears):
        if node is not None:
            key = (args_of(node)[0], spec_of(arguments(node)["weight_NK"]).dtype)
            groups.setdefault(key, []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def merge_linears(linears: Sequence[fx.Node]) -> fx.Node:
    """Put one linear in the place of several that read one value; each becomes a slice of it. Returns the linear.

    Element (t, n) of the merged product is the same sum over K as before, so no value changes. A linear without a bias
    beside one that has it gets zeros.
    """
    graph, x = linears[0].graph, args_of(linears[0])[0]
    order = {node: place for place, node in enumerate(graph.nodes)}
    first = min(linears, key=order.__getitem__)
    weights = [arguments(node)["weight_NK"] for node in linears]
    sizes = [int(spec_of(w).shape[0]) for w in weights]  # type: ignore[arg-type]
    spec = spec_of(weights[0]).with_shape((sum(sizes), spec_of(weights[0]).shape[1]))
    name = joint_name([w.meta["name"] for w in weights])
    weight = insert_weight(graph, name, Concat(tuple(map(recipe_of, weights)), 0), spec)
    bias = _joint_bias(linears, sizes, name)
    with graph.inserting_before(first):
        out_spec = spec_of(first).with_shape((*spec_of(first).shape[:-1], sum(sizes)))
        merged = insert(graph, LINEAR, (x, weight, bias), out_spec, like=first, covers=linears)
        end, parts = 0, []
        for node, size in zip(linears, sizes, strict=True):
            start, end = end, end + size
            part = insert_inferred(graph, SLICE, (merged, spec_of(first).rank - 1, start, end), like=node)
            part.meta |= {"spec": spec_of(node), "covers": node.meta["covers"]}
            parts.append(part)
    for node, part in zip(linears, parts, strict=True):
        replace(node, part)
    return merged


def _joint_bias(linears: Sequence[fx.Node], sizes: Sequence[int], weight_name: str) -> fx.Node | None:
    """The biases one after the other; None when no linear has one."""
    biases = [arguments(node)["bias"] for node in linears]
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    spec: Spec = spec_of(given[0]).with_shape((sum(sizes),))
    parts = tuple(
        Zeros((size,), dtype_name(spec.dtype)) if bias is None else recipe_of(bias)
        for bias, size in zip(biases, sizes, strict=True)
    )
    name = f"{weight_name.removesuffix('.weight')}.bias"
    return insert_weight(linears[0].graph, name, Concat(parts, 0), spec)


def reaches(node: fx.Node, targets: frozenset[object]) -> bool:
    """True when the value flows, through views, rope and norms alone, into a call of one of `targets`."""
    for user in node.users:
        if user.op != "call_function":
            continue
        if target_of(user) in targets or (user.target in THROUGH and reaches(user, targets)):
            return True
    return False

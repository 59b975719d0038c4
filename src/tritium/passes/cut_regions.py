"""Which calls before a linear can be computed part by part, one dimension of each cut into a part for each rank.

A view is cut where the sizes in front of the dimension are the same on both sides: a part is then the same run of
elements in both shapes. Attention is cut by heads, kv heads by those that its query heads read.
"""

from typing import Any, NamedTuple

import torch
from torch import fx

from tritium.engine.plan import Extent
from tritium.graph.derived import insert_weight, is_weight, recipe_of
from tritium.graph.edit import arguments
from tritium.graph.spec import Dim, args_of, has_spec, spec_of
from tritium.graph.vocabulary import POINTWISE
from tritium.mapping import Ranks
from tritium.passes.merging import LINEAR, is_mergeable
from tritium.weights.recipes import Constant, Slice

_OURS, aten = torch.ops.tritium, torch.ops.aten
VIEW, PERMUTE = aten.view.default, aten.permute.default
ATTENTION, ROPE, GATHER = _OURS.attention.default, _OURS.rope.default, _OURS.gather_rows.default
NORMS = (_OURS.rms_norm.default, _OURS.layer_norm.default)
ELEMENTWISE = frozenset({*POINTWISE, _OURS.activation.default, _OURS.gated_activation.default})


class Cut(NamedTuple):
    """Dimension `dim` of a value is cut into `num_parts` equal parts, of which a rank has one."""

    dim: int
    num_parts: int


def region_before(last: fx.Node, ranks: Ranks) -> dict[fx.Node, Cut] | None:
    """How each call that leads to the linear `last` is cut, in graph order; None when one cannot be, or no linear is.

    Nothing outside the region reads what is inside.
    """
    region: dict[fx.Node, Cut] = {}
    x = args_of(last)[0]
    if not _collect(x, Cut(spec_of(x).rank - 1, ranks.tensor_parallel), region, ranks):
        return None
    if not any(node.target is LINEAR for node in region):
        return None
    if any(user is not last and user not in region for node in region for user in node.users):
        return None
    return {node: region[node] for node in last.graph.nodes if node in region}


def _collect(node: Any, cut: Cut, region: dict[fx.Node, Cut], ranks: Ranks) -> bool:
    """Note how `node` and all that it is made of are cut; False when one cannot be."""
    if not has_spec(node) or node.op != "call_function":
        return False
    if node in region:
        return region[node] == cut
    size = spec_of(node).shape[cut.dim]
    if isinstance(size, Extent) or ranks.share(size, cut.num_parts) is None:
        return False
    region[node] = cut
    if node.target is LINEAR:
        return is_mergeable(node) and cut.dim == spec_of(node).rank - 1
    before = _cuts_before(node, cut, ranks)
    return before is not None and all(_collect(x, inner, region, ranks) for x, inner in before)


def _cuts_before(node: fx.Node, cut: Cut, ranks: Ranks) -> list[tuple[Any, Cut]] | None:
    """The arguments that must be cut for `node` to be, and how; None when no cut of them does it."""
    args = args_of(node)
    if node.target is VIEW:
        dim = _same_place(spec_of(args[0]).shape, spec_of(node).shape, cut)
        return None if dim is None else [(args[0], Cut(dim, cut.num_parts))]
    if node.target is PERMUTE:
        return [(args[0], Cut(args[1][cut.dim] % spec_of(node).rank, cut.num_parts))]
    if node.target is ROPE:
        return [(args[0], cut)] if cut.dim == 1 else None
    if node.target is GATHER:
        return [(args[0], cut)] if cut.dim else None
    if node.target in NORMS:
        return [(args[0], cut)] if cut.dim != spec_of(node).rank - 1 else None
    if node.target is ATTENTION:
        return _before_attention(node, cut, ranks)
    if node.target in ELEMENTWISE:
        back = cut.dim - spec_of(node).rank
        wide = [x for x in node.all_input_nodes if spec_of(x).rank >= -back and spec_of(x).shape[back] != 1]
        return [(x, Cut(spec_of(x).rank + back, cut.num_parts)) for x in wide]
    return None


def _before_attention(node: fx.Node, cut: Cut, ranks: Ranks) -> list[tuple[Any, Cut]] | None:
    a = arguments(node)
    num_kv, slopes = spec_of(a["k_TKH"]).shape[1], a["alibi_slopes_N"]
    if cut.dim != 1 or isinstance(num_kv, Extent) or (slopes is not None and not is_weight(slopes)):
        return None
    kv_parts = cut.num_parts if num_kv % cut.num_parts == 0 else num_kv
    if ranks.share(num_kv, kv_parts) is None:
        return None
    return [(a["q_TNH"], cut), (a["k_TKH"], Cut(1, kv_parts)), (a["v_TKH"], Cut(1, kv_parts))]


def _same_place(before: tuple[Dim, ...], after: tuple[Dim, ...], cut: Cut) -> int | None:
    """The dimension of `before` whose parts are those of `after`'s dimension `cut.dim`."""
    for dim, size in enumerate(before):
        divides = isinstance(size, int) and size % cut.num_parts == 0
        if divides and _product(before[:dim]) == _product(after[: cut.dim]):
            return dim
    return None


def _product(sizes: tuple[Dim, ...]) -> tuple[int, tuple[Dim, ...]]:
    number = 1
    for size in sizes:
        number *= size if isinstance(size, int) else 1
    return number, tuple(size for size in sizes if isinstance(size, Extent))


def cut_heads(node: fx.Node, cut: Cut, ranks: Ranks) -> None:
    """Change what a call says of the dimension itself: a view's size, the heads' slopes."""
    share = ranks.share(spec_of(node).shape[cut.dim], cut.num_parts)  # type: ignore[arg-type]
    assert share is not None  # `_collect` has tried it
    start, stop = share
    if node.target is VIEW:
        sizes = list(args_of(node)[1])
        if sizes[cut.dim] != -1:
            sizes[cut.dim] = stop - start
        node.args = (args_of(node)[0], sizes)
    if node.target is ATTENTION and (slopes := arguments(node)["alibi_slopes_N"]) is not None:
        name = f"{slopes.meta['name']}.shard"
        part = insert_weight(
            node.graph, name, Slice(recipe_of(slopes), 0, start, stop), spec_of(slopes).with_shape((stop - start,))
        )
        if "value" in slopes.meta:
            part.meta |= {"recipe": Constant(part.meta["name"]), "value": slopes.meta["value"][start:stop].contiguous()}
        node.args = (*args_of(node)[:7], part)

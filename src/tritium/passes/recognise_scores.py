"""Find attention that is written as products and a softmax, whatever scales, masks and biases the scores on the way.

Matches: `aten.matmul(aten.softmax(S, -1), v)` on [N, T, H] values, leading sizes of 1 and casts allowed, where S is
    made of `aten.matmul(q, kᵀ)` and of values that depend on nothing but the number of tokens and constants.
    What happens to the scores is not compared with known forms but run, on trial scores of several lengths: it must be
    a scale, plus a bias that grows linearly with the distance (ALiBi) or none, for the keys that a query may see, and
    very negative for the others; and those it may see must be the ones up to itself, perhaps inside a window.
Replaces with: `tritium.attention(q, k, v, scale, window=..., alibi_slopes=...)` between permutations.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import fx

from tritium.engine.plan import Extent
from tritium.graph.derived import insert_weight, is_weight
from tritium.graph.edit import insert, insert_inferred, replace
from tritium.graph.spec import NUM_TOKENS, Spec, args_of, has_spec, spec_of, target_of
from tritium.passes.result import PassResult
from tritium.weights.recipes import Constant

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
CAST, VIEW, PERMUTE, EXPAND = aten.to.dtype, aten.view.default, aten.permute.default, aten.expand.default
# Their values depend on their argument's sizes alone.
FILLS = {
    aten.zeros_like.default: 0, aten.ones_like.default: 1, aten.new_zeros.default: 0, aten.new_ones.default: 1,
}  # fmt: skip
COMPARISONS = {
    aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor,
    aten.ge.Tensor, aten.eq.Scalar, aten.ne.Scalar,
}  # fmt: skip
SHORTEST, LONGEST = 7, 1024  # trial lengths, in tokens; a window that is longer would not show
HIDDEN = -1e4  # a score that is this much below another has no weight, in fp16 either


class _Unknown(Exception):
    """A value that the number of tokens and constants do not determine."""


class Scores(NamedTuple):
    """What is done to q kᵀ before the softmax. slopes: [N], or None."""

    scale: float
    window: int
    slopes: torch.Tensor | None


def recognise_scores(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
        if node.target in PRODUCTS and (found := _find(node)) is not None:
            q, k, v, scores = found
            with graph.inserting_before(node):
                replace(node, _attention(node, q, k, v, scores, _between(node, {q, k, v})))
            count += 1
    return PassResult(count)


def _find(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, Scores] | None:
    """q, kᵀ and v of the attention that ends in this product, and what is done to its scores."""
    weights, v = args_of(node)[:2]
    while weights.target in (CAST, VIEW, EXPAND):
        weights = args_of(weights)[0]
    if weights.target not in SOFTMAX or args_of(weights)[1] not in (-1, spec_of(weights).rank - 1):
        return None
    product = _product_behind(args_of(weights)[0])
    if product is None or not _is_square(spec_of(product)) or not _has_heads(spec_of(v)):
        return None
    scores = _try(args_of(weights)[0], product)
    q, k = args_of(product)[:2]
    return None if scores is None else (q, k, v, scores)


def _product_behind(node: fx.Node) -> fx.Node | None:
    """The one product of two values of the tokens that `node` is computed from."""
    found, waiting, seen = set(), [node], {node}
    while waiting:
        current = waiting.pop()
        if current.target in PRODUCTS and all(spec_of(n).batch_dims for n in current.all_input_nodes):
            found.add(current)
            continue
        if current.target in FILLS:
            continue
        new = [n for n in current.all_input_nodes if n not in seen]
        seen.update(new)
        waiting += new
    return found.pop() if len(found) == 1 else None


def _is_square(spec: Spec) -> bool:
    """[..., N, T, T] with leading ones."""
    return spec.rank >= 3 and spec.shape[-2:] == (NUM_TOKENS, NUM_TOKENS) and all(d == 1 for d in spec.shape[:-3])


def _has_heads(spec: Spec) -> bool:
    """[..., N, T, H] with leading ones."""
    return spec.rank >= 3 and spec.shape[-2] == NUM_TOKENS and all(d == 1 for d in spec.shape[:-3])


def _try(result: fx.Node, product: fx.Node) -> Scores | None:
    """Run what lies between `product` and `result`; None when it is no attention's."""
    numbers = _compared(result, product)
    longest = max([2 * int(n) + SHORTEST for n in numbers], default=SHORTEST) + SHORTEST
    if longest > LONGEST:
        return None
    found = [_try_length(result, product, length) for length in (SHORTEST, longest)]
    first, last = found
    if first is None or last is None or first.scale != last.scale:
        return None
    if (first.slopes is None) != (last.slopes is None):
        return None
    if first.slopes is not None and last.slopes is not None and not torch.allclose(first.slopes, last.slopes):
        return None
    return last


def _try_length(result: fx.Node, product: fx.Node, length: int) -> Scores | None:
    shape = _sizes(spec_of(product), length)
    draw = torch.Generator().manual_seed(0)
    trial = torch.rand(shape, generator=draw, dtype=torch.float32) + 0.5
    try:
        with_zero = _run(result, product, torch.zeros(shape), length)
        with_trial = _run(result, product, trial, length)
    except (_Unknown, RuntimeError, TypeError, ValueError, IndexError):
        return None
    bias_NTT, with_trial, trial = (x.float().expand(shape).reshape(shape[-3:]) for x in (with_zero, with_trial, trial))
    scale = round(float((with_trial - bias_NTT)[0, 0, 0] / trial[0, 0, 0]), 7)
    places = torch.arange(length)
    distance_TT = places[:, None] - places[None, :]
    own_N = bias_NTT.diagonal(dim1=1, dim2=2)
    relative = bias_NTT - own_N[:, :, None]
    is_seen = relative[0] > HIDDEN
    last_row = int(is_seen[-1].sum())
    window = last_row if last_row < length else 0
    expected = (distance_TT >= 0) & (distance_TT < (window or length))
    if not scale or not torch.equal(is_seen, expected) or not (relative[:, ~expected] <= HIDDEN).all():
        return None
    slopes_N = relative[:, 1, 0].neg()
    linear = torch.where(expected, -slopes_N[:, None, None] * distance_TT, relative)
    is_linear = torch.allclose(linear, relative, rtol=1e-5, atol=1e-5)
    is_scaled = torch.allclose((with_trial - bias_NTT)[:, expected], scale * trial[:, expected], rtol=1e-4, atol=1e-4)
    if not is_linear or not is_scaled:
        return None
    return Scores(scale, window, slopes_N if bool(slopes_N.any()) else None)


def _compared(result: fx.Node, product: fx.Node) -> list[float]:
    """Numbers that places are compared with on the way: a window shows beyond them only."""
    numbers, waiting, seen = [], [result], {result, product}
    while waiting:
        node = waiting.pop()
        if node.target in COMPARISONS:
            numbers += [abs(a) for a in args_of(node)[1:] if isinstance(a, (int, float))]
        new = [n for n in node.all_input_nodes if n not in seen and node.target not in FILLS]
        seen.update(new)
        waiting += new
    return numbers


def _run(result: fx.Node, product: fx.Node, value: torch.Tensor, length: int) -> torch.Tensor:
    """`result` for an input of `length` tokens at positions from 0, with `value` in the product's place.

    In fp32, whatever the model rounds to: the op does not round scores, and roundings would hide what is tried.
    """
    known: dict[fx.Node, Any] = {product: value}

    def number(node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node not in known:
            known[node] = compute(node)
        return known[node]

    def compute(node: fx.Node) -> Any:
        if node.op == "placeholder":
            if is_weight(node) and "value" in node.meta:
                return node.meta["value"]
            if node.meta["name"] == "positions":
                return torch.arange(length)
            raise _Unknown(node.name)
        if isinstance(node.meta["spec"], Extent):
            return node.meta["spec"].tokens * length + node.meta["spec"].constant
        if node.target in FILLS and has_spec(node):
            return torch.full(_sizes(spec_of(node), length), FILLS[target_of(node)], dtype=spec_of(node).dtype)
        if node.target in (VIEW, EXPAND) and has_spec(node):
            x = number(args_of(node)[0])
            sizes = _sizes(spec_of(node), length)
            return x.reshape(sizes) if node.target is VIEW else x.expand(sizes)
        if node.target is CAST and spec_of(node).dtype.is_floating_point:
            return number(args_of(node)[0]).to(torch.float32)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), number)
        device = {"device": None} if "device" in kwargs else {}
        return target_of(node)(*args, **{**kwargs, **device})

    found: torch.Tensor = number(result)
    return found


def _sizes(spec: Spec, length: int) -> list[int]:
    return [d.tokens * length + d.constant if isinstance(d, Extent) else d for d in spec.shape]


def _between(node: fx.Node, inputs: Collection[fx.Node]) -> list[fx.Node]:
    """All calls that `node` is computed by from the inputs, itself too, in the graph's order."""
    found, waiting = {node}, [node]
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if n.op == "call_function" and n not in found]
        new = [n for n in new if n not in inputs]
        found.update(new)
        waiting += new
    return [n for n in node.graph.nodes if n in found]


def _attention(
    node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, scores: Scores, covers: Collection[fx.Node]
) -> fx.Node:
    """The op and the layout of the product it replaces."""
    graph, dtype = node.graph, spec_of(v).dtype
    k = insert_inferred(graph, PERMUTE, (k, [*range(spec_of(k).rank - 2), spec_of(k).rank - 1, spec_of(k).rank - 2]),
                        like=node)  # fmt: skip
    q, k, v = (_tokens_first(node, x, dtype) for x in (q, k, v))
    slopes = None
    if scores.slopes is not None:
        name = f"constant.{node.name}.alibi_slopes"
        slopes = insert_weight(graph, name, Constant(name), Spec(torch.float32, tuple(scores.slopes.shape)))
        slopes.meta |= {"recipe": Constant(slopes.meta["name"]), "value": scores.slopes}
    args = (q, k, v, scores.scale, True, scores.window, 0.0, slopes)
    shape = (*spec_of(q).shape[:2], spec_of(v).shape[2])
    spec = Spec(dtype, shape)
    out_TNH = insert(graph, torch.ops.tritium.attention.default, args, spec, like=node, covers=covers)
    out = insert_inferred(graph, PERMUTE, (out_TNH, [1, 0, 2]), like=node)
    out = insert_inferred(
        graph, VIEW, (out, [-1 if isinstance(d, Extent) else d for d in spec_of(node).shape]), like=node
    )
    return out if spec_of(node).dtype == dtype else insert_inferred(graph, CAST, (out, spec_of(node).dtype), like=node)


def _tokens_first(node: fx.Node, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """[..., N, T, H] as [T, N, H], in `dtype`: attention computes in fp32 by itself."""
    heads, _, size = spec_of(x).shape[-3:]
    if spec_of(x).dtype != dtype:
        x = insert_inferred(node.graph, CAST, (x, dtype), like=node)
    x_NTH = insert_inferred(node.graph, VIEW, (x, [heads, -1, size]), like=node)
    return insert_inferred(node.graph, PERMUTE, (x_NTH, [1, 0, 2]), like=node)

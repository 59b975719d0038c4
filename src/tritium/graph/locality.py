"""The proof that a model works token by token outside attention. DESIGN "Capture" states it; nothing is assumed.

For every live node we know the dimension that runs over the tokens, or that there is none. An op is admitted by a rule
that says in which dimension its result runs over them, and that element t of the result reads element t of the
arguments only. What no rule admits is refused with the node, the reason and the line of the model's code. The proof is
what makes one captured sequence stand for a packed batch of several.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import fx

from tritium.errors import CaptureError
from tritium.graph import vocabulary
from tritium.graph.edit import Target, arguments
from tritium.graph.spec import NUM_TOKENS, Spec, args_of, has_spec, spec_of

aten = torch.ops.aten
TokenDim = int | None  # index of the dimension that runs over the tokens; None: the value is the same for all
Dims = dict[fx.Node, TokenDim]

POSITIONS_HINT = "what depends on the place in the sequence must be computed from the argument `positions`"

ATTENTION_HINT = "Attention is to be written as tritium.ops.attention, or torch's scaled_dot_product_attention"
SHARED_BY_TOKENS = ("inv_freq_P", "alibi_slopes_N", "gate_up_EGD", "down_EDF")
CUT = "takes some of the tokens (a shift, or a cut)"


class _Mixes(Exception):
    """Why a node is not token-local."""


def prove_token_local(graph: fx.Graph) -> Dims:
    """Return the token dimension of every value. Raises `CaptureError` for the first node that mixes tokens."""
    dims: Dims = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            dims[node] = 0 if node.meta["kind"] == "input" else None
        elif node.op == "call_function":
            try:
                dims[node] = _token_dim(node, dims)
            except _Mixes as reason:
                _refuse(node, str(reason))
    return dims


def _refuse(node: fx.Node, reason: str) -> NoReturn:
    inputs = ", ".join(f"{n.name}: {n.meta['spec']}" for n in node.all_input_nodes)
    raise CaptureError(
        f"the model is not token-local: {node.name} = {node.target}({inputs}) {reason}. At {node.meta['source']}. "
        "Outside attention a token may not see other tokens: requests are packed into one batch"
    )


def _token_dim(node: fx.Node, dims: Dims) -> TokenDim:
    """The token dimension of the node's result; raises `_Mixes`."""
    spec = node.meta["spec"]
    if not isinstance(spec, tuple):
        return None  # a number made from the number of tokens; what reads it is refused below
    rule = RULES.get(node.target)
    if node.target not in vocabulary.VIEWS and any(not isinstance(n.meta["spec"], tuple) for n in node.all_input_nodes):
        raise _Mixes(f"reads the number of tokens; {POSITIONS_HINT}")
    if all(dims[n] is None for n in node.all_input_nodes):
        if any(isinstance(s, Spec) and s.batch_dims for s in (spec if type(spec) is tuple else (spec,))):
            raise _Mixes(f"makes a value of its own for every token; {POSITIONS_HINT}")
        return None
    if rule is None:
        raise _Mixes("is an op of which it is not known whether it works token by token")
    return rule(node, dims)


def _pointwise(node: fx.Node, dims: Dims) -> TokenDim:
    """Arguments are aligned from the right; all that run over the tokens must do so in one place."""
    rank = spec_of(node).rank
    found: dict[int, fx.Node] = {}
    for arg in node.all_input_nodes:
        dim = dims[arg]
        if dim is not None:
            found.setdefault(dim - spec_of(arg).rank, arg)
    if len(found) > 1:
        raise _Mixes(f"combines every token with every other (T x T). {ATTENTION_HINT}")
    (place,) = found
    for arg in node.all_input_nodes:
        spec = spec_of(arg)
        if dims[arg] is None and spec.rank >= -place and spec.shape[place] != 1:
            raise _Mixes(f"needs {arg.name} to have one element per token")
    return place + rank


def _only(node: fx.Node, x: fx.Node, dims: Dims, otherwise: str) -> int:
    """The token dimension of `x`, which must be the only argument that has one."""
    place = dims[x]
    if place is None or any(dims[n] is not None for n in node.all_input_nodes if n is not x):
        raise _Mixes(otherwise)
    return place


def _along_dim(node: fx.Node, dims: Dims) -> TokenDim:
    """Anything along other dimensions than the tokens'; the result loses those dimensions or keeps them as 1."""
    a = arguments(node)
    x, rank = args_of(node)[0], spec_of(args_of(node)[0]).rank
    place = _only(node, x, dims, "takes elements of one token by the values of another")
    chosen = a.get("dim", a.get("dims"))
    chosen = list(range(rank)) if chosen is None or chosen == [] else [chosen] if isinstance(chosen, int) else chosen
    removed = {d % rank for d in chosen}
    if place in removed:
        raise _Mixes("works along the tokens")
    specs = node.meta["spec"]
    result_rank = (specs if has_spec(node) else specs[0]).rank
    if result_rank == rank:
        return place
    return place - sum(d < place for d in removed)


def _along_last(node: fx.Node, dims: Dims) -> TokenDim:
    x = args_of(node)[0]
    place = _only(node, x, dims, "has weights that depend on the tokens")
    if place >= spec_of(x).rank - len(args_of(node)[1]):
        raise _Mixes("normalises along the tokens")
    return place


def _last_only(node: fx.Node, dims: Dims) -> TokenDim:
    """Ops of x [..., D] that work along D, with weights: linear, rms_norm, layer_norm."""
    x = args_of(node)[0]
    place = _only(node, x, dims, "has weights that depend on the tokens")
    if place == spec_of(x).rank - 1:
        raise _Mixes("works along the tokens")
    return place


def _product(node: fx.Node, dims: Dims) -> TokenDim:
    """A product with a weight on the right; the token dimension is not the one that is summed."""
    factors = args_of(node)[1:3] if node.target is aten.addmm.default else args_of(node)[:2]
    left, right = factors
    both = dims[left] is not None and dims[right] is not None
    reason = (
        f"multiplies tokens with tokens (T x T). {ATTENTION_HINT}"
        if both
        else "has the tokens on the right of a product"
    )
    place = _only(node, left, dims, reason)
    if place == spec_of(left).rank - 1:
        raise _Mixes("sums over the tokens")
    return place + spec_of(node).rank - spec_of(left).rank


def _view(node: fx.Node, dims: Dims) -> TokenDim:
    x = args_of(node)[0]
    before, after = spec_of(x), spec_of(node)
    (dim,) = after.batch_dims if len(after.batch_dims) == 1 else (None,)
    if dim is None or len(before.batch_dims) != 1:
        raise _Mixes("has not exactly one size that depends on the number of tokens")
    if _count(after.shape[:dim]) != _count(before.shape[: dims[x]]):
        raise _Mixes("folds the tokens into another dimension")
    return dim


def _count(shape: Sequence[Any]) -> int:
    return math.prod(shape)


def _permute(node: fx.Node, dims: Dims) -> TokenDim:
    return [d % spec_of(node).rank for d in args_of(node)[1]].index(dims[args_of(node)[0]])


def _slice(node: fx.Node, dims: Dims) -> TokenDim:
    x = args_of(node)[0]
    if args_of(node)[1] % spec_of(x).rank == dims[x]:
        raise _Mixes(CUT)
    return dims[x]


def _expand(node: fx.Node, dims: Dims) -> TokenDim:
    x = args_of(node)[0]
    if len(spec_of(node).batch_dims) != 1:
        raise _Mixes("repeats a value along the tokens")
    return _only(node, x, dims, "") + spec_of(node).rank - spec_of(x).rank


def _join(node: fx.Node, dims: Dims) -> TokenDim:
    tensors: Sequence[fx.Node] = args_of(node)[0]
    places = {dims[t] for t in tensors}
    (place,) = places if len(places) == 1 else (None,)
    if place is None:
        raise _Mixes("joins a value that runs over the tokens with one that does not")
    rank = spec_of(node).rank
    dim = arguments(node)["dim"] % rank
    if node.target is aten.stack.default:
        return place + (dim <= place)
    if dim == place:
        raise _Mixes("appends to the tokens")
    return place


def _lookup(node: fx.Node, dims: Dims) -> TokenDim:
    """Rows of a table by token: the ids run over the tokens, the table does not."""
    tensors = node.all_input_nodes
    table, ids = (
        (args_of(node)[1], args_of(node)[0]) if _is_ours(node, "embedding") else (args_of(node)[0], args_of(node)[1])
    )
    if isinstance(ids, (list, tuple)):
        if len(ids) != 1 or len(tensors) != 2:
            raise _Mixes("indexes in a way that is not known to work token by token")
        (ids,) = ids
    if dims[table] is not None:
        raise _Mixes("gathers values of other tokens")
    return dims[ids]


def _tokens_first(node: fx.Node, dims: Dims) -> TokenDim:
    """Our ops on [T, ...] values: rope, rope_cos_sin, moe, attention."""
    for name, arg in arguments(node).items():
        if not isinstance(arg, fx.Node):
            continue
        if name in SHARED_BY_TOKENS:
            if dims[arg] is not None:
                raise _Mixes(f"needs {name} to be the same for all tokens")
        elif dims[arg] != 0 or spec_of(arg).shape[0] != NUM_TOKENS:
            raise _Mixes(f"needs {name} to have the tokens in front")
    return 0


def _experts(node: fx.Node, dims: Dims) -> TokenDim:
    """Every token goes through experts of its own choice; what they are made of is the same for all."""
    a = arguments(node)
    if any(dims[a[name]] != 0 for name in ("x_TD", "chosen_TJ", "weights_TJ")):
        raise _Mixes("needs values, choices and weights to have the tokens in front")
    if any(dims[a[name]] is not None for name in ("gate_up_EGD", "down_EDF")):
        raise _Mixes("has weights that depend on the tokens")
    return 0


def _getitem(node: fx.Node, dims: Dims) -> TokenDim:
    return dims[args_of(node)[0]]


def _never(reason: str) -> Callable[[fx.Node, Dims], TokenDim]:
    def rule(node: fx.Node, dims: Dims) -> TokenDim:
        raise _Mixes(reason)

    return rule


def _is_ours(node: fx.Node, name: str) -> bool:
    return isinstance(node.target, Target) and node.target._schema.name == f"tritium::{name}"


def _rules() -> dict[Any, Callable[[fx.Node, Dims], TokenDim]]:
    ours = torch.ops.tritium
    rules: dict[Any, Callable[[fx.Node, Dims], TokenDim]] = {}
    for targets, rule in (
        (vocabulary.POINTWISE, _pointwise),
        (vocabulary.ALONG_DIM, _along_dim),
        (vocabulary.ALONG_LAST, _along_last),
        (vocabulary.PRODUCTS, _product),
        (vocabulary.JOINS, _join),
        ((aten.embedding.default, aten.index.Tensor, ours.embedding.default), _lookup),
        ((ours.linear.default, ours.rms_norm.default, ours.layer_norm.default), _last_only),
        ((ours.activation.default, ours.gated_activation.default), _pointwise),
        ((ours.rope.default, ours.rope_cos_sin.default, ours.moe.default, ours.attention.default), _tokens_first),
    ):
        rules |= dict.fromkeys(targets, rule)
    not_attention = "is attention in a form that is not recognised (causal, no mask, no dropout, one sequence is)"
    return rules | {
        aten.view.default: _view,
        aten.permute.default: _permute,
        aten.slice.Tensor: _slice,
        aten.select.int: _never(CUT),
        aten.expand.default: _expand,
        operator.getitem: _getitem,
        ours.experts.default: _experts,
        aten.scaled_dot_product_attention.default: _never(not_attention),
    }


RULES = _rules()

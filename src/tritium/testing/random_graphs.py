"""Random decoders as captured graphs, to try passes on: written in torch's calls and in ours, as people write models.

`choose(options)` decides everything, so that a property test can draw and shrink; the first option is the simplest.
Sizes: T tokens, D width, N heads, K kv heads, H head size, P rotated pairs, F an MLP's width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from tritium import ops
from tritium.graph.edit import insert_inferred, insert_input
from tritium.graph.source import Source
from tritium.graph.spec import NUM_TOKENS, Spec, spec_of

aten = torch.ops.aten
VOCAB_SIZE, WIDTH, NUM_HEADS, HEAD_SIZE, MLP_WIDTH = 61, 24, 4, 6, 20
MAX_POSITIONS = 40
LARGEST = 2**63 - 1  # "to the end"
FROM_PLACE = Source("random", "random_graphs.py:1")
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu")
Choose = Callable[[Sequence[Any]], Any]


class RandomGraph(NamedTuple):
    """graph: as capture makes it. values: of its weights and constants, by name. dtype: of its activations."""

    graph: fx.Graph
    values: dict[str, torch.Tensor]
    dtype: torch.dtype


def random_decoder(choose: Choose) -> RandomGraph:
    """A decoder of one or two blocks: input_ids [T], positions [T] -> logits [T, V], in fp32 or bf16."""
    b = Builder(choose, choose((torch.float32, torch.float32, torch.bfloat16)))
    table = b.weight(VOCAB_SIZE, WIDTH)
    x = b(ops.embedding, b.ids, table) if b.chance() else b(aten.embedding.default, table, b.ids)
    if b.chance(4):
        x = b.add(x, b(aten.embedding.default, b.weight(MAX_POSITIONS, WIDTH), b.positions))
    for _ in range(choose((2, 1, 2))):
        x = _block(b, x)
    x = _norm(b, x)
    b.graph.output(b(aten.linear.default, x, table) if b.chance(3) else _linear(b, x, VOCAB_SIZE))
    list(b.graph.nodes)[-1].meta = {"spec": None, "source": Source(), "covers": ()}
    return RandomGraph(b.graph, b.values, b.dtype)


class Builder:
    """Appends calls to a graph, keeps the values of its weights, and remembers what may be read a second time."""

    def __init__(self, choose: Choose, dtype: torch.dtype) -> None:
        self.choose = choose
        self.dtype = dtype
        self.graph = fx.Graph()
        self.values: dict[str, torch.Tensor] = {}
        self.shared: dict[tuple[int, ...], fx.Node] = {}
        self.memo: dict[Any, Any] = {}
        self._draw = torch.Generator().manual_seed(0)
        self.ids, self.positions = (self._first_input(name) for name in ("input_ids", "positions"))

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call, in the form that torch.export gives it."""
        node = insert_inferred(self.graph, target, args, like=self.ids, kwargs=kwargs)
        node.meta |= {"source": FROM_PLACE, "covers": (node.name,)}
        return node

    def add(self, x: fx.Node, y: Any) -> fx.Node:
        """x + y."""
        return self(aten.add.Tensor, x, y)

    def mul(self, x: fx.Node, y: Any) -> fx.Node:
        """x * y."""
        return self(aten.mul.Tensor, x, y)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """x in `dtype`."""
        return x if spec_of(x).dtype == dtype else self(aten.to.dtype, x, dtype)

    def chance(self, one_in: int = 2) -> bool:
        """True for one choice of `one_in`."""
        return bool(self.choose([False] * (one_in - 1) + [True]))

    def weight(self, *shape: int) -> fx.Node:
        """A parameter: about 1 in vectors, for norms; a matrix keeps the scale of what it reads."""
        value = torch.randn(*shape, generator=self._draw)
        value = 1 + 0.3 * value if len(shape) == 1 else value * 1.5 * shape[-1] ** -0.5
        return self.constant(value.to(self.dtype), is_learned=True)

    def constant(self, value: torch.Tensor, *, is_learned: bool = False) -> fx.Node:
        """A tensor of the model; its number is known to the compiler unless it is learned."""
        name = f"w{len(self.values)}"
        node = insert_input(self.graph, "weight", name, Spec(value.dtype, tuple(value.shape)))
        if not is_learned:
            node.meta["value"] = value
        self.values[name] = value
        return node

    def once(self, make: Callable[..., Any], *args: Any) -> Any:
        """What `make(self, *args)` gives, made at its first use."""
        if (make, args) not in self.memo:
            self.memo[make, args] = make(self, *args)
        return self.memo[make, args]

    def _first_input(self, name: str) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta = {"kind": "input", "name": name, "spec": Spec(torch.int64, (NUM_TOKENS,)), "source": Source(),
                     "covers": ()}  # fmt: skip
        return node


def _block(b: Builder, x: fx.Node) -> fx.Node:
    """Attention and an MLP, one after the other or both of one value; residual sums in any order."""
    layout = b.choose(("parallel", "serial", "two norms", "norms behind", "parallel"))
    if layout == "serial":
        x = _sum(b, x, _attention(b, _norm(b, x)))
        return _sum(b, x, _mlp(b, _norm(b, x)))
    if layout == "norms behind":
        x = _norm(b, _sum(b, x, _attention(b, x)))
        return _norm(b, _sum(b, x, _mlp(b, x)))
    first = _norm(b, x)
    second = first if layout == "parallel" else _norm(b, x)
    return _sum(b, x, _attention(b, first), _mlp(b, second))


def _sum(b: Builder, x: fx.Node, *others: fx.Node) -> fx.Node:
    """The sum of all, in an order that is drawn; sometimes part of it is read once more."""
    rest = [x, *others]
    total = rest.pop(b.choose(range(len(rest))))
    while rest:
        y = rest.pop(b.choose(range(len(rest))))
        total = b.add(y, total) if b.chance() else b.add(total, y)
    return b.add(total, b.mul(b.choose((x, *others)), 0.5)) if b.chance(6) else total


def _norm(b: Builder, x: fx.Node) -> fx.Node:
    kind = b.choose(("ours", "spelled", "gemma", "layer", "layer without bias", "layer without weights"))
    size = int(spec_of(x).shape[-1])  # type: ignore[arg-type]
    if kind == "layer without weights":
        return _layer_norm(b, x, size, None, None)
    weight = b.weight(size)
    if kind == "ours":
        return b(ops.rms_norm, x, weight, 1e-5)
    if kind.startswith("layer"):
        return _layer_norm(b, x, size, weight, b.weight(size) if kind == "layer" else None)
    wide = b.cast(x, torch.float32)
    mean = b(aten.mean.dim, b(aten.pow.Tensor_Scalar, wide, 2), [-1], True)
    h = b.mul(wide, b(aten.rsqrt.default, b.add(mean, 1e-5)))
    if kind == "gemma":
        return b.cast(b.mul(h, b.add(b.cast(weight, torch.float32), 1.0)), b.dtype)
    return b.mul(weight, b.cast(h, b.dtype)) if b.chance() else b.cast(b.mul(weight, h), b.dtype)


def _layer_norm(b: Builder, x: fx.Node, size: int, weight: fx.Node | None, bias: fx.Node | None) -> fx.Node:
    return b(aten.layer_norm.default, x, [size], weight, bias, 1e-5, False)  # as torch.export writes F.layer_norm


def _linear(b: Builder, x: fx.Node, size: int) -> fx.Node:
    """x [..., K] -> [..., size]; the weight as it is, transposed, cut out of a larger one, or one used before."""
    num_in = int(spec_of(x).shape[-1])  # type: ignore[arg-type]
    form = b.choose(("plain", "plain", "plain", "plain", "matmul", "transposed", "cut", "shared"))
    bias = b.weight(size) if form != "matmul" and b.chance() else None
    if form == "matmul":
        return b(aten.matmul.default, x, b.weight(num_in, size))
    if form == "transposed":
        weight = b(aten.permute.default, b.weight(num_in, size), [1, 0])
    elif form == "cut":
        weight = b(aten.slice.Tensor, b.weight(size + 3, num_in), 0, 0, size)
    else:
        shared = b.shared.get((size, num_in))
        weight = shared if form == "shared" and shared is not None else b.weight(size, num_in)
        b.shared[size, num_in] = weight
    return b(aten.linear.default, x, weight, bias)


def _activation(b: Builder, x: fx.Node) -> fx.Node:
    kind = b.choose(("silu", "silu written out", "gelu", "gelu tanh", "relu", "quick gelu", "ours", "in two spellings"))
    if kind == "in two spellings":
        return b.add(b(aten.silu.default, x), b.mul(x, b(aten.sigmoid.default, x)))
    if kind == "silu written out":
        return b.mul(x, b(aten.sigmoid.default, x))
    if kind == "quick gelu":
        return b.mul(x, b(aten.sigmoid.default, b.mul(x, 1.702)))
    if kind == "gelu tanh":
        return b(aten.gelu.default, x, approximate="tanh")
    if kind == "ours":
        return b(ops.activation, x, b.choose(KINDS))
    return b({"silu": aten.silu.default, "gelu": aten.gelu.default, "relu": aten.relu.default}[kind], x)


def _mlp(b: Builder, x: fx.Node) -> fx.Node:
    kind = b.choose(("plain", "gated", "gated", "one linear", "moe"))
    if kind == "moe":
        experts = (b.weight(3, 2 * MLP_WIDTH, WIDTH), b.weight(3, WIDTH, MLP_WIDTH))
        router = b(aten.linear.default, x, b.weight(3, WIDTH))
        return b(ops.moe, x, router, *experts, 2, b.chance(), b.choose(KINDS))
    if kind == "plain":
        return _linear(b, _activation(b, _linear(b, x, MLP_WIDTH)), WIDTH)
    if kind == "gated":
        gate, up = _linear(b, x, MLP_WIDTH), _linear(b, x, MLP_WIDTH)
    else:
        both = _linear(b, x, 2 * MLP_WIDTH)
        gate, up = (b(aten.slice.Tensor, both, 1, *ends) for ends in ((0, MLP_WIDTH), (MLP_WIDTH, 2 * MLP_WIDTH)))
    gate = _activation(b, gate)
    h = b.mul(gate, up) if b.chance() else b.mul(up, gate)
    return _linear(b, b.add(h, gate) if b.chance(6) else h, WIDTH)


def _kv_heads(b: Builder) -> tuple[int, bool]:
    """How many all layers have, and whether they are repeated for their query heads."""
    return b.choose((2, NUM_HEADS, 1)), not b.chance(4)


def _attention(b: Builder, x: fx.Node) -> fx.Node:
    """q, k and v by one linear or several, normed and rotated or not, in the layouts that models use."""
    num_kv, is_repeated = b.once(_kv_heads)
    form = b.choose(("sdpa", "written out", "ours", "written out", "alibi")) if is_repeated else "ours"
    heads = (NUM_HEADS, num_kv, num_kv)
    if b.chance(4):
        ends = [HEAD_SIZE * sum(heads[:i]) for i in range(4)]
        joint = _linear(b, x, ends[-1])
        parts = [b(aten.slice.Tensor, joint, 1, ends[i], ends[i + 1]) for i in range(3)]
    else:
        parts = [_linear(b, x, n * HEAD_SIZE) for n in heads]
    q, k, v = (b(aten.view.default, part, [-1, n, HEAD_SIZE]) for part, n in zip(parts, heads, strict=True))
    if b.chance(5):
        q, k = _norm(b, q), _norm(b, k)
    if form != "alibi":
        q, k = _rotated(b, q, k)
    window = b.choose((0, 5)) if form in ("ours", "written out") else 0
    scale = b.choose((HEAD_SIZE**-0.5, 0.3))
    k, v = (_repeated(b, a) if is_repeated else a for a in (k, v))
    if form == "ours":
        out = b(ops.attention, q, k, v, scale, True, window)
    else:
        out = _written(b, form, q, k, v, scale, window)
    return _linear(b, b(aten.view.default, out, [-1, WIDTH]), WIDTH)


def _written(b: Builder, form: str, q: fx.Node, k: fx.Node, v: fx.Node, scale: float, window: int) -> fx.Node:
    """Attention in torch's calls: [T, N, H]."""
    q, k, v = (b(aten.permute.default, a, [1, 0, 2]) for a in (q, k, v))
    if form == "sdpa":
        q, k, v = (b(aten.unsqueeze.default, a, 0) for a in (q, k, v))
        out = b(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, True, scale=scale)
        return b(aten.squeeze.dim, b(aten.permute.default, out, [0, 2, 1, 3]), 0)
    scores = b.mul(b(aten.matmul.default, q, b(aten.permute.default, k, [0, 2, 1])), scale)
    distance = b.once(_distance)
    if form == "alibi":
        slopes = b.constant(torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=b.dtype).view(NUM_HEADS, 1, 1))
        scores = b(aten.sub.Tensor, scores, b.mul(slopes, distance))
    hidden = b(aten.lt.Scalar, distance, 0)
    if window:
        hidden = b(aten.logical_or.default, hidden, b(aten.ge.Scalar, distance, window))
    scores = b(aten.masked_fill.Scalar, scores, hidden, b.choose((-math.inf, torch.finfo(b.dtype).min)))
    weights = b.cast(b(aten.softmax.int, scores, -1, torch.float32), b.dtype)
    out = b(aten.matmul.default, weights, v)
    return b(aten.permute.default, out, [1, 0, 2])


def _distance(b: Builder) -> fx.Node:
    """[T, T]: by how many places a key stands before a query."""
    length = b.graph.call_function(aten.sym_size.int, (b.ids, 0))
    length.meta = {"spec": NUM_TOKENS, "source": FROM_PLACE, "covers": (length.name,)}
    places = b(aten.arange.default, length)
    return b(aten.sub.Tensor, b(aten.unsqueeze.default, places, 1), b(aten.unsqueeze.default, places, 0))


def _repeated(b: Builder, x: fx.Node) -> fx.Node:
    """[T, K, H] -> [T, N, H]."""
    num_heads = int(spec_of(x).shape[1])  # type: ignore[arg-type]
    if num_heads == NUM_HEADS:
        return x
    wide = b(aten.expand.default, b(aten.unsqueeze.default, x, 2), [-1, -1, NUM_HEADS // num_heads, -1])
    return b(aten.reshape.default, wide, [-1, NUM_HEADS, HEAD_SIZE])


def _rotated(b: Builder, q: fx.Node, k: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Rotary embeddings of all pairs or of the first two, halves or every two, or none."""
    form = b.choose(("half", "none", "half", "ours", "every two"))
    size = b.choose((HEAD_SIZE, HEAD_SIZE, 4))
    if form == "none":
        return q, k
    if form == "ours":
        frequencies = b.once(_frequencies, size)
        cos_sin = b(ops.rope_cos_sin, b.positions, frequencies)
        return tuple(b(ops.rope, a, cos_sin, False) for a in (q, k))  # type: ignore[return-value]
    cos, sin = b.once(_cos_and_sin, size, form) if b.chance() else _cos_and_sin(b, size, form)
    if b.chance(3):  # heads in front of the tokens
        q, k = (b(aten.permute.default, a, [1, 0, 2]) for a in (q, k))
        q, k = (b(aten.permute.default, _rotate(b, a, cos, sin, size, form), [1, 0, 2]) for a in (q, k))
        return q, k
    cos, sin = (b(aten.unsqueeze.default, a, 1) for a in (cos, sin))
    return tuple(_rotate(b, a, cos, sin, size, form) for a in (q, k))  # type: ignore[return-value]


def _rotate(b: Builder, x: fx.Node, cos: fx.Node, sin: fx.Node, size: int, form: str) -> fx.Node:
    whole = x
    if size < HEAD_SIZE:
        x = b(aten.slice.Tensor, x, 2, 0, size)
    if form == "half":
        first, second = (b(aten.slice.Tensor, x, 2, *ends) for ends in ((0, size // 2), (size // 2, LARGEST)))
        turned = b(aten.cat.default, [b(aten.neg.default, second), first], -1)
    else:
        even, odd = (b(aten.slice.Tensor, x, 2, start, LARGEST, 2) for start in (0, 1))
        turned = b(aten.flatten.using_ints, b(aten.stack.default, [b(aten.neg.default, odd), even], -1), -2)
    x = b.add(b.mul(x, cos), b.mul(turned, sin))
    if size == HEAD_SIZE:
        return x
    return b(aten.cat.default, [x, b(aten.slice.Tensor, whole, 2, size, LARGEST)], -1)


def _frequencies(b: Builder, size: int) -> fx.Node:
    """[P]: a buffer of the model, or computed where it is used."""
    if b.chance():
        return b.constant(100.0 ** -(torch.arange(0, size, 2) / size))
    steps = b(aten.arange.start_step, 0, size, 2, dtype=torch.float32)
    return b(aten.reciprocal.default, b(aten.pow.Scalar, 100.0, b(aten.div.Tensor, steps, float(size))))


def _cos_and_sin(b: Builder, size: int, form: str) -> tuple[fx.Node, fx.Node]:
    """[T, 2 P] each, as `form` wants them."""
    positions = b(aten.to.dtype, b(aten.unsqueeze.default, b.positions, 1), torch.float32)
    angles = b.mul(positions, b(aten.unsqueeze.default, b.once(_frequencies, size), 0))
    if form == "half":
        angles = b(aten.cat.default, [angles, angles], -1)
    cos, sin = (b.cast(b(function, angles), b.dtype) for function in (aten.cos.default, aten.sin.default))
    if form == "every two":
        cos, sin = (b(aten.repeat_interleave.self_int, x, 2, -1) for x in (cos, sin))
    return cos, sin

"""The rows (`pass_cases.py`) of passes that bring a captured graph to one form and find our ops in it. T is 8."""

import torch
import torch.nn.functional as F

from tritium import ops
from tritium.graph.foreign import registered
from tritium.ops.op import Op, Spelling, like_first
from tritium.passes.batch_views import expand_along_batch
from tritium.passes.canonicalise import canonicalise
from tritium.passes.dead_code import remove_dead_code, remove_duplicates
from tritium.passes.embedding_bags import split_bags
from tritium.passes.fold_constants import fold_constants
from tritium.passes.recognise import recognise
from tritium.passes.recognise_attention import read_shared_heads, recognise_attention
from tritium.passes.recognise_plugins import recognise_plugins
from tritium.passes.recognise_products import recognise_products
from tritium.passes.recognise_rotary import recognise_rotary
from tritium.passes.recognise_scores import recognise_scores
from tritium.passes.views import canonicalise_views
from tritium.testing.pass_cases import Case, Row, opened_plugin

Tensor = torch.Tensor


def x(*shape: int) -> Tensor:
    """Random numbers, [8, 6] unless told otherwise."""
    return torch.randn(shape or (8, 6), generator=torch.Generator().manual_seed(sum(shape)))


def rms_norm(a: Tensor, w: Tensor) -> Tensor:
    """A spelling of the op."""
    return a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-5) * w


def attend(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = True) -> Tensor:
    """Attention by torch, of [T, N, H]."""
    q, k, v = (a.transpose(0, 1) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(0, 1)


def scores(q: Tensor, k: Tensor, positions: Tensor, window: int) -> Tensor:
    """[N, T, T]: weights of attention written out, over a window when it is not 0, over what comes when it is -1."""
    q, k = (a.transpose(0, 1) for a in (q, k))
    distance = positions[:, None] - positions[None, :]
    hidden = distance > 0 if window < 0 else distance < 0
    if window > 0:
        hidden = hidden | (distance >= window)
    return torch.softmax(((q @ k.transpose(1, 2)) * 0.5).masked_fill(hidden, -torch.inf), dim=-1)


def written(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, window: int = 0) -> Tensor:
    """Attention written out, of [T, N, H]."""
    return (scores(q, k, positions, window) @ v.transpose(0, 1)).transpose(0, 1)


def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over each kv head repeated for three query heads."""
    return ops.attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), 0.5)


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over kv heads in another order."""
    return ops.attention(q, torch.cat((k, k, k), 1), torch.cat((v, v, v), 1), 0.5)


def angles(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """[T, P]."""
    return positions[:, None].float() * inv_freq[None, :]


def gated(a: Tensor, b: Tensor) -> Tensor:
    """A gate that is read once more."""
    gate = F.silu(a)
    return gate * b + gate


def leaky(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Weights of attention that something else reads."""
    weights = scores(q, k, positions, 0)
    return (weights @ v.transpose(0, 1)).transpose(0, 1) + weights.sum((0, 2))[:, None, None]


def reused_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Repeated heads that something else reads."""
    wide = k.repeat_interleave(3, 1)
    return ops.attention(q, wide, v.repeat_interleave(3, 1), 0.5) + wide


def twice_rotated(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Angles whose own cosine is read too."""
    turned = angles(positions, inv_freq)
    return turned.cos() + turned.sin() * turned.cos() + turned


def two_rotations(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Positions turned by what was turned before."""
    once = angles(positions, inv_freq).cos()
    return once * angles(positions, inv_freq * 2.0).cos()


def stacked(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """A cosine of a cosine."""
    return angles(positions, inv_freq).cos().cos()


def bags(ids: Tensor, table: Tensor) -> Tensor:
    """Bags of two ids."""
    return F.embedding_bag(ids, table, mode="sum")


def bags_of_one_list(ids: Tensor, table: Tensor) -> Tensor:
    """One id in each bag, weighted: torch has no offsets to leave out."""
    return F.embedding_bag(ids, table, mode="sum", per_sample_weights=torch.ones_like(ids, dtype=torch.float32))


def repeated(a: Tensor, w: Tensor) -> Tensor:
    """A row for every element of the batch."""
    return w.expand(a.shape[0], -1) * a


def twice_repeated(a: Tensor, w: Tensor) -> Tensor:
    """The same row, read twice, and one made of it."""
    rows = w.expand(a.shape[0], -1)
    return rows * a + rows.exp().sum(-1, keepdim=True)


def filled(a: Tensor) -> Tensor:
    """Repetitions of a fill."""
    return a.new_ones(a.shape[0], 1).expand(a.shape[0], 6) * a


def doubled(a: Tensor) -> Tensor:
    """The plugin's op."""
    return torch.tanh(a) * 2.0


PLUGIN_OP = Op(
    name="doubled",
    schema="doubled(Tensor a) -> Tensor",
    reference=doubled,
    fake=like_first,
    spellings=(Spelling(name="plain", fn=doubled, example=lambda dtype: (torch.randn(8, 48, dtype=dtype),)),),
)
HEADS = (x(8, 6, 4), x(8, 6, 4), x(8, 6, 5)[..., :4])
GROUPED = (x(8, 6, 4), x(8, 2, 4), x(8, 2, 5)[..., :4])
WRITTEN = (*HEADS, torch.arange(8))
ANGLES = (torch.arange(8), torch.rand(3))
IDS, TABLE = torch.arange(16).view(8, 2), x(20, 6)

NORMALISING: dict[str, Row] = {
    "canonicalise": Row(
        run=canonicalise,
        match=Case(lambda a: a.clone().unflatten(-1, (2, 3)).tanh(), (x(),), 2, is_canonical=False),
        near_miss=Case(lambda a: a.view(-1, 2, 3).transpose(1, 2).tanh(), (x(),), 0),
        several_readers=Case(
            lambda a: (h := a.view(-1, 2, 3).transpose(0, 1)).tanh() + h * 2.0, (x(),), 5, is_canonical=False
        ),
        chain=Case(
            lambda a: a.contiguous().clone().transpose(0, 1).transpose(0, 1) + 1.0, (x(),), 4, is_canonical=False
        ),
        keeps_all=False,  # identities are nobody's work
    ),
    "canonicalise_views": Row(
        run=canonicalise_views,
        match=Case(lambda a: a.unflatten(-1, (2, 3)).tanh(), (x(),), is_canonical=False),
        near_miss=Case(lambda a: a.view(-1, 2, 3).permute(0, 2, 1).tanh(), (x(),), 0),
        several_readers=Case(lambda a: (h := a.unflatten(-1, (2, 3))).tanh() + h[:, 1:], (x(),), 2, is_canonical=False),
        chain=Case(lambda a: a[:, 1:][:, 1:].tanh(), (x(),), 2, is_canonical=False),
        keeps_all=False,
    ),
    "remove_dead_code": Row(
        run=remove_dead_code,
        match=Case(lambda a: (a.tanh(), a * 2.0)[1], (x(),), is_canonical=False),
        near_miss=Case(lambda a: a.tanh() * 2.0, (x(),), 0),
        several_readers=Case(lambda a: ((h := a.tanh()).exp(), h * 2.0)[1], (x(),), is_canonical=False),
        chain=Case(lambda a: (a.tanh().exp(), a * 2.0)[1], (x(),), 2, is_canonical=False),
        keeps_all=False,
    ),
    "remove_duplicates": Row(
        run=remove_duplicates,
        match=Case(lambda a: a.tanh() + a.tanh().exp(), (x(),), is_canonical=False),
        near_miss=Case(lambda a: (a + 1).exp() * (a + 1.0), (x(),), 0, is_canonical=False),
        several_readers=Case(
            lambda a: (h := a.tanh()) * h.exp() + (g := a.tanh()) * g.sin(), (x(),), is_canonical=False
        ),
        chain=Case(lambda a: a.tanh().exp() * a.tanh().exp(), (x(),), 2, is_canonical=False),
    ),
    "fold_constants": Row(
        run=fold_constants,
        match=Case(lambda a: a * torch.arange(6.0, device=a.device), (x(),)),
        near_miss=Case(lambda a, w: a * w.exp(), (x(), x(6)), 0),
        several_readers=Case(lambda a: a * (c := torch.arange(6.0, device=a.device)) + a.exp() * c, (x(),)),
        chain=Case(lambda a: a * torch.arange(6.0, device=a.device).exp().neg(), (x(),), 3),
        weights=("w",),
        tolerance=1e-6,
        keeps_all=False,  # what is computed at build is no work of the engine's
    ),
    "recognise_attention": Row(
        run=recognise_attention,
        match=Case(lambda q, k, v: attend(q, k, v), HEADS),
        near_miss=Case(lambda q, k, v: attend(q, k, v, is_causal=False), HEADS, 0),
        several_readers=Case(lambda q, k, v: (h := attend(q, k, v)) * h.exp() + q * k, HEADS),
        chain=Case(lambda q, k, v: attend(attend(q, k, v), k, v), HEADS, 2),
        tolerance=1e-5,
    ),
    "recognise_scores": Row(
        run=recognise_scores,
        match=Case(lambda q, k, v, positions: written(q, k, v, positions, window=3), WRITTEN),
        near_miss=Case(lambda q, k, v, positions: written(q, k, v, positions, window=-1), WRITTEN, 0),
        several_readers=Case(leaky, WRITTEN),
        chain=Case(lambda q, k, v, positions: written(written(q, k, v, positions), k, v, positions), WRITTEN, 2),
        tolerance=1e-5,
    ),
    "read_shared_heads": Row(
        run=read_shared_heads,
        match=Case(shared, GROUPED),
        near_miss=Case(tiled, GROUPED, 0),
        several_readers=Case(reused_heads, GROUPED),
        chain=Case(lambda q, k, v: shared(shared(q, k, v), k, v), GROUPED, 2),
        tolerance=1e-5,
    ),
    "recognise_rotary": Row(
        run=recognise_rotary,
        match=Case(lambda positions, inv_freq: angles(positions, inv_freq).cos(), ANGLES),
        near_miss=Case(lambda positions, inv_freq: (angles(positions, inv_freq) + 1.0).cos(), ANGLES, 0),
        several_readers=Case(twice_rotated, ANGLES, 2),
        chain=Case(two_rotations, ANGLES, 2),
    ),
    "recognise_products": Row(
        run=recognise_products,
        match=Case(lambda a, w: a @ w, (x(), x(6, 5))),
        near_miss=Case(lambda a, b: (a @ b.t()) @ b, (x(), x(8, 6)), 0),
        several_readers=Case(lambda a, w: (h := a @ w) * h.exp() + w.sum(), (x(), x(6, 5))),
        chain=Case(lambda a, w, w2: (a @ w) @ w2, (x(), x(6, 5), x(5, 7)), 2),
        weights=("w", "w2"),
        tolerance=1e-5,
    ),
    "recognise": Row(
        run=recognise,
        match=Case(rms_norm, (x(), x(6))),
        near_miss=Case(lambda a, w: a * torch.rsqrt(a.pow(3).mean(-1, keepdim=True) + 1e-5) * w, (x(), x(6)), 0),
        several_readers=Case(gated, (x(), x()), 2),
        chain=Case(lambda a, w: rms_norm(rms_norm(a, w), w), (x(), x(6)), 2),
        tolerance=1e-5,
        weights=("w",),
    ),
    "recognise_plugins": Row(
        opened=lambda: opened_plugin(registered({"own.doubled": PLUGIN_OP}), recognise_plugins),
        match=Case(lambda a, w: doubled(a) + w, (x(), x(6, 6)[0])),
        near_miss=Case(lambda a, w: torch.tanh(a) * 3.0 + w, (x(), x(6, 6)[0]), 0),
        several_readers=Case(lambda a, w: (h := torch.tanh(a)) * 2.0 + h * w, (x(), x(6, 6)[0])),
        chain=Case(lambda a, w: doubled(doubled(a)) + w, (x(), x(6, 6)[0]), 2),
    ),
    "split_bags": Row(
        run=split_bags,
        match=Case(bags, (IDS, TABLE), is_dynamic=True),
        near_miss=Case(bags_of_one_list, (IDS, TABLE), 0, is_dynamic=True),
        several_readers=Case(lambda ids, table: (h := bags(ids, table)) * h.exp(), (IDS, TABLE), is_dynamic=True),
        chain="the ids of a bag are integers, what a bag gives is none",
        weights=("table",),
        tolerance=1e-6,
        keeps_all=False,  # the offsets, which nobody needs
    ),
    "expand_along_batch": Row(
        run=expand_along_batch,
        match=Case(repeated, (x(), x(6)), is_dynamic=True),
        near_miss=Case(lambda a, w: w.expand(3, 6).sum(0) * a, (x(), x(6)), 0, is_dynamic=True),
        several_readers=Case(twice_repeated, (x(), x(6)), is_dynamic=True),
        chain=Case(filled, (x(),), 2, is_dynamic=True),
        weights=("w",),
    ),
}

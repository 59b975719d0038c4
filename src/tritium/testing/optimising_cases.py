"""The rows (`pass_cases.py`) of passes that batch, merge and fuse. T is 8."""

from functools import partial

import torch

from tritium import ops
from tritium.mapping import Ranks
from tritium.passes.fold_weights import fold_weights
from tritium.passes.fuse_add_norm import fuse_add_norm
from tritium.passes.fuse_linear_activation import fuse_linear_activation
from tritium.passes.fuse_linear_add import fuse_linear_add
from tritium.passes.fuse_rope_kv import fuse_rope_kv
from tritium.passes.gather_rows import gather_sampled_rows
from tritium.passes.insert_kv import insert_kv
from tritium.passes.insert_varlen import insert_varlen
from tritium.passes.merge_gate_up import merge_gate_up
from tritium.passes.merge_outputs import merge_outputs
from tritium.passes.merge_parallel import merge_parallel
from tritium.passes.merge_qkv import merge_qkv
from tritium.passes.shard import shard
from tritium.passes.smooth import SMOOTHING, smooth
from tritium.testing.pass_cases import Case, Row

Tensor = torch.Tensor


def x(*shape: int) -> Tensor:
    """Random numbers, [8, 12] unless told otherwise; matrices of weights keep the scale of what they read."""
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape or (8, 12), generator=draw) * (shape[-1] ** -0.5 if shape else 1.0)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of heads of 3, [T, D]."""
    return ops.attention(*(a.view(-1, a.shape[-1] // 3, 3) for a in (q, k, v)), 0.5).flatten(1)


def project(a: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of three linears of one value."""
    return attend(ops.linear(a, q, None), ops.linear(a, k, None), ops.linear(a, v, None))


def gated(a: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """A gated activation of two linears of one value."""
    return ops.gated_activation(ops.linear(a, gate, None), ops.linear(a, up, None), "silu")


def plain(a: Tensor, w: Tensor, b: Tensor | None = None, kind: str = "gelu") -> Tensor:
    """An activation of a linear."""
    return ops.activation(ops.linear(a, w, b), kind)


def parallel(a: Tensor, q: Tensor, k: Tensor, v: Tensor, up: Tensor) -> Tensor:
    """Attention and an activation that read one value."""
    return torch.cat((project(a, q, k, v), plain(a, up)), 1)


def rotated(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Attention of [T, N, H] with rotary embeddings."""
    cos_sin = ops.rope_cos_sin(positions, frequencies)
    return ops.attention(ops.rope(q, cos_sin), ops.rope(k, cos_sin), v, 0.5)


def turned_otherwise(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Keys by other angles than queries."""
    of_q, of_k = (ops.rope_cos_sin(positions, frequencies, scaling) for scaling in (1.0, 2.0))
    return ops.attention(ops.rope(q, of_q), ops.rope(k, of_k), v, 0.5)


def angles_read_twice(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """The values and the angles have other readers."""
    cos_sin = ops.rope_cos_sin(positions, frequencies)
    return ops.attention(ops.rope(q, cos_sin), ops.rope(k, cos_sin), v, 0.5) * cos_sin[:, None] + q


def normed(a: Tensor, norm: Tensor, w: Tensor, w2: Tensor) -> Tensor:
    """Two linears of one norm."""
    h = ops.rms_norm(a, norm, 1e-5)
    return ops.linear(h, w, None) * ops.linear(h, w2, None)


def two_norms(a: Tensor, norm: Tensor, w: Tensor, w2: Tensor) -> Tensor:
    """A norm of a linear of a norm."""
    h = ops.linear(ops.rms_norm(a, norm, 1e-5), w, None)
    return ops.linear(ops.layer_norm(h, w2[0], None, 1e-5), w2, None)


def norm_read_twice(a: Tensor, norm: Tensor, w: Tensor) -> Tensor:
    """A norm that is no linear's alone."""
    return ops.linear(h := ops.rms_norm(a, norm, 1e-5), w, None) + h


def sums(a: Tensor, b: Tensor, norm: Tensor) -> Tensor:
    """Two residual sums, each read by its norm and the next sum."""
    total = a + b
    after = total + ops.rms_norm(total, norm, 1e-5)
    return after * ops.rms_norm(after, norm, 1e-5)


def mlp(a: Tensor, w: Tensor, w2: Tensor) -> Tensor:
    """Two linears with an activation between them."""
    return ops.linear(plain(a, w), w2, None)


def read_inside(a: Tensor, w: Tensor, w2: Tensor) -> Tensor:
    """What is between the linears is read by something else."""
    return ops.linear(h := plain(a, w), w2, None) + h.mean(-1, keepdim=True)


W, W2, W3 = x(12, 12), x(6, 12), x(20, 12)
QKV = (x(), W, W2, x(6, 12))
HEADS = (x(8, 4, 6), x(8, 2, 6), x(8, 2, 6) * 2.0, torch.arange(8), torch.rand(3))
OUTPUTS = (x(), x(8, 20), W, x(12, 20))
VECTOR = {f"norm{SMOOTHING}": torch.rand(12) + 0.5, f"b{SMOOTHING}": torch.rand(12) + 0.5}
CACHED = (lambda graph: insert_kv(graph)[0],)


def heads(a: Tensor) -> Tensor:
    """[T, 3, 4]."""
    return a.view(-1, 3, 4)


OPTIMISING: dict[str, Row] = {
    "smooth": Row(
        run=partial(smooth, vectors=tuple(VECTOR)),
        match=Case(normed, (x(), torch.rand(12), W, x(12, 12) * 2.0)),
        near_miss=Case(norm_read_twice, (x(), torch.rand(12), W), 0),
        several_readers=Case(normed, (x(), torch.rand(12), W, W * 0.5)),
        chain=Case(two_norms, (x(), torch.rand(12), W, x(12, 12) + 1.0)),
        weights=("norm", "w", "w2"),
        calibrated=VECTOR,
        tolerance=1e-5,
    ),
    "gather_sampled_rows": Row(
        run=gather_sampled_rows,
        match=Case(lambda a, w: ops.linear(a + ops.attention(*[heads(a)] * 3, 0.5).flatten(1), w, None), (x(), W), 2),
        near_miss=Case(lambda a: ops.attention(*[heads(a)] * 3, 0.5), (x(),), 0),
        several_readers=Case(lambda a: ops.attention(*[heads(a)] * 3, 0.5).flatten(1) * a + a.exp(), (x(),), 2),
        chain=Case(lambda q, k, v: (h := attend(q, k, v)) + attend(h, k, v), (x(), x(), x()), 2),
        weights=("w",),
        tolerance=1e-5,
    ),
    "shard": Row(  # of one rank; tests/passes/test_shard.py runs several side by side
        run=partial(shard, ranks=Ranks()),
        match=Case(lambda a, w, w2: mlp(a, w, w2) * 2.0, (x(), W3, x(12, 20))),
        near_miss=Case(lambda a, w, w2: plain(plain(a, w)[:, :6], w2), (x(), W, x(12, 6)), 0),
        several_readers=Case(lambda a, w, w2: read_inside(a, w, w2) * 2.0, (x(), W3, x(12, 20)), 0),
        chain=Case(
            lambda a, w, w2, w3, w4: mlp(mlp(a, w, w2).tanh() + a, w3, w4) * 2.0,
            (x(), W3, x(12, 20), x(20, 12) * 2.0, x(12, 20) * 2.0),
            2,
        ),
        weights=("w", "w2", "w3", "w4"),
    ),
    "fold_weights": Row(
        run=fold_weights,
        match=Case(lambda a, w: ops.linear(a, w.t(), None), (x(), W)),
        near_miss=Case(lambda a, w: ops.linear(a, w, None) + ops.linear(a, w.t(), None), (x(), W), 0),
        several_readers=Case(lambda a, w: ops.linear(a, w[:6], None) * ops.linear(a, w[6:], None), (x(), W), 2),
        chain=Case(lambda a, w: ops.linear(a, w.t()[:6], None), (x(), W), 2),
        weights=("w",),
    ),
    "merge_qkv": Row(
        run=merge_qkv,
        match=Case(project, QKV),
        near_miss=Case(
            lambda a, q, k, v: attend(ops.linear(a, q, None), ops.linear(a.tanh(), k, None), ops.linear(-a, v, None)),
            QKV,
            0,
        ),
        several_readers=Case(
            lambda a, q, k, v: (
                attend(ops.linear(a, q, None), h := ops.linear(a, k, None), ops.linear(a, v, None))
                + h.sum(-1, keepdim=True)
            ),
            QKV,
        ),
        chain=Case(
            lambda a, q, k, v, q2, k2, v2: project(project(a, q, k, v), q2, k2, v2), (*QKV, W + 1.0, W2 + 1.0, W2), 2
        ),
        weights=("q", "k", "v", "q2", "k2", "v2"),
        tolerance=1e-5,  # torch sums products of other sizes in another order; our own kernel does not
    ),
    "merge_gate_up": Row(
        run=merge_gate_up,
        match=Case(gated, (x(), W, W + 1.0)),
        near_miss=Case(
            lambda a, gate, up: ops.gated_activation(ops.linear(a, gate, None) * 2.0, ops.linear(a, up, None), "silu"),
            (x(), W, W + 1.0),
            0,
        ),
        several_readers=Case(
            lambda a, gate, up: (
                ops.gated_activation(h := ops.linear(a, gate, None), ops.linear(a, up, None), "silu") * h
            ),
            (x(), W, W + 1.0),
        ),
        chain=Case(
            lambda a, gate, up, gate2, up2: gated(gated(a, gate, up), gate2, up2), (x(), W, W + 1.0, W2, W2 + 1.0), 2
        ),
        weights=("gate", "up", "gate2", "up2"),
        tolerance=1e-4,
    ),
    "merge_parallel": Row(
        run=merge_parallel,
        match=Case(parallel, (*QKV, W3)),
        near_miss=Case(lambda a, q, k, v, up: torch.cat((project(a, q, k, v), plain(a.tanh(), up)), 1), (*QKV, W3), 0),
        several_readers=Case(
            lambda a, q, k, v, up: (
                project(a, q, k, v).sum(-1, keepdim=True) + ops.activation(h := ops.linear(a, up, None), "gelu") * h
            ),
            (*QKV, W3),
        ),
        chain=Case(
            lambda a, q, k, v, up, q2, k2, v2, up2: parallel(parallel(a, q, k, v, up)[:, :12], q2, k2, v2, up2),
            (*QKV, W3, W + 1.0, W2 + 1.0, W2, W3 + 1.0),
            2,
        ),
        weights=("q", "k", "v", "up", "q2", "k2", "v2", "up2"),
        tolerance=1e-5,
    ),
    "insert_kv": Row(
        run=CACHED[0],
        match=Case(lambda a: ops.attention(heads(a), heads(a) * 2.0, heads(a) + 1.0, 0.5, window=3), (x(),)),
        near_miss=Case(lambda a: ops.activation(a, "silu"), (x(),), 0),
        several_readers=Case(lambda a: (h := ops.attention(*[heads(a)] * 3, 0.5)) * h.exp() + heads(a), (x(),)),
        chain=Case(lambda a: ops.attention(ops.attention(*[heads(a)] * 3, 0.5), *[heads(a)] * 2, 0.5), (x(),), 2),
        tolerance=1e-5,
    ),
    "insert_varlen": Row(
        run=insert_varlen,
        match=Case(lambda a: ops.attention(*[heads(a)] * 3, 0.5, causal=False), (x(),)),
        near_miss=Case(lambda a: ops.activation(a, "silu"), (x(),), 0),
        several_readers=Case(
            lambda a: (h := ops.attention(*[heads(a)] * 3, 0.5, causal=False)) * h.exp() + heads(a), (x(),)
        ),
        chain=Case(
            lambda a: ops.attention(
                ops.attention(*[heads(a)] * 3, 0.5, causal=False), *[heads(a)] * 2, 0.5, causal=False
            ),
            (x(),),
            2,
        ),
        tolerance=1e-5,
    ),
    "fuse_linear_activation": Row(
        run=fuse_linear_activation,
        match=Case(lambda a, w, b: plain(a, w, b), (x(), W3, x(20))),
        near_miss=Case(lambda a, w: ops.activation(ops.linear(a, w, None) + 1.0, "silu"), (x(), W3), 0),
        several_readers=Case(lambda a, w: ops.activation(h := ops.linear(a, w, None), "silu") + h, (x(), W3), 0),
        chain=Case(lambda a, w, w2: plain(plain(a, w), w2), (x(), W3, x(12, 20)), 2),
        weights=("w", "w2", "b"),
        tolerance=1e-6,
    ),
    "merge_outputs": Row(
        run=merge_outputs,
        match=Case(
            lambda a, h, w, b, w2, b2: ops.linear(a, w, b) + a + ops.linear(h, w2, b2),
            (x(), x(8, 20), W, x(12), x(12, 20), x(12) * 2.0),
        ),
        near_miss=Case(lambda a, h, w, w2: ops.linear(a, w, None) - ops.linear(h, w2, None), OUTPUTS, 0),
        several_readers=Case(
            lambda a, h, w, w2: (left := ops.linear(a, w, None)) * left.exp() + (left + ops.linear(h, w2, None)),
            OUTPUTS,
            0,
        ),
        chain=Case(
            lambda a, h, w, w2, w3, w4: (
                ops.linear(t := ops.linear(a, w, None) + ops.linear(h, w2, None), w3, None)
                + ops.linear(t.tanh(), w4, None)
            ),
            (*OUTPUTS, W * 0.5, W + 0.1),
            2,
        ),
        weights=("w", "w2", "w3", "w4", "b", "b2"),
        tolerance=1e-5,  # one sum over K where there were two
    ),
    "fuse_linear_add": Row(
        run=fuse_linear_add,
        match=Case(lambda a, w, b: a.tanh() + ops.linear(a, w, b), (x(), W, x(12))),
        near_miss=Case(lambda a, w, b: ops.linear(a, w, None) + b, (x(), W, x(12)), 0),
        several_readers=Case(
            lambda a, w, w2: (h := ops.linear(a, w, None)) * h.exp() * ((t := ops.linear(a, w2, None) + h) + t.exp()),
            (x(), W, W * 0.5),
        ),
        chain=Case(lambda a, w, w2: ops.linear(t := ops.linear(a, w, None) + a, w2, None) + t, (x(), W, W * 0.5), 2),
        weights=("w", "w2", "b"),
    ),
    "fuse_add_norm": Row(
        run=fuse_add_norm,
        match=Case(lambda a, b, norm: ops.rms_norm(a + b, norm, 1e-5), (x(), x() * 2.0, x(12))),
        near_miss=Case(lambda a, b, norm: ops.rms_norm(a - b, norm, 1e-5), (x(), x() * 2.0, x(12)), 0),
        several_readers=Case(
            lambda a, b, norm: (h := a + b).exp() * ops.layer_norm(h, norm, None, 1e-5), (x(), x() * 2.0, x(12))
        ),
        chain=Case(sums, (x(), x() * 2.0, x(12)), 2),
        weights=("norm",),
    ),
    "fuse_rope_kv": Row(
        run=fuse_rope_kv,
        match=Case(rotated, HEADS, before=CACHED),
        near_miss=Case(turned_otherwise, HEADS, 0, before=CACHED),
        several_readers=Case(angles_read_twice, HEADS, before=CACHED),
        chain=Case(lambda q, k, v, p, f: rotated(rotated(q, k, v, p, f), v, k, p, f), HEADS, 2, before=CACHED),
    ),
}

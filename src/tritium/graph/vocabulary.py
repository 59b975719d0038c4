"""Which torch ops a graph may hold beside ours, by how they treat dimensions. Names as in `torch.ops.aten`."""

import torch

aten = torch.ops.aten

# The four canonical changes of view (passes/views.py).
VIEWS = frozenset({aten.view.default, aten.permute.default, aten.slice.Tensor, aten.expand.default})

# Element by element, with broadcasting.
POINTWISE = frozenset({
    aten.to.dtype, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.rsub.Scalar, aten.rsub.Tensor,
    aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.neg.default, aten.abs.default,
    aten.exp.default, aten.log.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default,
    aten.square.default, aten.sin.default, aten.cos.default, aten.tanh.default, aten.sigmoid.default,
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.softplus.default, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default, aten.minimum.default, aten.where.self,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.eq.Scalar, aten.eq.Tensor, aten.ne.Scalar,
    aten.ne.Tensor, aten.lt.Scalar, aten.lt.Tensor, aten.le.Scalar, aten.le.Tensor, aten.gt.Scalar,
    aten.gt.Tensor, aten.ge.Scalar, aten.ge.Tensor, aten.logical_and.default, aten.logical_or.default,
    aten.logical_not.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.erf.default,
    aten.log1p.default, aten.expm1.default, aten.floor.default, aten.round.default, aten.sign.default,
    aten.leaky_relu.default, aten.hardtanh.default, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default,
})  # fmt: skip

# Work along the dimensions in `dim`, or along all without it.
ALONG_DIM = frozenset({
    aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default, aten.amax.default,
    aten.amin.default, aten.max.dim, aten.max.default, aten.min.dim, aten.min.default, aten.var.correction,
    aten.var.dim, aten.prod.dim_int, aten.std.correction, aten.softmax.int, aten._softmax.default,
    aten.log_softmax.int, aten._log_softmax.default, aten.cumsum.default, aten.cumprod.default,
    aten.logsumexp.default, aten.argmax.default, aten.argmin.default, aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim, aten.flip.default, aten.roll.default, aten.sort.default, aten.sort.stable,
    aten.topk.default, aten.index_select.default, aten.gather.default,
})  # fmt: skip

# Work along as many last dimensions as `normalized_shape` has.
ALONG_LAST = frozenset({aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default})

PRODUCTS = frozenset({aten.matmul.default, aten.mm.default, aten.bmm.default, aten.linear.default, aten.addmm.default})

JOINS = frozenset({aten.cat.default, aten.stack.default})

# What a finished graph may hold beside views: each has a kernel in `kernels/eager` (a test compares the lists).
FINAL = frozenset({
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.abs.default, aten.square.default,
    aten.sqrt.default, aten.maximum.default, aten.minimum.default, aten.clamp.default, aten.relu.default,
    aten.where.self, aten.cat.default, aten.stack.default, aten.mean.dim, aten.sum.dim_IntList,
    aten.amax.default, aten.softmax.int, aten.to.dtype, aten.clone.default, aten.exp.default, aten.log.default,
    aten.sin.default, aten.cos.default, aten.tanh.default, aten.sigmoid.default, aten.erf.default,
    aten.rsqrt.default, aten.reciprocal.default, aten.pow.Tensor_Scalar, aten.silu.default, aten.gelu.default,
    aten.expm1.default, aten.log1p.default, aten.softplus.default,
})  # fmt: skip

# torch's own ops that a decoder may hold too (they run as `ops/torch_ops.py` says): they choose and move values, so
# that no bit of a row depends on its neighbours.
EXACT = frozenset({
    aten.topk.default, aten.sort.default, aten.sort.stable, aten.argmax.default, aten.gather.default,
    aten.scatter.src, aten.scatter.value, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.eq.Scalar, aten.eq.Tensor, aten.ne.Scalar, aten.ne.Tensor, aten.lt.Scalar,
    aten.lt.Tensor, aten.le.Scalar, aten.le.Tensor, aten.gt.Scalar, aten.gt.Tensor, aten.ge.Scalar, aten.ge.Tensor,
    aten.logical_and.default, aten.logical_or.default, aten.logical_not.default, aten.clamp_min.default,
    aten.clamp_max.default, aten.zeros_like.default, aten.ones_like.default, aten.floor.default, aten.round.default,
    aten.hardtanh.default, aten.leaky_relu.default, aten.max.dim, aten.min.dim,
})  # fmt: skip

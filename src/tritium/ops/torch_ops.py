"""torch's own ops that a stateless module may be made of, beside the ops of ours and element-wise torch.

A plan names them as `aten.<op>.<overload>`, and an engine runs nothing that is not listed: each is a function of its
arguments alone, which reads no file, draws no random number, changes none of its inputs and gives tensors of sizes that
follow from its arguments' sizes. The compiler takes a graph's node, the runtime a plan's step, by the same list.
"""

import torch

TORCH_OPS: tuple[str, ...] = tuple(
    f"aten.{name}"
    for name in (
        # convolutions, pooling, resampling
        "conv1d.default", "conv1d.padding", "conv2d.default", "conv2d.padding", "conv3d.default", "conv3d.padding",
        "conv_transpose1d.default", "conv_transpose2d.input", "convolution.default",
        "max_pool1d.default", "max_pool2d.default", "max_pool3d.default", "max_pool2d_with_indices.default",
        "avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default", "adaptive_avg_pool1d.default",
        "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default", "adaptive_max_pool1d.default",
        "adaptive_max_pool2d.default", "upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_bilinear2d.vec",
        "upsample_bicubic2d.vec", "upsample_linear1d.vec", "grid_sampler.default", "pixel_shuffle.default",
        "pixel_unshuffle.default", "pad.default", "constant_pad_nd.default", "reflection_pad1d.default",
        "reflection_pad2d.default", "replication_pad2d.default", "im2col.default", "unfold.default",
        # normalisation, recurrence, attention
        "batch_norm.default", "_native_batch_norm_legit_no_training.default", "group_norm.default",
        "instance_norm.default", "layer_norm.default", "native_layer_norm.default", "rms_norm.default",
        "lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input", "scaled_dot_product_attention.default",
        # products
        "matmul.default", "mm.default", "bmm.default", "addmm.default", "baddbmm.default", "linear.default",
        "bilinear.default", "einsum.default", "mv.default", "dot.default", "outer.default",
        # tables
        "embedding.default", "embedding_bag.padding_idx", "embedding_bag.default", "index.Tensor",
        "index_select.default", "gather.default", "one_hot.default", "take_along_dim.default", "scatter.src",
        "scatter.value", "scatter_add.default", "searchsorted.Tensor", "bucketize.Tensor",
        # along a dimension
        "max.dim", "min.dim", "max.default", "min.default", "mean.default", "sum.default", "amin.default",
        "prod.default", "prod.dim_int", "var.correction", "var.dim", "std.correction", "std.dim", "all.dim", "any.dim",
        "argmax.default", "argmin.default", "logsumexp.default", "log_softmax.int", "cumsum.default", "cumprod.default",
        "linalg_vector_norm.default", "norm.ScalarOpt_dim", "sort.default", "sort.stable", "argsort.default",
        "topk.default", "flip.default", "roll.default", "tril.default", "triu.default", "glu.default",
        "cosine_similarity.default", "pairwise_distance.default", "cdist.default", "repeat.default", "tile.default",
        "repeat_interleave.self_int", "split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int",
        # signals
        "stft.center", "stft.default", "fft_rfft.default", "fft_rfft2.default", "view_as_real.default", "real.default",
        "imag.default",
        # element by element
        "eq.Scalar", "eq.Tensor", "ne.Scalar", "ne.Tensor", "lt.Scalar", "lt.Tensor", "le.Scalar", "le.Tensor",
        "gt.Scalar", "gt.Tensor", "ge.Scalar", "ge.Tensor", "logical_and.default", "logical_or.default",
        "logical_not.default", "bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_not.default", "isnan.default",
        "isinf.default", "where.ScalarOther", "where.ScalarSelf", "where.Scalar", "masked_fill.Scalar",
        "masked_fill.Tensor", "zeros_like.default", "ones_like.default", "full_like.default", "pow.Tensor_Tensor",
        "pow.Scalar", "rsub.Tensor", "clamp.Tensor", "clamp_min.default", "clamp_max.default", "floor.default",
        "ceil.default", "round.default", "trunc.default", "sign.default", "remainder.Scalar", "remainder.Tensor",
        "floor_divide.default", "floor_divide.Scalar", "div.Tensor_mode", "div.Scalar_mode", "fmod.Scalar",
        "log2.default", "log10.default", "exp2.default", "sinh.default",
        "cosh.default", "tan.default", "asin.default", "acos.default", "atan.default", "atan2.default",
        "leaky_relu.default", "elu.default", "selu.default", "celu.default", "prelu.default",
        "hardtanh.default", "relu6.default", "hardswish.default", "hardsigmoid.default", "mish.default",
        "log_sigmoid.default", "threshold.default", "lerp.Scalar", "lerp.Tensor",
        "addcmul.default", "addcdiv.default", "nan_to_num.default",
    )
)  # fmt: skip

_NAMES = frozenset(TORCH_OPS)


def is_torch_op(op: str) -> bool:
    """True for a name of the list."""
    return op in _NAMES


def overload(op: str) -> torch._ops.OpOverload:
    """torch's function for a name of the list."""
    _, name, variant = op.split(".")
    found: torch._ops.OpOverload = getattr(getattr(torch.ops.aten, name), variant)
    return found

"""The graph's vocabulary. `ops.rms_norm(x, weight, eps)` runs the op; `OPS` holds all that is said of each."""

from tritium.ops.library import LIBRARY, OPS, op_named, target
from tritium.ops.op import Op, Spelling

embedding = target("embedding")
linear = target("linear")
quantized_embedding = target("quantized_embedding")
quantized_linear = target("quantized_linear")
quantized_linear_activation = target("quantized_linear_activation")
quantized_linear_gated = target("quantized_linear_gated")
quantized_linear_add = target("quantized_linear_add")
rms_norm = target("rms_norm")
layer_norm = target("layer_norm")
rope_cos_sin = target("rope_cos_sin")
rope = target("rope")
activation = target("activation")
gated_activation = target("gated_activation")
moe = target("moe")
attention = target("attention")
gather_rows = target("gather_rows")
kv_store = target("kv_store")
paged_attention = target("paged_attention")
varlen_attention = target("varlen_attention")
add_rms_norm = target("add_rms_norm")
add_layer_norm = target("add_layer_norm")
rope_kv_store = target("rope_kv_store")
linear_activation = target("linear_activation")
linear_gated = target("linear_gated")
linear_add = target("linear_add")
linear_pair = target("linear_pair")
experts = target("experts")
all_reduce = target("all_reduce")
all_gather = target("all_gather")
embedding_part = target("embedding_part")

__all__ = [
    "LIBRARY",
    "OPS",
    "Op",
    "Spelling",
    "activation",
    "add_layer_norm",
    "add_rms_norm",
    "all_gather",
    "all_reduce",
    "attention",
    "embedding",
    "embedding_part",
    "experts",
    "gated_activation",
    "gather_rows",
    "kv_store",
    "layer_norm",
    "linear",
    "linear_activation",
    "linear_add",
    "linear_gated",
    "linear_pair",
    "moe",
    "op_named",
    "paged_attention",
    "quantized_embedding",
    "quantized_linear",
    "quantized_linear_activation",
    "quantized_linear_add",
    "quantized_linear_gated",
    "rms_norm",
    "rope",
    "rope_cos_sin",
    "rope_kv_store",
    "target",
    "varlen_attention",
]

"""Every kernel, as literal rows. For one op the first row that is available and supports the arguments is taken.

The order is the preference: compiled (for the CPU or a GPU: a process has only one of them), then the eager row, which
every op has and which takes everything.
"""

from tritium.kernels.eager import torch_ops
from tritium.kernels.eager.aten import ALLOWED, bind_name
from tritium.kernels.eager.linear import TILE_ROWS
from tritium.kernels.kernel import Kernel
from tritium.ops.torch_ops import TORCH_OPS

_CPU = "tritium.kernels.cpu"
_GPU = "tritium.kernels.gpu"
_EAGER = "tritium.kernels.eager"
_REFERENCE = "the op's reference"

_TACTICS: dict[str, tuple[dict[str, int], ...]] = {
    "paged_attention": ({"item_rows": 64}, {"item_rows": 16}, {"item_rows": 32}, {"item_rows": 128})
}

KERNELS: tuple[Kernel, ...] = (
    *(
        Kernel(
            name=f"cpu.{op}",
            op=op,
            backend="cpu",
            target=f"{_CPU}.{module}:bind_{op}",
            supports=f"{_CPU}.{module}:{supports}",
            tactics=_TACTICS.get(op, ()),
            numerics=numerics,
        )
        for op, module, supports, numerics in (
            ("embedding", "copies", "supports_embedding", "exact"),
            ("rms_norm", "norms", "supports", "fp32, 4 vectors of 16 lanes"),
            ("layer_norm", "norms", "supports", "fp32, 4 vectors of 16 lanes"),
            ("add_rms_norm", "norms", "supports_add", "fp32, 4 vectors of 16 lanes"),
            ("add_layer_norm", "norms", "supports_add", "fp32, 4 vectors of 16 lanes"),
            ("rope_cos_sin", "rope", "supports_rope_cos_sin", "fp32, libm"),
            ("rope", "rope", "supports_rope", "fp32"),
            ("rope_kv_store", "rope", "supports_rope_kv_store", "fp32"),
            ("activation", "activations", "supports_activation", "fp32"),
            ("gated_activation", "activations", "supports_gated_activation", "fp32"),
            ("gather_rows", "copies", "supports_gather_rows", "exact"),
            ("kv_store", "copies", "supports_kv_store", "exact"),
            ("paged_attention", "attention", "supports_paged_attention", "fp32, tiles of keys by absolute position"),
            ("varlen_attention", "varlen", "supports_varlen_attention", "fp32, tiles of keys by place in the sequence"),
        )
    ),
    *(
        Kernel(
            name=f"gpu.{op}",
            op=op,
            backend="gpu",
            target=f"{_GPU}.{module}:{bind}",
            supports=f"{_GPU}.supports:{supports}",
            takes_context=op == "paged_attention",
            numerics=numerics,
        )
        for op, module, bind, supports, numerics in (
            ("embedding", "copies", "bind_embedding", "embedding", "exact"),
            ("gather_rows", "copies", "bind_gather_rows", "gather_rows", "exact"),
            ("kv_store", "copies", "bind_kv_store", "kv_store", "exact, or e4m3 saturated"),
            ("rms_norm", "norms", "bind_rms_norm", "norm", "fp32"),
            ("layer_norm", "norms", "bind_layer_norm", "norm", "fp32"),
            ("rope", "rope", "bind_rope", "rope", "fp32"),
            ("activation", "activations", "bind_activation", "activation", "fp32"),
            ("gated_activation", "activations", "bind_gated_activation", "gated_activation", "fp32"),
            ("add_rms_norm", "norms", "bind_add_rms_norm", "add_norm", "fp32"),
            ("add_layer_norm", "norms", "bind_add_layer_norm", "add_norm", "fp32"),
            ("rope_kv_store", "rope", "bind_rope_kv_store", "rope_kv_store", "fp32, or e4m3 saturated"),
            ("linear", "linear", "bind", "linear", "cuBLAS"),
            ("quantize_fp8", "fp8", "bind_quantize", "fp8_rows", "fp32, e4m3"),
            ("rms_norm_fp8", "fp8", "bind_rms_norm", "fp8_rows", "fp32, e4m3"),
            ("add_rms_norm_fp8", "fp8", "bind_add_rms_norm", "fp8_rows", "fp32, e4m3"),
            ("gated_activation_fp8", "fp8", "bind_gated_activation", "fp8_gated", "fp32, e4m3"),
            ("activation_fp8", "fp8", "bind_activation", "fp8_rows", "fp32, e4m3"),
            ("add_layer_norm_fp8", "fp8", "bind_add_layer_norm", "fp8_rows", "fp32, e4m3"),
            ("linear_fp8", "fp8", "bind_linear", "fp8_linear", "cuBLASLt, fast accumulation; few rows: fp32"),
            ("paged_attention", "attention", "bind", "paged_attention", "fp32, split by the number of sequences"),
        )
    ),
    Kernel(
        name="cpu.linear",
        op="linear",
        backend="cpu",
        target=f"{_CPU}.linear:bind",
        supports=f"{_CPU}.linear:supports",
        pack={"weight_NK": f"{_CPU}.linear:pack_weight"},
        numerics="fp32 chains over K; their order is the instruction set's",
    ),
    Kernel(
        name="cpu.linear_activation",
        op="linear_activation",
        backend="cpu",
        target=f"{_CPU}.linear:bind",
        supports=f"{_CPU}.linear:supports_activation",
        pack={"weight_NK": f"{_CPU}.linear:pack_weight"},
        numerics="fp32 chains over K; their order is the instruction set's",
    ),
    Kernel(
        name="cpu.linear_gated",
        op="linear_gated",
        backend="cpu",
        target=f"{_CPU}.linear:bind",
        supports=f"{_CPU}.linear:supports_activation",
        pack={"weight_NK": f"{_CPU}.linear:pack_gated"},
        numerics="fp32 chains over K; their order is the instruction set's",
    ),
    *(
        Kernel(
            name=f"eager.{op}",
            op=op,
            backend="eager",
            target=f"{_EAGER}.linear:bind_{op}",
            row_multiple=TILE_ROWS,
            numerics="fp32 sums, torch's order for TILE_ROWS rows",
        )
        for op in ("linear_activation", "linear_gated")
    ),
    Kernel(
        name="cpu.moe",
        op="moe",
        backend="cpu",
        target=f"{_CPU}.moe:bind_moe",
        supports=f"{_CPU}.moe:supports_moe",
        pack={"gate_up_EGD": f"{_CPU}.moe:pack_gate_up", "down_EDF": f"{_CPU}.moe:pack_experts"},
        numerics="fp32 chains over K; their order is the instruction set's",
    ),
    Kernel(name="eager.moe", op="moe", backend="eager", target=f"{_EAGER}.moe:bind", numerics="torch's, row by row"),
    *(
        Kernel(
            name=f"cpu.{op}",
            op=op,
            backend="cpu",
            target=f"{_CPU}.quantized:bind",
            supports=f"{_CPU}.quantized:{supports}",
            pack={"qweight": f"{_CPU}.quantized:{weight}", "scales_NG": f"{_CPU}.quantized:{scales}"},
            numerics="int8 activations: exact sums by group, fp32 over groups; else fp32 chains, by machine",
        )
        for op, supports, weight, scales in (
            ("quantized_linear", "supports", "pack_weight", "pack_scales"),
            ("quantized_linear_activation", "supports_activation", "pack_weight", "pack_scales"),
            ("quantized_linear_gated", "supports_activation", "pack_gated", "pack_gated_scales"),
        )
    ),
    *(
        Kernel(
            name=f"eager.{op}",
            op=op,
            backend="eager",
            target=f"{_EAGER}.quantized:{bind}",
            row_multiple=TILE_ROWS,
            numerics="int8 activations: as on the CPU, compiled; else torch's order for TILE_ROWS rows",
        )
        for op, bind in (
            ("quantized_linear", "bind"),
            ("quantized_linear_activation", "bind_quantized_linear_activation"),
            ("quantized_linear_gated", "bind_quantized_linear_gated"),
        )
    ),
    Kernel(
        name="eager.experts",
        op="experts",
        backend="eager",
        target=f"{_EAGER}.experts:bind",
        numerics="fp32 sums, torch's order for TILE_ROWS rows",
    ),
    *(
        Kernel(
            name=f"eager.{op}",
            op=op,
            backend="eager",
            target=f"{_EAGER}.collectives:bind_{op}",
            takes_context=True,
            numerics=numerics,
        )
        for op, numerics in (("all_reduce", "fp32, in the order of the ranks"), ("all_gather", "exact"))
    ),
    Kernel(
        name="eager.linear",
        op="linear",
        backend="eager",
        target=f"{_EAGER}.linear:bind",
        row_multiple=TILE_ROWS,
        numerics="fp32 sums, torch's order for TILE_ROWS rows",
    ),
    *(
        Kernel(
            name=f"eager.{op}",
            op=op,
            backend="eager",
            target=f"{_EAGER}.reference:{op}",
            numerics=_REFERENCE,
        )
        for op in (
            "embedding",
            "embedding_part",
            "rms_norm",
            "layer_norm",
            "rope_cos_sin",
            "rope",
            "activation",
            "gated_activation",
            "attention",
            "gather_rows",
            "kv_store",
            "paged_attention",
            "varlen_attention",
            "add_rms_norm",
            "add_layer_norm",
            "rope_kv_store",
            "quantize_fp8",
            "linear_fp8",
            "rms_norm_fp8",
            "add_rms_norm_fp8",
            "gated_activation_fp8",
            "activation_fp8",
            "add_layer_norm_fp8",
        )
    ),
    *(
        Kernel(
            name=f"eager.{op}", op=op, backend="eager", target=f"{_EAGER}.aten:{bind_name(op)}", numerics="torch's own"
        )
        for op in ALLOWED
    ),
    *(
        Kernel(
            name=f"eager.{op}",
            op=op,
            backend="eager",
            target=f"{_EAGER}.torch_ops:{torch_ops.bind_name(op)}",
            numerics="torch's own",
        )
        for op in TORCH_OPS
    ),
)

"""Every kernel, as literal rows. For one op the first row that is available and supports the arguments is taken.

The order is the preference: compiled (for the CPU or a GPU: a process has only one of them), then the eager row, which
every op has and which takes everything.
"""

from collections.abc import Mapping
from typing import Any

from tritium.kernels.eager import torch_ops
from tritium.kernels.eager.aten import ALLOWED, bind_name
from tritium.kernels.eager.linear import TILE_ROWS
from tritium.kernels.gpu import tactics as gpu
from tritium.kernels.kernel import Backend, Kernel
from tritium.ops.fused_rows import ROW_BASES, ROW_FORMATS
from tritium.ops.torch_ops import TORCH_OPS

_LINEAR: tuple[dict[str, str | int], ...] = tuple(
    {"share": share, "block_rows": rows}
    for share, rows in (("auto", 0), ("rows", 0), ("panels", 0), ("rows", 128), ("rows", 1024))
)
_TACTICS: dict[str, tuple[dict[str, int], ...]] = {
    "paged_attention": ({"item_rows": 64}, {"item_rows": 16}, {"item_rows": 32}, {"item_rows": 128})
}
_QUANTIZED: tuple[dict[str, str], ...] = tuple({"path": path} for path in ("auto", "vectors", "tiles", "groups"))
_GPU_TACTICS = {
    "paged_attention": gpu.PAGED_ATTENTION,
    "linear": gpu.LINEAR,
    "linear_fp8": gpu.LINEAR_FP8,
    "linear_int8": gpu.INT8,
}
_GPU_SCRATCH = {"paged_attention": "of_attention", "moe": "of_experts", "experts": "of_experts"}
_PACK = {"qweight": "packing:pack_weight", "scales_NG": "packing:pack_scales"}
_NEEDS: dict[str, dict[str, Any]] = {"fp8": {"min_capability": (8, 9)}, "int8": {"min_capability": (7, 5)}}


def _row(
    backend: Backend,
    op: str,
    bind: str,
    supports: str = "",
    *,
    variant: str = "",
    supports_tactic: str = "",
    scratch: str = "",
    pack: Mapping[str, str] | None = None,
    **rest: Any,
) -> Kernel:
    """A kernel named after its backend, op and variant. bind, supports..., pack: "module:attribute" in its package;
    scratch: an attribute of its module of that name."""
    package = f"tritium.kernels.{backend}"
    return Kernel(
        name=f"{backend}.{op}{variant}",
        op=op,
        backend=backend,
        target=f"{package}.{bind}",
        supports=f"{package}.{supports}" if supports else None,
        supports_tactic=f"{package}.{supports_tactic}" if supports_tactic else None,
        scratch=f"{package}.scratch:{scratch}" if scratch else None,
        pack={argument: f"{package}.{target}" for argument, target in (pack or {}).items()},
        **rest,
    )


KERNELS: tuple[Kernel, ...] = (
    *(
        _row("cpu", op, f"{module}:bind_{op}", f"{module}:{supports}", tactics=_TACTICS.get(op, ()), numerics=numerics)
        for op, module, supports, numerics in (
            ("embedding", "copies", "supports_embedding", "exact"),
            ("quantized_embedding", "copies", "supports_quantized_embedding", "fp32, element by element"),
            ("rms_norm", "norms", "supports", "fp32, 4 vectors of 16 lanes"),
            ("layer_norm", "norms", "supports", "fp32, 4 vectors of 16 lanes"),
            ("add_rms_norm", "norms", "supports_add", "fp32, 4 vectors of 16 lanes"),
            ("add_layer_norm", "norms", "supports_add", "fp32, 4 vectors of 16 lanes"),
            ("quantized_rms_norm", "norms", "supports", "as rms_norm, then exact"),
            ("quantized_layer_norm", "norms", "supports", "as layer_norm, then exact"),
            ("quantized_add_rms_norm", "norms", "supports_add", "as add_rms_norm, then exact"),
            ("quantized_add_layer_norm", "norms", "supports_add", "as add_layer_norm, then exact"),
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
        _row(
            "gpu",
            op,
            f"{module}:{bind}",
            f"supports:{supports}",
            takes_context=op == "varlen_attention" or op in _GPU_SCRATCH,
            scratch=_GPU_SCRATCH.get(op, ""),
            numerics=numerics,
            is_invariant=op not in ("linear", "linear_fp8", "paged_attention"),
            tactics=_GPU_TACTICS.get(op, ()),
            supports_tactic="tactics:fits_paged_attention" if op == "paged_attention" else "",
            **_NEEDS.get(op.rpartition("_")[2], {}),
        )
        for op, module, bind, supports, numerics in (
            ("embedding", "copies", "bind_embedding", "embedding", "exact"),
            ("embedding_part", "copies", "bind_embedding_part", "embedding", "exact"),
            ("gather_rows", "copies", "bind_gather_rows", "gather_rows", "exact"),
            ("kv_store", "copies", "bind_kv_store", "kv_store", "exact, or e4m3 saturated"),
            ("rms_norm", "norms", "bind_rms_norm", "norm", "fp32"),
            ("layer_norm", "norms", "bind_layer_norm", "norm", "fp32"),
            ("rope_cos_sin", "rope", "bind_rope_cos_sin", "rope_cos_sin", "fp32, libdevice"),
            ("rope", "rope", "bind_rope", "rope", "fp32"),
            ("activation", "activations", "bind_activation", "activation", "fp32"),
            ("gated_activation", "activations", "bind_gated_activation", "gated_activation", "fp32"),
            ("add_rms_norm", "norms", "bind_add_rms_norm", "add_norm", "fp32"),
            ("add_layer_norm", "norms", "bind_add_layer_norm", "add_norm", "fp32"),
            ("rope_kv_store", "rope", "bind_rope_kv_store", "rope_kv_store", "fp32, or e4m3 saturated"),
            ("linear", "linear", "bind", "linear", "cuBLAS"),
            ("linear_fp8", "fp8", "bind_linear", "fp8_linear", "cuBLASLt or Triton, fast accumulation; few rows: fp32"),
            ("moe", "moe", "bind_moe", "moe", "fp32, K in steps of one size"),
            ("experts", "moe", "bind_experts", "experts", "fp32, K in steps of one size"),
            ("linear_int8", "matmul", "bind_int8", "int8_linear", "exact sums, fp32 scales"),
            ("paged_attention", "attention", "bind", "paged_attention", "fp32, split by the number of sequences"),
            ("varlen_attention", "varlen", "bind", "packed_attention", "fp32, tiles of keys by place in the sequence"),
        )
    ),
    *(
        _row(
            "gpu",
            f"{base}_{kept}",
            f"rows:bind_{base}",
            f"supports:{supports}",
            numerics=f"fp32, {kept}",
            **_NEEDS[kept],
        )
        for kept in ROW_FORMATS
        for base, supports in zip(
            ROW_BASES, ("rows", "rows", "rows", "gated_rows", "rows", "rows", "pair_rows"), strict=True
        )
    ),
    _row(
        "gpu",
        "all_reduce",
        "collectives:bind_all_reduce",
        "supports:all_reduce",
        takes_context=True,
        numerics="NCCL's order",
        is_invariant=False,
    ),
    *(
        _row("gpu", op, f"kv_int8:bind_{op}", f"supports:{op}_int8", variant="_int8", numerics="fp32, int8 a row")
        for op in ("kv_store", "rope_kv_store")
    ),
    _row(
        "gpu",
        "quantized_linear",
        "quantized:bind",
        "supports:quantized_linear",
        takes_context=True,
        scratch="of_quantized",
        pack=_PACK,
        tactics=gpu.QUANTIZED,
        numerics="fp32, split by the number of rows",
        is_invariant=False,
    ),
    *(
        _row(
            "gpu",
            op,
            f"{module}:{bind}",
            f"supports:{supports}",
            variant="_fixed",
            takes_context=op == "paged_attention",
            numerics=numerics,
            pack=pack,
            **_NEEDS.get(op.rpartition("_")[2], {}),
        )
        for op, module, bind, supports, numerics, pack in (
            ("linear", "matmul", "bind_fixed", "linear", "fp32, K in steps of one size", {}),
            (
                "linear_fp8",
                "matmul",
                "bind_fixed",
                "fp8_linear",
                "as tensor cores add e4m3, K in steps of one size",
                {},
            ),
            ("quantized_linear", "quantized", "bind_fixed", "quantized_linear", "fp32, group by group", _PACK),
            (
                "paged_attention",
                "attention_fixed",
                "bind",
                "paged_attention",
                "fp32, tiles of keys by absolute position",
                {},
            ),
        )
    ),
    _row(
        "gpu",
        "paged_attention",
        "attention_varlen:bind",
        "supports:varlen_attention",
        variant="_varlen",
        takes_context=True,
        scratch="of_own_singles",
        numerics="fp32, split by the number of sequences; prompts: FlashAttention's",
        is_invariant=False,
        min_capability=(8, 0),
    ),
    _row(
        "gpu",
        "varlen_attention",
        "varlen_flash:bind",
        "supports:packed_flash",
        variant="_flash",
        takes_context=True,
        numerics="FlashAttention's",
        is_invariant=False,
        min_capability=(8, 0),
    ),
    _row(
        "gpu",
        "paged_attention",
        "attention_flashinfer:bind",
        "supports:flashinfer_attention",
        variant="_flashinfer",
        takes_context=True,
        scratch="of_flashinfer",
        tactics=gpu.FLASHINFER,
        numerics="single tokens: FlashInfer's XQA, fp32 sums, parts in 16 bits; prompts: as gpu.paged_attention",
        is_invariant=False,
        min_capability=(9, 0),
    ),
    *(
        _row(
            "cpu",
            op,
            "linear:bind",
            f"linear:{supports}",
            pack={"weight_NK": f"linear:{pack}"},
            tactics=_LINEAR,
            numerics="fp32 chains over K; their order is the instruction set's",
        )
        for op, supports, pack in (
            ("linear", "supports", "pack_weight"),
            ("linear_activation", "supports_activation", "pack_weight"),
            ("linear_gated", "supports_activation", "pack_gated"),
            ("linear_add", "supports_add", "pack_weight"),
            ("linear_pair", "supports_pair", "pack_weight"),
        )
    ),
    *(
        _row(
            "eager",
            op,
            f"linear:{bind}",
            row_multiple=TILE_ROWS,
            numerics="fp32 sums, torch's order for TILE_ROWS rows",
        )
        for op, bind in (
            ("linear", "bind"),
            ("linear_activation", "bind_linear_activation"),
            ("linear_gated", "bind_linear_gated"),
            ("linear_add", "bind_linear_add"),
            ("linear_pair", "bind_linear_pair"),
        )
    ),
    *(
        _row(
            "cpu",
            op,
            f"moe:bind_{op}",
            f"moe:supports_{op}",
            pack={"gate_up_EGD": "moe:pack_gate_up", "down_EDF": "moe:pack_experts"},
            numerics="fp32 chains over K; their order is the instruction set's",
        )
        for op in ("moe", "experts")
    ),
    _row("eager", "moe", "moe:bind", numerics="torch's, row by row"),
    *(
        _row(
            "cpu",
            op,
            "quantized:bind",
            f"quantized:{supports}",
            pack={"qweight": f"quantized:{weight}", "scales_NG": f"quantized:{scales}"},
            tactics=_QUANTIZED,
            supports_tactic="quantized:supports_tactic",
            numerics="int8 activations: exact sums over all of K; else fp32 chains, by machine",
        )
        for op, supports, weight, scales in (
            ("quantized_linear", "supports", "pack_weight", "pack_scales"),
            ("quantized_linear_activation", "supports_activation", "pack_weight", "pack_scales"),
            ("quantized_linear_gated", "supports_activation", "pack_gated", "pack_gated_scales"),
            ("quantized_linear_add", "supports_add", "pack_weight", "pack_scales"),
        )
    ),
    *(
        _row(
            "eager",
            op,
            f"quantized:{bind}",
            row_multiple=TILE_ROWS,
            numerics="int8 activations: as on the CPU, compiled; else torch's order for TILE_ROWS rows",
        )
        for op, bind in (
            ("quantized_linear", "bind"),
            ("quantized_linear_activation", "bind_quantized_linear_activation"),
            ("quantized_linear_gated", "bind_quantized_linear_gated"),
            ("quantized_linear_add", "bind_quantized_linear_add"),
        )
    ),
    _row("eager", "experts", "experts:bind", numerics="fp32 sums, torch's order for TILE_ROWS rows"),
    *(
        _row("eager", op, f"collectives:bind_{op}", takes_context=True, numerics=numerics)
        for op, numerics in (("all_reduce", "fp32, in the order of the ranks"), ("all_gather", "exact"))
    ),
    *(
        _row("eager", op, f"reference:{op}", numerics="the op's reference")
        for op in (
            "embedding",
            "quantized_embedding",
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
            "quantized_rms_norm",
            "quantized_layer_norm",
            "quantized_add_rms_norm",
            "quantized_add_layer_norm",
            *(f"{base}_{kept}" for kept in ROW_FORMATS for base in (*ROW_BASES, "linear")),
        )
    ),
    *(_row("eager", op, f"aten:{bind_name(op)}", numerics="torch's own") for op in ALLOWED),
    *(_row("eager", op, f"torch_ops:{torch_ops.bind_name(op)}", numerics="torch's own") for op in TORCH_OPS),
)

"""paged_attention: a launch for sequences of one token, one for chunks of prompts (on Hopper by `attention_hopper`);
tactics and layout checks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from tritium.errors import KernelError
from tritium.kernels.gpu import attention_hopper, scratch
from tritium.kernels.gpu.attention_decode import decode_dot_kernel, decode_vector_kernel, join_splits_kernel
from tritium.kernels.gpu.attention_prefill import prefill_kernel
from tritium.kernels.gpu.copies import need_dense
from tritium.kernels.gpu.cuda import can_compile, can_convert_fp8, launcher
from tritium.kernels.gpu.programmatic import launch_options
from tritium.kernels.gpu.scratch import SPLIT_BELOW, SPLITS
from tritium.kernels.kernel import LaunchContext, Thunk

FP8 = torch.float8_e4m3fn
_SHORT = 256  # tokens


@dataclass(frozen=True, kw_only=True)
class DecodeTactic:
    """form: "vector" or "dot" in Triton, with `tile` keys a step; "bytes" in CUDA C++, whose warps are their own
    programs and whose `num_stages` is how many blocks an SM shall hold at once."""

    form: str
    tile: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class PrefillTactic:
    """block_m: new tokens a program; tile: keys a step."""

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


def decode_tactic(group: int, head_size: int, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> DecodeTactic:
    """What was fastest on an H200 (benchmarks/gpu/kernels.py); fp32 takes small tiles to fit."""
    if group == 1:
        return DecodeTactic(form="vector", tile=16, num_warps=2, num_stages=3)
    if q_dtype == torch.float32:
        return DecodeTactic(form="dot", tile=32, num_warps=4, num_stages=1)
    return DecodeTactic(form="dot", tile=64, num_warps=2 if kv_dtype == FP8 else 4, num_stages=3)


def bytes_tactic(head_size: int, *, is_full: bool = False, blocks: int = 0) -> DecodeTactic:
    """As `decode_tactic`, of the kernel in CUDA C++. is_full: there is work for more than 4 blocks an SM. blocks: that
    many.

    Heads of 128 then gain 1 to 6 % by 6 blocks of fewer registers. With 64 sequences they lose 11 %, and heads of 256,
    whose sums need the registers, lose 12 % in any case.
    """
    num_stages = blocks or (6 if is_full and head_size == 128 else 4)
    return DecodeTactic(form="bytes", tile=4096 // head_size, num_warps=2, num_stages=num_stages)


def fits_bytes_kernel(args: Mapping[str, Any]) -> bool:
    """csrc/decode_bytes.cu can run it: a cache in e4m3 or int8, up to 8 query heads a kv head, 16-byte rows."""
    q, cache = args["q_TNH"], args["cache_layer"]
    num_heads, head_size = q.shape[1:]
    num_kv_heads, page = cache.shape[2:4]
    is_aligned = q.data_ptr() % 16 == 0 and q.stride(0) % 8 == 0 and q.stride(1) % 8 == 0
    can_run = can_convert_fp8 if cache.dtype == FP8 else can_compile
    return (
        cache.dtype in (FP8, torch.int8)
        and q.dtype in (torch.bfloat16, torch.float16)
        and head_size in (64, 128, 256)
        and num_heads // num_kv_heads <= 8
        and page % 8 == 0
        and is_aligned
        and can_run(q.device)
    )


def prefill_tactic(
    head_size: int, q_dtype: torch.dtype, kv_dtype: torch.dtype, *, is_short: bool = False
) -> PrefillTactic:
    """As `decode_tactic`. is_short: for chunks of up to `_SHORT` tokens on average."""
    if q_dtype == torch.float32:
        return PrefillTactic(block_m=32, tile=32, num_warps=4, num_stages=1)
    if kv_dtype == FP8 and head_size > 64:
        if is_short:
            return PrefillTactic(block_m=64, tile=64, num_warps=4, num_stages=2)
        return PrefillTactic(block_m=128, tile=128, num_warps=8, num_stages=2)
    if head_size > 128:
        return PrefillTactic(block_m=64, tile=32, num_warps=4, num_stages=2)
    return PrefillTactic(
        block_m=128 if head_size > 64 else 64, tile=64, num_warps=8 if head_size > 64 else 4, num_stages=2
    )


def bind(
    args: Mapping[str, Any],
    outputs: Sequence[torch.Tensor],
    context: LaunchContext,
    decode: DecodeTactic | None = None,
    prefill: PrefillTactic | None = None,
    *,
    chunks: Callable[[], bool] | None = None,
    singles: Callable[[], bool] | None = None,
    blocks: int = 0,
    split_below: int = SPLIT_BELOW,
    prompts: str = "",
) -> Thunk:
    """ops.paged_attention into outputs[0]; rows past num_tokens stay as they are. prefill: keeps chunks in Triton.

    chunks, singles: other kernels, for chunks and for single tokens; False where they cannot. blocks, split_below,
    prompts: a tactic's, see tactics.py.
    q and out may be strided in tokens and heads, the cache in blocks. Reads only keys that a query of the step sees.
    """
    q, cache, table, out = args["q_TNH"], args["cache_layer"], args["block_table_SB"], outputs[0]
    counters = [args[name] for name in ("cu_seqlens_q", "context_lens_S", "batch_counts")]
    need_dense(q_TNH=q[0, 0], cache_layer=cache[0], block_table_SB=table[0], out=out[0, 0])
    for x in (table, *counters):
        if x.dtype != torch.int32:
            raise KernelError(f"tables and counts of paged_attention are int32, not {x.dtype}")
    slopes = args.get("alibi_slopes_N")
    slopes_or_any = counters[0] if slopes is None else slopes
    num_heads, head_size = q.shape[1:]
    num_kv_heads, page = cache.shape[2:4]
    group = num_heads // num_kv_heads
    is_ours = fits_bytes_kernel(args)
    full = decode or bytes_tactic(head_size, is_full=True, blocks=blocks)  # where there are many sequences
    decode = decode or (
        bytes_tactic(head_size, blocks=blocks) if is_ours else decode_tactic(group, head_size, q.dtype, cache.dtype)
    )
    long, short = (
        prefill or prefill_tactic(head_size, q.dtype, cache.dtype, is_short=is_short) for is_short in (False, True)
    )
    head_block = max(16, triton.next_power_of_2(head_size))
    strides = (q.stride(0), q.stride(1), out.stride(0), out.stride(1), cache.stride(0), table.stride(0), args["scale"])
    shape = {
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_SIZE": head_size,
        "HEAD_BLOCK": head_block,
        "PAGE": page,
        "WINDOW": args["window"],
        "SOFTCAP": float(args["softcap"]),
        "HAS_SLOPES": slopes is not None,
    }
    decode_shape = {**shape, "TILE": decode.tile, "num_warps": decode.num_warps, "num_stages": decode.num_stages}
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    is_half = cache.dtype == FP8
    if decode.form == "dot":
        columns = max(16, triton.next_power_of_2(group))
        decode_shape |= {"GROUP": group, "COLUMNS": columns, "IS_HALF": is_half, "PRECISION": precision}
    decode_kernel = decode_dot_kernel if decode.form == "dot" else decode_vector_kernel
    prefill_shape = {**shape, "GROUP": group, "IS_HALF": is_half, "PRECISION": precision}
    most_split = scratch.most_split(table.shape[0], num_kv_heads, split_below)
    partials = scratch.take(context, scratch.partials(most_split, num_heads, head_size), q.device)
    options = launch_options(q.device)
    is_hoppers = chunks is None and prefill is None and not prompts
    dense = attention_hopper.bind(args, out, context) if is_hoppers and attention_hopper.fits(args, out) else chunks
    join_strides = (num_heads, out.stride(0), out.stride(1))

    if decode.form == "bytes":
        launch = _bytes_launch(args, out, partials, slopes_or_any, shape, group, decode, full)
    else:

        def launch(sequences: int, splits: int) -> None:
            tensors = (q, cache, out, partials, slopes_or_any, table, *counters)
            decode_kernel[(sequences, num_kv_heads, splits)](*tensors, *strides, **decode_shape, SPLITS=splits)

    def thunk() -> None:
        sequences = context.num_decodes
        if sequences and singles and singles():
            sequences = 0
        if 0 < sequences <= most_split:
            launch(sequences, SPLITS)
            join_splits_kernel[(sequences, num_heads)](
                partials, out, counters[0], counters[2], *join_strides,
                HEAD_SIZE=head_size, HEAD_BLOCK=head_block, SPLITS=SPLITS, num_warps=4, **options,
            )  # fmt: skip
        elif sequences:
            launch(sequences, 1)
        if context.num_prefills and not (dense and dense()):
            tactic = short if context.num_prefill_tokens <= _SHORT * context.num_prefills else long
            tiles = context.num_prefill_tokens // tactic.block_m + context.num_prefills
            tensors = (q, cache, out, slopes_or_any, table, *counters)
            prefill_kernel[(num_heads, tiles)](
                *tensors, *strides, **prefill_shape, BLOCK_M=tactic.block_m, TILE=tactic.tile,
                num_warps=tactic.num_warps, num_stages=tactic.num_stages,
            )  # fmt: skip

    return thunk


def _bytes_launch(
    args: Mapping[str, Any],
    out: torch.Tensor,
    partials: torch.Tensor,
    slopes: torch.Tensor,
    shape: Mapping[str, Any],
    group: int,
    tactic: DecodeTactic,
    full: DecodeTactic,
) -> Callable[[int, int], None]:
    """Launches csrc/decode_bytes.cu for so many sequences, each context in so many parts; many by the tactic `full`."""
    q, cache, table = args["q_TNH"], args["cache_layer"], args["block_table_SB"]
    counters = [args[name] for name in ("cu_seqlens_q", "context_lens_S", "batch_counts")]
    strides = (q.stride(0), q.stride(1), out.stride(0), out.stride(1), cache.stride(0), table.stride(0))
    constants = {
        "IS_INT8": cache.dtype == torch.int8,
        "IS_BF16": q.dtype == torch.bfloat16,
        "KV_HEADS": shape["NUM_KV_HEADS"],
        "GROUP": group,
        **{name: shape[name] for name in ("HEAD_SIZE", "HEAD_BLOCK", "PAGE", "WINDOW", "SOFTCAP", "HAS_SLOPES")},
    }
    tensors = (q, cache, out, partials, slopes, table, *counters)
    places = torch.cuda.get_device_properties(q.device).multi_processor_count * tactic.num_stages * tactic.num_warps

    def launches(splits: int, tactic: DecodeTactic) -> Callable[[int], None]:
        shaped = {**constants, "WARPS": tactic.num_warps, "MIN_CTAS": tactic.num_stages}
        numbers = (*strides, splits, float(args["scale"]))
        run = launcher("decode_bytes", shaped, (*tensors, *numbers), threads=32 * tactic.num_warps)
        return lambda warps: run(-(-warps // tactic.num_warps))

    few, split, many = launches(1, tactic), launches(SPLITS, tactic), launches(1, full)

    def launch(sequences: int, splits: int) -> None:
        warps = sequences * shape["NUM_KV_HEADS"] * splits
        (split if splits > 1 else many if warps > places else few)(warps)

    return launch

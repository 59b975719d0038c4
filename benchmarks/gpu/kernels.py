"""Times the attention kernels on a GPU by tactic, each checked first: `python benchmarks/gpu/kernels.py --out FILE`.

Random data (zeros run faster than real data), distinct pages in random order, several times the L2; medians of events.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton

from tritium.kernels.gpu import attention
from tritium.kernels.gpu.attention import DecodeTactic, PrefillTactic
from tritium.kernels.kernel import LaunchContext
from tritium.ops.kv_int8 import parts_of, quantize_cache

FP8, BF16, INT8 = torch.float8_e4m3fn, torch.bfloat16, torch.int8
# name, sequences, context, query heads, kv heads, head size, kv dtype, page
DECODES = (
    ("llama-3 128/128 fp8", 2048, 192, 32, 8, 128, FP8, 64),
    ("llama-3 128/128 fp8 page 16", 1024, 192, 32, 8, 128, FP8, 16),
    ("llama-3 128/128 bf16", 1024, 192, 32, 8, 128, BF16, 64),
    ("llama-3 2048/128 fp8", 256, 2112, 32, 8, 128, FP8, 64),
    ("llama-2 128/128 fp8", 1024, 192, 32, 32, 128, FP8, 64),
    ("gpt-j 128/128 fp8", 1024, 192, 16, 16, 256, FP8, 64),
    ("gpt-j 2048/128 fp8", 192, 2112, 16, 16, 256, FP8, 64),
    ("llama-3 one sequence of 256 fp8", 1, 256, 32, 8, 128, FP8, 64),
    *(
        (f"{model} {sequences} of {context} {kind}", sequences, context, *heads, dtype, 64)
        for model, sequences, context, heads in (
            ("llama-3", 2048, 192, (32, 8, 128)),
            ("llama-3", 1024, 256, (32, 8, 128)),
            ("llama-3", 64, 1024, (32, 8, 128)),
            ("llama-3", 768, 1257, (32, 8, 128)),
            ("gpt-j", 1024, 192, (16, 16, 256)),
        )
        for kind, dtype in (("int8", INT8), ("fp8", FP8), ("bf16", BF16))
    ),
)
# name, sequences, new tokens each, query heads, kv heads, head size, kv dtype, page
PREFILLS = (
    ("llama-3 prompts of 128 fp8", 16, 128, 32, 8, 128, FP8, 64),
    ("llama-3 prompts of 2048 fp8", 2, 2048, 32, 8, 128, FP8, 64),
    ("gpt-j prompts of 2048 fp8", 2, 2048, 16, 16, 256, FP8, 64),
    ("llama-3 prompts of 2048 int8", 2, 2048, 32, 8, 128, INT8, 64),
    ("llama-3 prompts of 2048 bf16", 2, 2048, 32, 8, 128, BF16, 64),
    ("gpt-j prompts of 2048 int8", 2, 2048, 16, 16, 256, INT8, 64),
)
BYTES_TACTICS = tuple(
    DecodeTactic(form="bytes", tile=0, num_warps=warps, num_stages=blocks)
    for warps, blocks in ((1, 8), (1, 12), (2, 4), (2, 5), (2, 6), (4, 2), (4, 3), (8, 1))
)
GQA_TACTICS = (
    DecodeTactic(form="dot", tile=64, num_warps=2, num_stages=3),
    DecodeTactic(form="dot", tile=64, num_warps=4, num_stages=3),
    DecodeTactic(form="dot", tile=64, num_warps=4, num_stages=2),
    *BYTES_TACTICS,
)
MHA_TACTICS = (
    DecodeTactic(form="vector", tile=16, num_warps=2, num_stages=3),
    DecodeTactic(form="vector", tile=32, num_warps=4, num_stages=2),
    *BYTES_TACTICS,
)
PREFILL_TACTICS = tuple(
    PrefillTactic(block_m=block_m, tile=tile, num_warps=warps, num_stages=stages)
    for block_m, tile, warps, stages in (
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 2), (128, 128, 8, 2),
    )
)  # fmt: skip


def median_ms(run: Callable[[], object], repeats: int = 9) -> float:
    """Median milliseconds of a call, by events, after two warm-ups."""
    times = []
    for i in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end))
    return median(times)


def problem(sequences: int, new: int, context: int, heads: int, kv_heads: int, size: int, dtype: Any, page: int) -> Any:
    """Arguments of paged_attention and its launch context: `new` tokens for each sequence of `context`."""
    pages = -(-context // page)
    shape = (sequences * pages + 1, 2, kv_heads, page, size)
    cache = torch.randn(shape, device="cuda", dtype=BF16)
    cache = quantize_cache(cache) if dtype == INT8 else cache.to(dtype)
    table = (torch.randperm(sequences * pages, device="cuda", dtype=torch.int32) + 1).view(sequences, pages)
    decodes = sequences if new == 1 else 0
    args = {
        "q_TNH": torch.randn(sequences * new, heads, size, device="cuda", dtype=BF16),
        "cache_layer": cache,
        "block_table_SB": table,
        "cu_seqlens_q": torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * new,
        "context_lens_S": torch.full((sequences,), context, device="cuda", dtype=torch.int32),
        "batch_counts": torch.tensor([sequences, sequences * new, 0, decodes], device="cuda", dtype=torch.int32),
        "scale": size**-0.5,
        "window": 0,
        "softcap": 0.0,
    }
    prefills = sequences - decodes
    counts = {"num_decodes": decodes, "num_prefills": prefills, "num_prefill_tokens": prefills * new}
    return args, LaunchContext(**counts, longest_prefill=context if prefills else 0)


def relative_error(args: dict[str, Any], out: torch.Tensor, new: int) -> float:
    """Of the first and last sequence, against fp32 over the cache as it is."""
    heads, size = out.shape[1:]
    kv_heads = args["cache_layer"].shape[2]
    worst = 0.0
    for s in (0, len(args["context_lens_S"]) - 1):
        context = int(args["context_lens_S"][s])
        kv = args["cache_layer"][args["block_table_SB"][s].long()]  # [pages, 2, K, page, H]
        if kv.dtype == INT8:
            integers, scales = parts_of(kv)
            kv = integers * scales.contiguous().view(torch.float32)
        kv = kv.float()
        k, v = (kv[:, i].transpose(0, 1).reshape(kv_heads, -1, size)[:, :context] for i in range(2))
        q = args["q_TNH"][s * new : (s + 1) * new].float().view(new, kv_heads, heads // kv_heads, size)
        score = torch.einsum("tkgh,ksh->tkgs", q, k) * args["scale"]
        position = torch.arange(context - new, context, device="cuda")[:, None, None, None]
        score = score.masked_fill(torch.arange(context, device="cuda") > position, -torch.inf)
        ref = torch.einsum("tkgs,ksh->tkgh", score.softmax(-1), v).reshape(new, heads, size)
        got = out[s * new : (s + 1) * new].float()
        worst = max(worst, ((got - ref).norm() / ref.norm()).item())
    return worst


def time_tactic(args: dict[str, Any], context: LaunchContext, new: int, **tactics: Any) -> dict[str, Any]:
    """Milliseconds and error of one tactic, or why it failed; without one, of what is chosen."""
    name = "".join(str(tactic).split("(", 1)[1][:-1] for tactic in tactics.values()) or "chosen"
    row: dict[str, Any] = {"tactic": name}
    try:
        out = torch.full_like(args["q_TNH"], float("nan"))
        thunk = attention.bind(args, [out], context, **tactics)
        thunk()
        torch.cuda.synchronize()
        return row | {"rel_err": relative_error(args, out, new), "ms": median_ms(thunk)}
    except (RuntimeError, triton.CompilationError, triton.runtime.errors.OutOfResources) as error:  # is a result
        return row | {"failed": f"{type(error).__name__}: {str(error)[-160:]}"}


def decode_rows(cases: str) -> Iterator[dict[str, Any]]:
    for name, sequences, length, heads, kv_heads, size, dtype, page in DECODES:
        if not re.search(cases, name):
            continue
        args, context = problem(sequences, 1, length, heads, kv_heads, size, dtype, page)
        num_bytes = 2 * sequences * length * kv_heads * (size * dtype.itemsize + 4 * (dtype == INT8))
        tactics = GQA_TACTICS if heads > kv_heads else MHA_TACTICS
        for tactic in (None, *tactics):
            if tactic and tactic.form == "bytes" and dtype == BF16:
                continue
            row = time_tactic(args, context, 1, **({"decode": tactic} if tactic else {}))
            yield {"case": name, **row, **({"tbps": num_bytes / row["ms"] / 1e9} if "ms" in row else {})}


def prefill_rows(cases: str) -> Iterator[dict[str, Any]]:
    for name, sequences, length, heads, kv_heads, size, dtype, page in PREFILLS:
        if not re.search(cases, name):
            continue
        args, context = problem(sequences, length, length, heads, kv_heads, size, dtype, page)
        flops = 4 * heads * size * sequences * length * (length + 1) / 2
        for tactics in ({}, *({"prefill": tactic} for tactic in PREFILL_TACTICS)):
            row = time_tactic(args, context, length, **tactics)
            yield {"case": name, **row, **({"tflops": flops / row["ms"] / 1e9} if "ms" in row else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default="", help="a regular expression: only those whose names have it")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernels.py measures a CUDA GPU and found none")
    torch.manual_seed(0)
    rows = []
    for row in (*decode_rows(args.cases), *prefill_rows(args.cases)):
        rows.append(row)
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    args.out.write_text(json.dumps(result, indent=1))
    for case in dict.fromkeys(row["case"] for row in rows):
        good = [row for row in rows if row["case"] == case and row.get("rel_err", 1) < 0.05]
        print(f"{case}: {len(good)} of {sum(row['case'] == case for row in rows)} tactics are right")
        for row in sorted(good, key=lambda row: row["ms"])[:3]:
            rate = f"{row['tbps']:.2f} TB/s" if "tbps" in row else f"{row['tflops']:.0f} TFLOP/s"
            print(f"    {rate}  {row['ms']:.3f} ms  err {row['rel_err']:.4f}  {row['tactic']}")


if __name__ == "__main__":
    main()

"""Paged attention at the heads of Llama-3.2-1B: milliseconds, operations a second, bytes of keys and values a second.

    python benchmarks/bench_attention.py [--threads 2] [--dtypes bfloat16 float32] [--item-rows 64] [--json FILE]

Operations are the two products over the keys that a query sees. Calls take turns over the layers of a cache of at most
400 MB, so that keys and values come from memory; the best call in half a second counts.
"""

import argparse
import json
from pathlib import Path

import torch

from in_turn import best_seconds
from tritium.kernels.cpu.attention import bind_paged_attention
from tritium.ops.kv_int8 import quantize_cache
from tritium.ops.quantized import SCALE_BYTES
from tritium.testing.attention_problems import num_leading_singles

N, K, H, BLOCK = 32, 8, 64, 16  # heads, kv heads, head size, tokens of a block
CACHE_BYTES = 400_000_000
BATCHES = {  # (query tokens, context length) of each sequence
    "prefill 512": [(512, 512)],
    "chunk of 512 at 2048": [(512, 2048)],
    "decode 1 at 2048": [(1, 2048)],
    "decode 8 at 256": [(1, 256)] * 8,
    "decode 32 at 512": [(1, 512)] * 32,
}


def results(name: str, chunks: list[tuple[int, int]], dtype: torch.dtype, *, is_int8: bool, item_rows: int) -> dict:
    """One row of the table."""
    num_blocks = sum(-(-context // BLOCK) for _, context in chunks)
    row = H + SCALE_BYTES if is_int8 else H
    layer_bytes = num_blocks * 2 * K * BLOCK * row * (1 if is_int8 else dtype.itemsize)
    num_layers = max(2, min(16, CACHE_BYTES // layer_bytes))
    starts = torch.tensor([0, *(count for count, _ in chunks)]).cumsum(0)
    table, first = torch.zeros(len(chunks), max(-(-c // BLOCK) for _, c in chunks), dtype=torch.int32), 0
    for i, (_, context) in enumerate(chunks):
        count = -(-context // BLOCK)
        table[i, :count] = torch.arange(first, first + count)
        first += count
    q, calls = torch.randn(int(starts[-1]), N, H).to(dtype), []
    for _ in range(num_layers):
        cache = torch.randn(num_blocks, 2, K, BLOCK, H).to(dtype)
        if is_int8:
            cache = quantize_cache(cache)
        args = {
            "q_TNH": q,
            "cache_layer": cache,
            "block_table_SB": table,
            "cu_seqlens_q": starts.to(torch.int32),
            "context_lens_S": torch.tensor([context for _, context in chunks], dtype=torch.int32),
            "batch_counts": torch.tensor(
                [len(chunks), int(starts[-1]), 0, num_leading_singles(list(enumerate(chunks)))], dtype=torch.int32
            ),
            "scale": H**-0.5,
            "window": 0,
            "softcap": 0.0,
            "alibi_slopes_N": None,
        }
        calls.append(bind_paged_attention(args, [torch.empty_like(q)], item_rows=item_rows))
    seconds = best_seconds(calls)
    pairs = sum(count * (context - count) + count * (count + 1) // 2 for count, context in chunks)
    kept = "int8" if is_int8 else str(dtype)[6:]
    found = {
        "batch": name,
        "dtype": str(dtype)[6:],
        "cache": kept,
        "item_rows": item_rows,
        "ms": seconds * 1e3,
        "gflop_s": 4 * pairs * N * H / seconds / 1e9,
        "gb_s": layer_bytes / seconds / 1e9,
    }
    print(
        f"{name:21} {found['dtype']:8} cache {kept:8} {found['ms']:8.3f} ms {found['gflop_s']:7.0f} GFLOP/s "
        f"{found['gb_s']:6.1f} GB/s",
        flush=True,
    )
    return found


def main() -> None:
    """Print one line per batch and cache; write them as JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--item-rows", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.item_rows} rows an item")
    found = [
        results(name, chunks, getattr(torch, dtype), is_int8=is_int8, item_rows=options.item_rows)
        for dtype in options.dtypes
        for is_int8 in (False, True)
        for name, chunks in BATCHES.items()
    ]
    if options.json:
        text = json.dumps({"torch": torch.__version__, "threads": options.threads, "results": found}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

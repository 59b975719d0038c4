"""One linear, ours against oneDNN's prepacked one through torch, at the sizes of Llama-3.2-1B.

    python benchmarks/bench_linear.py [--threads 2] [--rows 1 8 32 512] [--dtypes bfloat16 float32] [--json FILE]

Both sides take turns over the same copies of a weight, 600 MB of them, so that every call reads its weight from memory;
the best of the calls in half a second counts. GB/s are the weight's bytes over that time.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from in_turn import best_seconds
from tritium.kernels.cpu import linear

SHAPES = ((8192, 2048), (2048, 8192), (2048, 2048))  # N, K
BYTES_IN_TURN = 600_000_000


def onednn(x: torch.Tensor, packed: torch.Tensor, out: torch.Tensor) -> None:
    """The prepacked primitive, and the copy to where a plan wants its result."""
    out.copy_(torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], ""))


def rows(num_out: int, num_in: int, dtype: torch.dtype, counts: list[int]) -> list[dict[str, object]]:
    """One result per number of rows."""
    weight = torch.randn(num_out, num_in).to(dtype)
    copies = range(max(2, BYTES_IN_TURN // (weight.numel() * dtype.itemsize)))
    ours = [linear.pack_weight(weight) for _ in copies]
    theirs = [torch.ops.mkldnn._reorder_linear_weight(weight, 64) for _ in copies]
    results: list[dict[str, object]] = []
    for count in counts:
        x, out = torch.randn(count, num_in).to(dtype), torch.empty(count, num_out, dtype=dtype)
        bound = [linear.bind({"x": x, "weight_NK": packed, "bias": None}, [out]) for packed in ours]
        ms = best_seconds(bound) * 1e3
        peer = best_seconds([partial(onednn, x, packed, out) for packed in theirs]) * 1e3
        gb_s, gflop_s = weight.numel() * dtype.itemsize / ms / 1e6, 2 * count * weight.numel() / ms / 1e6
        name = f"{str(dtype)[6:]} N={num_out} K={num_in} M={count}"
        print(f"{name:32} {ms:8.3f} ms {gb_s:6.1f} GB/s {gflop_s:7.0f} GFLOP/s   oneDNN {peer:8.3f} ms", flush=True)
        results.append({"case": name, "ms": ms, "gb_s": gb_s, "gflop_s": gflop_s, "onednn_ms": peer})
    return results


def main() -> None:
    """Print one line per case; write them as JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 512])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads")
    results = [r for name in options.dtypes for n, k in SHAPES for r in rows(n, k, getattr(torch, name), options.rows)]
    if options.json:
        options.json.write_text(
            json.dumps({"torch": torch.__version__, "threads": options.threads, "results": results})
        )


if __name__ == "__main__":
    main()

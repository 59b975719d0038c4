"""Times linear_fp8 for few rows on a GPU, each checked first: `python benchmarks/gpu/linears.py --out FILE`.

Random data, weights in turn so that none is in the cache; a chain of linears as one CUDA graph, as decoding runs them.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tritium.kernels.gpu.fp8 import bind_few_rows
from tritium.ops.fp8 import linear_fp8, quantize_fp8

# LLaMA-3 8B's linears, (N, K); a layer is all four
LINEARS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 2, 4, 8, 16)
TACTICS = ((8, 8), (8, 4), (4, 8), (4, 4), (16, 4))  # warps, depth
NUM_COPIES = 12  # of a weight


def graph_us(runs: list[Any], repeats: int = 15) -> float:
    """Median microseconds of all the runs as one graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for i in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(1000 * start.elapsed_time(end))
    return median(times)


def problem(num_rows: int, num_out: int, num_k: int) -> tuple[dict[str, Any], torch.Tensor]:
    x, x_scales = quantize_fp8(torch.randn(num_rows, num_k, device="cuda"))
    weight, scales = quantize_fp8(torch.randn(num_out, num_k, device="cuda"))
    args = {"x": x, "x_scales": x_scales, "weight_NK": weight, "weight_scales": scales.view(1, -1), "bias": None}
    return args, torch.full((num_rows, num_out), float("nan"), device="cuda", dtype=torch.bfloat16)


def rows_of(name: str, num_rows: int) -> list[dict[str, Any]]:
    """cuBLASLt and every tactic for one linear: its error, microseconds and TB/s of weight."""
    num_out, num_k = LINEARS[name]
    problems = [problem(num_rows, num_out, num_k) for _ in range(NUM_COPIES)]
    found = []

    def note(tactic: str, runs: list[Any]) -> None:
        runs[0]()
        args, out = problems[0]
        want = linear_fp8(**args, dtype="float32")
        error = ((out.float() - want).norm() / want.norm()).item()
        us = graph_us(runs) / NUM_COPIES
        tbps = num_out * num_k / us / 1e6
        found.append({"linear": name, "rows": num_rows, "tactic": tactic, "rel_err": error, "us": us, "tbps": tbps})

    def product(args: dict[str, Any], out: torch.Tensor) -> Any:
        scales = (args["x_scales"], args["weight_scales"])
        weight = args["weight_NK"].t()
        return lambda: torch._scaled_mm(args["x"], weight, *scales, out_dtype=out.dtype, use_fast_accum=True, out=out)

    note("cuBLASLt", [product(*p) for p in problems])
    for warps, depth in TACTICS:
        note(f"warps {warps} depth {depth}", [bind_few_rows(*p, warps=warps, depth=depth) for p in problems])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("linears.py measures a CUDA GPU and found none")
    torch.manual_seed(0)
    rows = []
    for num_rows in ROWS:
        for name in LINEARS:
            found = rows_of(name, num_rows)
            rows += found
            best = min(found, key=lambda row: row["us"])
            print(
                f"M={num_rows:<3}{name:8} cuBLASLt {found[0]['us']:6.1f} us  best {best['us']:6.1f} us "
                f"{best['tbps']:.2f} TB/s err {best['rel_err']:.4f} {best['tactic']}",
                flush=True,
            )
    args.out.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

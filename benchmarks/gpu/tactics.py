"""Which tactics of the Triton linears are fastest on this GPU: `python benchmarks/gpu/tactics.py --out FILE`.

LLaMA-3 8B's linears; weights rotate through more than the L2 holds. int8 and the fixed kernels of invariance="bitwise"
(kernels/gpu/matmul.py), weights of 8 and 4 bits (kernels/gpu/quantized.py). Median microseconds, in a CUDA graph;
beside them cuBLAS in bf16 for the same sizes.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from tritium.kernels.gpu import matmul, quantized
from tritium.kernels.gpu.matmul import MatmulTactic
from tritium.kernels.gpu.packing import pack_scales
from tritium.kernels.gpu.quantized import QuantizedTactic
from tritium.kernels.kernel import Thunk

SIZES = {"qkv": (6144, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)}
FEW, MANY = (1, 16, 64), (256, 1024, 4096)
FP8 = torch.float8_e4m3fn


def median_us(thunks: list[Thunk], repeats: int = 7) -> float:
    """Of one call, thunks in turn, in a graph: so that the host's time does not count."""
    for thunk in thunks:
        thunk()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for thunk in thunks * 2:
            thunk()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2] * 1000 / (2 * len(thunks))


def copies_of(make: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Enough of a weight that none is found in the L2."""
    first = make()
    return [first, *(make() for _ in range(min(5, int(150e6 // first.nbytes) + 1)))]


def matmul_tactics(bits: int, num_rows: int) -> Iterator[MatmulTactic]:
    k = 1024 // bits
    if num_rows <= 16:
        shapes = [(16, 32, 2 * k, 4, 4), (16, 64, 2 * k, 4, 4), (16, 64, k, 4, 6)]
    elif num_rows <= 64:
        shapes = [(64, 32, k, 4, 4), (64, 64, k, 4, 4), (64, 64, 2 * k, 4, 3)]
    else:
        shapes = [(128, 128, k, 8, 3), (128, 256, k, 8, 3), (128, 128, k, 4, 4), (64, 128, k, 4, 4), (128, 64, k, 4, 4)]
    for m, n, step, warps, stages in shapes:
        yield MatmulTactic(BLOCK_M=m, BLOCK_N=n, BLOCK_K=step, num_warps=warps, num_stages=stages)


def fixed_tactics(bits: int) -> Iterator[MatmulTactic]:
    k = 1024 // bits
    for m, n, warps, stages in ((128, 128, 8, 3), (128, 128, 8, 4), (128, 256, 8, 3), (64, 64, 4, 4), (64, 128, 4, 4)):
        yield MatmulTactic(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages)


def quantized_tactics(num_rows: int, num_out: int) -> Iterator[QuantizedTactic]:
    if num_rows <= 64:
        m, splits = max(16, num_rows), quantized.tactic_for(4, num_rows, num_out, 32).SPLITS
        for n, warps, stages in ((64, 4, 4), (64, 4, 6), (128, 4, 4)):
            yield QuantizedTactic(BLOCK_N=n, BLOCK_M=m, SPLITS=splits, num_warps=warps, num_stages=stages)
        return
    for n, m, warps, stages in ((128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (128, 256, 8, 3), (64, 64, 4, 3)):
        yield QuantizedTactic(BLOCK_N=n, BLOCK_M=m, SPLITS=1, num_warps=warps, num_stages=stages)


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype in (torch.int8, torch.uint8):
        return torch.randint(0, 120, shape, device="cuda", dtype=torch.uint8).to(dtype)
    return torch.randn(shape, device="cuda").to(dtype)


def rows_of(kind: str, num_rows: int, num_out: int, num_in: int) -> Iterator[tuple[str, float | None]]:
    """Of one kind of linear: (tactic, microseconds); None: it needs more than this GPU has."""
    out = torch.empty(num_rows, num_out, device="cuda", dtype=torch.bfloat16)
    dtype = {"int8": torch.int8, "fixed fp8": FP8}.get(kind, torch.bfloat16)
    x: dict[str, Any] = {"x": numbers(dtype, num_rows, num_in)}
    tactics: Iterator[Any]
    bind: Callable[..., Thunk]
    if kind in ("w8a16", "w4a16"):
        kept, packed, groups = (torch.int8, 1, 1) if kind == "w8a16" else (torch.uint8, 2, num_in // 128)
        scales = torch.full(
            (num_out, groups), 1e-3, device="cuda", dtype=torch.float32 if groups == 1 else torch.bfloat16
        )
        x |= {"scales_NG": pack_scales(scales)}
        args = [x | {"qweight": w} for w in copies_of(lambda: numbers(kept, num_out, num_in // packed))]
        tactics = quantized_tactics(num_rows, num_out)
        bind = quantized.bind
    else:
        if dtype != torch.bfloat16:
            ones = torch.ones(max(num_rows, num_out), device="cuda")
            x |= {"x_scales": ones[:num_rows, None], "weight_scales": ones[None, :num_out]}
        args = [x | {"weight_NK": w} for w in copies_of(lambda: numbers(dtype, num_out, num_in))]
        bits = 8 * dtype.itemsize
        tactics = matmul_tactics(bits, num_rows) if kind == "int8" else fixed_tactics(bits)
        bind = matmul.bind_tactic
    if kind == "w8a16" and num_rows == 1:
        for block_n, step, warps in ((8, 1024, 8), (4, 1024, 4), (8, 512, 4), (16, 512, 8), (4, 2048, 8)):
            quantized.ONE_ROW.update(BLOCK_N=block_n, STEP=step, num_warps=warps)
            yield f"one row {block_n}x{step}x{warps}", median_us([bind(a, [out]) for a in args])
    for tactic in tactics:
        name = "x".join(str(value) for value in vars(tactic).values())
        try:
            yield name, median_us([bind(a, [out], tactic=tactic) for a in args])
        except OutOfResources:
            yield name, None


def cublas_us(num_rows: int, num_out: int, num_in: int) -> float:
    x = numbers(torch.bfloat16, num_rows, num_in)
    weights = copies_of(lambda: numbers(torch.bfloat16, num_out, num_in))
    return median_us([partial(torch.mm, x, weight.t()) for weight in weights])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", default=["int8", "w4a16", "w8a16", "fixed bf16", "fixed fp8"])
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rows", type=int, nargs="*", default=[*FEW, *MANY])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tactics.py measures a CUDA GPU and found none")
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    for kind, name, num_rows in itertools.product(args.kinds, args.sizes, args.rows):
        sizes = (num_rows, *SIZES[name])
        row: dict[str, Any] = {"kind": kind, "linear": name, "rows": num_rows, "cublas_bf16_us": cublas_us(*sizes)}
        row["us"] = found = dict(sorted(rows_of(kind, *sizes), key=lambda pair: pair[1] or 1e9))
        result["rows"].append(row)
        times = "  ".join(f"{tactic} {us:.0f}" for tactic, us in found.items() if us is not None)
        print(f"{kind:10} {name:7} {num_rows:4} bf16 {row['cublas_bf16_us']:5.0f} | {times}", flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""FlashInfer's decode attention beside Tritium's: `python benchmarks/gpu/beside_flashinfer.py --out FILE`.

Needs the package flashinfer-python. Distinct pages in random order; median microseconds of a call among several in a
CUDA graph, so that neither side's host time counts. Over fp8 caches XQA is no row of the table: its error says why.
"""

import argparse
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tactics import median_us

from kernels import BF16, FP8, problem, relative_error
from tritium.kernels.gpu import attention, flashinfer_decode

# sequences, context, query heads, kv heads, head size, page
SHAPES = (
    (1, 1024, 32, 8, 128, 64),
    (4, 1024, 32, 8, 128, 64),
    (16, 1024, 32, 8, 128, 64),
    (32, 1024, 32, 8, 128, 64),
    (64, 1024, 32, 8, 128, 64),
    (256, 256, 32, 8, 128, 64),
    (256, 2112, 32, 8, 128, 64),
    (2048, 192, 32, 8, 128, 64),
)


def rows_of(shape: tuple[int, ...], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Microseconds, TB/s and relative error of both kernels for one batch."""
    sequences, length, heads, kv_heads, size, page = shape
    args, context = problem(sequences, 1, length, heads, kv_heads, size, dtype, page)
    num_bytes = 2 * sequences * length * kv_heads * size * dtype.itemsize
    rows = []
    for name in ("tritium", "flashinfer"):
        out = torch.full_like(args["q_TNH"], float("nan"))
        if name == "tritium":
            run: Any = attention.bind(args, [out], context)
        else:
            run = flashinfer_decode.bind(args, out, context)
        if run is None:
            sys.exit("FlashInfer's XQA cannot run here: see the warning above")
        us = median_us([run] * 10)
        error = relative_error(args, out, 1)
        rows.append(
            {"kernel": name, "cache": str(dtype)[6:], "shape": list(shape), "us": us, "tbps": num_bytes / us / 1e6}
            | {"rel_err": error}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("beside_flashinfer.py measures a CUDA GPU and found none")
    torch.manual_seed(0)
    rows = [row for dtype in (BF16, FP8) for shape in SHAPES for row in rows_of(shape, dtype)]
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "flashinfer": metadata.version("flashinfer-python"),
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1))
    for row in rows:
        sequences, length = row["shape"][:2]
        case = f"{row['cache']}, {sequences} of {length}"
        print(f"{case:28} {row['kernel']:10} {row['us']:8.1f} us {row['tbps']:5.2f} TB/s  error {row['rel_err']:.4f}")


if __name__ == "__main__":
    main()

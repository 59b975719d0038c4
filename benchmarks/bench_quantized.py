"""Quantised linears at the sizes of Llama-3.2-1B: weights read a second, and operations a second, by format and rows.

    python benchmarks/bench_quantized.py [--threads 2] [--rows 1 8 32 128 512] [--formats w8a8 ...] [--json FILE]
    python benchmarks/bench_quantized.py --tactics ...
    python benchmarks/bench_quantized.py --onednn ...

Calls take turns over copies of a weight, 400 MB of them, so that each reads its weight from memory; the best call in
half a second counts. Beside it: the bandwidth at which a sum over the same pages reads them, measured in the
same process right before, and bf16 on the same shape. --tactics: instead, every tactic that can run, one call of each
in turn for a second: medians, and each one's time over the default's; with one thread, of CPU time, which other
processes lengthen less.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch

from in_turn import best_seconds, median_seconds
from tritium.kernels.cpu import linear, quantized
from tritium.kernels.select import valid_tactics
from tritium.kernels.table import KERNELS
from tritium.quant.schemes import SCHEMES, WeightFormat
from tritium.quant.weights import quantize_weight, scales_of
from tritium.testing.kernel_cases import specs_of

SHAPES = ((8192, 2048), (2048, 8192), (2048, 2048))  # N, K
BYTES_IN_TURN = 400_000_000
FORMATS: dict[str, tuple[WeightFormat, bool]] = {s.name: (s.weight, s.int8_activations) for s in SCHEMES if s.head}


def read_gb_s(weights: list[torch.Tensor]) -> float:
    """How fast a sum reads these pages: the best of some."""
    views = [w.view(torch.float32) for w in weights]
    return views[0].nbytes / best_seconds([partial(torch.sum, view) for view in views]) / 1e9


def results(num_out: int, num_in: int, name: str, counts: list[int]) -> list[dict[str, object]]:
    """One per number of rows. name: a scheme's, or "bf16"."""
    weight = torch.randn(num_out, num_in) * 0.02
    if name == "bf16":
        pack = partial(linear.pack_weight, weight.to(torch.bfloat16))
    else:
        kept, int8_activations = FORMATS[name]
        scales = scales_of(weight, kept)
        pack = partial(quantized.pack_weight, quantize_weight(weight, scales, kept))
    first = pack()
    copies = [first, *(pack() for _ in range(BYTES_IN_TURN // first.data.nbytes))]
    bandwidth, found = read_gb_s([packed.data for packed in copies]), []
    for count in counts:
        x, out = torch.randn(count, num_in).to(torch.bfloat16), torch.empty(count, num_out, dtype=torch.bfloat16)
        args = {"x": x, "bias": None}
        if name == "bf16":
            calls = [linear.bind({**args, "weight_NK": packed}, [out]) for packed in copies]
        else:
            args |= {"scales_NG": quantized.pack_scales(scales), "int8_activations": int8_activations}
            calls = [quantized.bind({**args, "qweight": packed}, [out]) for packed in copies]
        seconds = best_seconds(calls)
        row = {
            "format": name,
            "num_out": num_out,
            "num_in": num_in,
            "rows": count,
            "ms": seconds * 1e3,
            "gb_s": first.data.nbytes / seconds / 1e9,
            "read_gb_s": bandwidth,
            "gop_s": 2 * count * num_out * num_in / seconds / 1e9,
        }
        print(
            f"{name:11} N={num_out} K={num_in} M={count:<4} {row['ms']:8.3f} ms {row['gb_s']:6.1f} of {bandwidth:5.1f} "
            f"GB/s {row['gop_s']:7.0f} GOP/s",
            flush=True,
        )
        found.append(row)
    return found


def tactics(num_out: int, num_in: int, name: str, counts: list[int]) -> list[dict[str, object]]:
    """One per number of rows and tactic."""
    kept, int8_activations = FORMATS[name]
    weight = torch.randn(num_out, num_in) * 0.02
    scales = scales_of(weight, kept)
    qweight, packed_scales = quantize_weight(weight, scales, kept), quantized.pack_scales(scales)
    first = quantized.pack_weight(qweight)
    copies = [first, *(quantized.pack_weight(qweight) for _ in range(BYTES_IN_TURN // first.data.nbytes))]
    plain = {"bias": None, "int8_activations": int8_activations}
    known = {"x": torch.empty(1, num_in, dtype=torch.bfloat16), "qweight": qweight, "scales_NG": scales}
    ways = valid_tactics(next(row for row in KERNELS if row.name == "cpu.quantized_linear"), specs_of(plain | known))
    found: list[dict[str, object]] = []
    for count in counts:
        x, out = torch.randn(count, num_in).to(torch.bfloat16), torch.empty(count, num_out, dtype=torch.bfloat16)
        args = plain | {"x": x, "scales_NG": packed_scales}
        calls = [[quantized.bind({**args, "qweight": one}, [out], **way) for one in copies] for way in ways]
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        seconds = median_seconds(calls, clock=clock)
        for way, taken in zip(ways, seconds, strict=True):
            row = {"format": name, "num_out": num_out, "num_in": num_in, "rows": count, **way, "ms": taken * 1e3}
            ratio = taken / seconds[0]
            label = "/".join(str(value) for value in way.values())
            print(
                f"{name:11} N={num_out} K={num_in} M={count:<4} {label:15} {row['ms']:8.3f} ms {ratio:6.2f}", flush=True
            )
            found.append(row | {"ratio": ratio})
    return found


def beside_onednn(num_out: int, num_in: int, counts: list[int]) -> list[dict[str, object]]:
    """One per number of rows; that both compute the same is asserted."""
    kept, _ = FORMATS["w8a8"]
    weight = torch.randn(num_out, num_in) * 0.02
    scales = scales_of(weight, kept)
    qweight, packed_scales = quantize_weight(weight, scales, kept), quantized.pack_scales(scales)
    num_copies = max(2, BYTES_IN_TURN // qweight.nbytes)
    ours = [quantized.pack_weight(qweight) for _ in range(num_copies)]
    theirs = [torch.ops.onednn.qlinear_prepack(qweight, None) for _ in range(num_copies)]
    channels, zeros = scales.flatten().float(), torch.zeros(num_out, dtype=torch.int64)
    found: list[dict[str, object]] = []
    for count in counts:
        x, out = torch.randn(count, num_in).to(torch.bfloat16), torch.empty(count, num_out, dtype=torch.bfloat16)
        step = float(x.float().abs().max()) / 127
        unsigned = ((x.float() / step).round() + 128).to(torch.uint8)
        after = (channels, zeros, None, 1.0, 0, torch.bfloat16, "none", [], "")
        args = {"x": x, "bias": None, "scales_NG": packed_scales, "int8_activations": True}
        calls = [quantized.bind({**args, "qweight": one}, [out]) for one in ours]
        multiply = torch.ops.onednn.qlinear_pointwise.default
        peers = [partial(multiply, unsigned, step, 128, one, *after) for one in theirs]
        calls[0]()
        exact = x.float() @ (qweight.float() * channels[:, None]).t()
        for result in (out, peers[0]()):
            assert (result.float() - exact).norm() <= 0.02 * exact.norm()
        seconds, peer = median_seconds([calls, peers])
        row = {"format": "w8a8", "num_out": num_out, "num_in": num_in, "rows": count, "ms": seconds * 1e3}
        row |= {"onednn_ms": peer * 1e3, "rate_over_onednn": peer / seconds}
        print(f"w8a8 N={num_out} K={num_in} M={count:<4} {seconds * 1e3:8.3f} ms, oneDNN {peer * 1e3:8.3f}", flush=True)
        found.append(row)
    return found


def main() -> None:
    """Print one line per case; write them as JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many of the shapes")
    parser.add_argument("--formats", nargs="+", default=["bf16", *FORMATS], choices=["bf16", *FORMATS])
    parser.add_argument("--tactics", action="store_true")
    parser.add_argument("--onednn", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads")
    shapes = SHAPES[: options.shapes]
    case = tactics if options.tactics else results
    names = [name for name in options.formats if name != "bf16" or not options.tactics]
    if options.onednn:
        found = [row for n, k in shapes for row in beside_onednn(n, k, options.rows)]
    else:
        found = [row for n, k in shapes for name in names for row in case(n, k, name, options.rows)]
    if options.json:
        text = json.dumps({"torch": torch.__version__, "threads": options.threads, "results": found}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

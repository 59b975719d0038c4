"""End-to-end generation on one GPU: `python benchmarks/gpu/throughput.py --out FILE [--rows NAME ...]`.

Engines of the published shapes with random weights, made on the device; prompts of distinct random tokens, all
submitted at the start; lengths forced and asserted. Time runs from the first submit to the last token on the host,
scheduling included. One warm-up run of the same workload, cut short, comes first.
"""

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rows import ROWS, Row, build_engine

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.plan import Sizes
from tritium.inspection.costs import Batch, step_cost
from tritium.runtime.assemble import make_loop
from tritium.runtime.engine_loop import EngineLoop
from tritium.runtime.gpu.executor import GpuExecutor
from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import Request, RequestStatus
from tritium.sampling_params import SamplingParams


def requests(row: Row, count: int, output_len: int, vocab_size: int, seed: int) -> list[Request]:
    """Distinct prompts of random tokens, greedy, with forced lengths."""
    draw = random.Random(seed)
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, temperature=0.0)
    prompts = [[draw.randrange(vocab_size) for _ in range(row.input_len)] for _ in range(count)]
    assert len(set(map(tuple, prompts))) == count
    return [Request(f"r{seed}-{i}", prompt, params) for i, prompt in enumerate(prompts)]


def run_all(loop: EngineLoop, batch: list[Request]) -> tuple[float, float, list[StepOutput]]:
    """Seconds from the first submit to the last output, of these in which the host waited for the GPU; outputs."""
    outputs: list[StepOutput] = []
    executor = loop.executor
    assert isinstance(executor, GpuExecutor)
    start, waited = time.perf_counter(), executor.seconds_waited
    for request in batch:
        loop.submit(request, outputs.append)
    while loop.has_work:
        loop.step()
    return time.perf_counter() - start, executor.seconds_waited - waited, outputs


def rates(engine: Engine, batch: list[Request], num_steps: int, kernel_ms: dict[str, list[float]]) -> dict[str, float]:
    """TFLOP/s of the linears and TB/s of keys and values, over the steps that were profiled, all of single tokens."""
    running = [request for request in batch if request.status is RequestStatus.RUNNING]
    count = len(running)
    context = sum(len(request.token_ids) for request in running) / count - num_steps / 2
    sizes = Batch(sizes=Sizes(tokens=count, sequences=count, rows=count), context=round(context))
    costs = [(step.op, step_cost(engine.plan, step, sizes)) for step in engine.plan.steps]
    flops = sum(cost.flops for op, cost in costs if "linear" in op)
    num_bytes = sum(cost.num_bytes for op, cost in costs if op == "paged_attention")

    def ms(*starts: str) -> float:
        return sum(ms for name, (ms, _) in kernel_ms.items() if name.startswith(starts)) / num_steps

    attention = ms("decode_", "_fixed_kernel")
    linear = ms("nvjet", "linear_fp8", "void cublas", "cutlass", "_matmul_kernel", "_quantized_kernel")
    return {
        "sequences": count,
        "mean_context": context,
        "attention_tbps": num_bytes / attention / 1e9 if attention else 0.0,
        "linear_tflops": flops / linear / 1e9 if linear else 0.0,
    }


def profile_steps(engine: Engine, loop: EngineLoop, batch: list[Request]) -> dict[str, Any]:
    """Milliseconds of GPU time by kernel over some steps of a full batch, largest first, and of wall time."""
    for request in batch:
        loop.submit(request, lambda output: None)
    waiting = len(batch)
    while waiting:
        loop.step()
        waiting = loop.scheduler.stats.num_waiting
    loop.step()
    num_steps = 6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(num_steps):
            loop.step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    kernels = {row.key[:90]: [round(row.self_device_time_total / 1000, 3), row.count] for row in rows[:14]}
    found = rates(engine, batch, num_steps, kernels)
    return {"steps": num_steps, "wall_ms": 1000 * wall, **found, "kernel_ms_and_calls": kernels}


def measure(row: Row, engine: Engine, repeats: int) -> dict[str, Any]:
    """The row's result: seconds and tokens/s of each repeat."""
    config = RuntimeConfig(
        max_num_seqs=row.max_num_seqs,
        max_num_batched_tokens=row.max_num_batched_tokens,
        max_model_len=row.input_len + row.output_len,
        enable_prefix_caching=False,
        block_size=row.block_size,
        seed=0,
    )
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loop = make_loop(engine, config, None)
    torch.cuda.synchronize()
    predicted = loop.executor.footprint.total_bytes
    load_seconds = time.perf_counter() - start
    vocab_size = engine.plan.vocab_size
    start = time.perf_counter()
    run_all(loop, requests(row, min(row.num_requests, row.max_num_seqs), min(16, row.output_len), vocab_size, 1))
    warm_seconds = time.perf_counter() - start
    gc.collect()
    gc.freeze()  # what was made by now is not looked at again while requests run
    seconds = []
    for repeat in range(repeats):
        steps = loop.scheduler.stats.num_steps
        elapsed, waited, outputs = run_all(
            loop, requests(row, row.num_requests, row.output_len, vocab_size, 2 + repeat)
        )
        lengths = {len(out.token_ids) for out in outputs}
        reasons = {out.finish_reason for out in outputs}
        assert len(outputs) == row.num_requests and lengths == {row.output_len} and reasons == {"length"}, (
            lengths,
            reasons,
        )
        seconds.append(elapsed)
        steps = loop.scheduler.stats.num_steps - steps
    best = row.num_requests * row.output_len / min(seconds)
    profile = profile_steps(
        engine, loop, requests(row, min(row.num_requests, row.max_num_seqs), row.output_len, vocab_size, 99)
    )
    loop.close()
    gc.unfreeze()
    return {
        "profile": profile,
        **row._asdict(),
        "seconds": seconds,
        "output_tokens_per_second": best,
        "steps": steps,
        "ms_per_step": 1000 * seconds[-1] / steps,
        "host_ms_per_step": 1000 * (seconds[-1] - waited) / steps,
        "load_seconds": load_seconds,
        "warm_up_seconds": warm_seconds,
        "plan_sha256": engine.manifest.files["plan.json"].sha256,
        "memory_bytes": torch.cuda.max_memory_allocated(),
        "predicted_memory_bytes": predicted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--engines", type=Path, help="a folder of engines, which are built there when missing")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--build-only", action="store_true", help="build the engines; needs no GPU")
    args = parser.parse_args()
    place = args.engines or Path(tempfile.mkdtemp(prefix="tritium-gpu-"))
    if args.build_only:
        for name in args.rows:
            build_engine(ROWS[name], place)
        return
    if not torch.cuda.is_available():
        sys.exit("throughput.py measures a CUDA GPU and found none")
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip(),
        "torch": torch.__version__,
        "rows": {},
    }
    for name in args.rows:
        row = ROWS[name]
        result["rows"][name] = measured = measure(row, build_engine(row, place), args.repeats)
        args.out.write_text(json.dumps(result, indent=1))
        print(
            "{name}: {output_tokens_per_second:,.0f} output tokens/s, {ms_per_step:.2f} ms a step, "
            "host {host_ms_per_step:.2f} ms; decoding: linears {linear_tflops:.0f} TFLOP/s, "
            "attention {attention_tbps:.2f} TB/s".format(name=name, **(measured["profile"] | measured)),
            flush=True,
        )
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

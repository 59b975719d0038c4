"""One model on one GPU and on several: `python benchmarks/gpu/tensor_parallel.py --out FILE [--ranks N ...]`.

Engines of published shapes with random weights; random prompts, lengths forced and asserted. A row is
one request (milliseconds a token, its prompt's step included) and 256 requests that are all submitted at the start
(output tokens a second, prompts included): every repeat, and the median. With several ranks steps of one request are
profiled on the first: how long NCCL's kernels take there, waiting for the other ranks included.
"""

import argparse
import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tritium
from tritium.config import BuildConfig, RuntimeConfig, Scheme
from tritium.engine.engine import Engine
from tritium.engine.manifest import is_engine
from tritium.errors import TritiumError
from tritium.models.presets import preset
from tritium.runtime.loop import Loop
from tritium.runtime.outputs import StepOutput
from tritium.runtime.ranks.launch import open_loop
from tritium.runtime.request import Request
from tritium.sampling_params import SamplingParams

INPUT_LEN, OUTPUT_LEN, MANY = 128, 128, 256
NUM_PROFILED = 8  # steps


class Row(NamedTuple):
    """A shape and a scheme; None is bf16."""

    arch: str
    scheme: Scheme | None


ROWS = {
    "llama3-8b-bf16": Row("llama-3-8b", None),
    "llama3-8b-fp8": Row("llama-3-8b", "fp8"),
    "llama3-70b-fp8": Row("llama-3-70b", "fp8"),
}
CONFIG = RuntimeConfig(
    max_num_seqs=MANY,
    max_num_batched_tokens=4096,
    max_model_len=INPUT_LEN + OUTPUT_LEN,
    kv_cache_memory=12 << 30,
    enable_prefix_caching=False,
    block_size=64,
    seed=0,
)


def engine_of(name: str, num_ranks: int, place: Path) -> Engine:
    """The row's engine, or its first rank's, built if it is not in `place` yet. Needs no GPU."""
    row, path = ROWS[name], place / f"{name}-{num_ranks}"
    if not is_engine(path):
        config = BuildConfig(device="cuda", dtype="bfloat16", scheme=row.scheme, tensor_parallel=num_ranks)
        tritium.build(preset(row.arch, dtype="bfloat16"), config, output_dir=path, weights="dummy")
    return Engine.load(path)


def run(loop: Loop, count: int, output_len: int, seed: int, vocab_size: int) -> float:
    """Seconds from the first submit to the last output."""
    draw = random.Random(seed)
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, temperature=0.0)
    prompts = [[draw.randrange(vocab_size) for _ in range(INPUT_LEN)] for _ in range(count)]
    heard: list[StepOutput] = []
    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        loop.submit(Request(f"{seed}-{index}", prompt, params), heard.append)
    while loop.has_work:
        loop.step()
    seconds = time.perf_counter() - start
    ends = {(out.finish_reason, out.error, len(out.token_ids)) for out in heard}
    assert len(heard) == count and ends == {("length", None, output_len)}, ends
    return seconds


def profiled(loop: Loop, vocab_size: int) -> dict[str, Any]:
    """Of one request's steps on this rank: milliseconds a step, and microseconds and calls of NCCL's kernels."""
    params = SamplingParams(max_tokens=OUTPUT_LEN, ignore_eos=True, temperature=0.0)
    loop.submit(Request("profiled", list(range(INPUT_LEN)), params), lambda output: None)
    for _ in range(4):
        loop.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(NUM_PROFILED):
            loop.step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    loop.abort("profiled")
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    kernels = {row.key[:80]: [round(row.self_device_time_total / NUM_PROFILED, 1), row.count] for row in rows[:10]}
    nccl = [row for row in rows if row.key.startswith("nccl")]
    return {
        "wall_ms_a_step": 1000 * wall / NUM_PROFILED,
        "nccl_us_a_call": sum(row.self_device_time_total for row in nccl) / max(1, sum(row.count for row in nccl)),
        "nccl_calls_a_step": sum(row.count for row in nccl) / NUM_PROFILED,
        "kernel_us_a_step_and_calls": kernels,
    }


def measure(name: str, num_ranks: int, place: Path, repeats: int, note: Callable[[str], None]) -> dict[str, Any]:
    """A row's result."""
    engine = engine_of(name, num_ranks, place)
    vocab_size = engine.plan.vocab_size
    free_before = torch.cuda.mem_get_info()[0]
    loop = open_loop(engine, CONFIG, None)
    note("open")
    try:
        for count in (1, MANY):
            run(loop, count, 12, 1, vocab_size)
        note("warm")
        one = [1000 * run(loop, 1, OUTPUT_LEN, 10 + i, vocab_size) / OUTPUT_LEN for i in range(repeats)]
        many = [MANY * OUTPUT_LEN / run(loop, MANY, OUTPUT_LEN, 20 + i, vocab_size) for i in range(repeats)]
        note("measured")
        free_bytes = torch.cuda.mem_get_info()[0]
        found = {
            "one_ms_a_token": statistics.median(one),
            "many_tokens_per_second": statistics.median(many),
            "repeats": [one, many],
            "bytes_taken": free_before - free_bytes,
        }
        note(json.dumps(found))
        return found | {"profile": profiled(loop, vocab_size)}
    finally:
        loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--place", type=Path, default=Path("/tmp/tensor-parallel"), help="where engines are kept")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--build-only", action="store_true")
    given = parser.parse_args()
    begin = time.perf_counter()
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    results: dict[str, Any] = {}
    for name in given.rows:
        for num_ranks in given.ranks:
            label = f"{name}, {num_ranks} GPUs"

            def note(what: str, label: str = label) -> None:
                print(f"{time.perf_counter() - begin:6.1f} s  {label}: {what}", flush=True)

            if given.build_only:
                engine_of(name, num_ranks, given.place)
                note("built")
                continue
            try:
                results[label] = measure(name, num_ranks, given.place, given.repeats, note)
            except (TritiumError, RuntimeError, AssertionError) as error:  # the other rows are worth having
                results[label] = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps({label: results[label]}), flush=True)
            gpus = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
            about = {"gpus": gpus, "torch": torch.__version__, "config": str(CONFIG)}
            given.out.write_text(json.dumps({**about, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

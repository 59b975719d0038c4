"""The process of one side: it loads its engine, runs the loads and prints what it measured. Needs only numpy.

A side is a script with `open_engine(model, format, threads) -> Engine`. Every engine is measured in the same way, whole
calls with token ids in and out, sampling and scheduling included:

    first token  from before the engine's package is imported to the first token of a prompt of 8
    decode       one request: (seconds of 1 + DECODE tokens) - (seconds of 1 token) after distinct prompts of 128
    prefill      one request of 512 tokens, one token out
    r8, r32      requests of 128 tokens, 128 out, all at once: output tokens a second, prompts included
"""

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

VOCAB_SIZE, INPUT_LEN, OUTPUT_LEN, PREFILL_LEN, DECODE_LEN = 32_000, 128, 128, 512, 64
LOADS = ("decode", "prefill", "r8", "r32")
READ_BYTES, READ_PASSES = 1 << 30, 9
MAX_LEN = 768  # of any request; engines that plan a cache by it get it
CONTEXT = 32 * 272  # tokens in the cache of an engine that is told: what the largest load needs


class Engine(Protocol):
    """What a side offers."""

    def generate(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        """`length` greedy tokens for each prompt, whatever they are; all prompts at once."""
        ...

    def logits(self, tokens: list[int]) -> Any:
        """[tokens, vocabulary] in fp32, as numpy has it; None where they cannot be had."""
        ...

    def describe(self) -> dict[str, Any]:
        """Versions, bytes of weights, options."""
        ...


class Prompts:
    """Distinct random prompts without end."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def take(self, count: int, length: int) -> list[list[int]]:
        return [[self._draw.randrange(2, VOCAB_SIZE) for _ in range(length)] for _ in range(count)]


def seconds_of(engine: Engine, prompts: list[list[int]], length: int) -> float:
    """Of one call; the lengths of what comes back are asserted."""
    start = time.perf_counter()
    outputs = engine.generate(prompts, length)
    seconds = time.perf_counter() - start
    lengths = [len(output) for output in outputs]
    assert lengths == [length] * len(prompts), f"asked for {len(prompts)} x {length} tokens, got {lengths}"
    return seconds


def run_load(engine: Engine, prompts: Prompts, load: str) -> float:
    """Tokens a second."""
    if load == "decode":
        first = min(seconds_of(engine, prompts.take(1, INPUT_LEN), 1) for _ in range(2))
        return DECODE_LEN / (seconds_of(engine, prompts.take(1, INPUT_LEN), 1 + DECODE_LEN) - first)
    if load == "prefill":
        return PREFILL_LEN / min(seconds_of(engine, prompts.take(1, PREFILL_LEN), 1) for _ in range(2))
    count = int(load.removeprefix("r"))
    return count * OUTPUT_LEN / seconds_of(engine, prompts.take(count, INPUT_LEN), OUTPUT_LEN)


def memory_mb(file: str, name: str) -> float:
    """A line of /proc/self/`file`. smaps_rollup Pss: its own memory and its share of what it shares; status VmHWM: the
    most that was ever resident, as the kernel itself keeps it (PSS is read now and then only, and reading it is slow).
    """
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/{file} has no line {name}")


def pss_mb() -> float:
    return memory_mb("smaps_rollup", "Pss")


def read_gb_s(threads: int, folder: Path) -> list[float]:
    """How fast this process reads memory, by read_rate.c; one figure a pass, sorted."""
    library = folder / "read_rate.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        source = str(Path(__file__).parent / "read_rate.c")
        subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", source, "-o", part], check=True)
        part.rename(library)
    rates = (ctypes.c_double * READ_PASSES)()
    function = ctypes.CDLL(str(library)).read_rate
    function.restype, function.argtypes = (
        ctypes.c_uint64,
        (ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p),
    )
    assert function(READ_BYTES, threads, READ_PASSES, rates), f"no {READ_BYTES} bytes to read"
    return sorted(rates)


def run(open_engine: Callable[[Path, str, int], Engine]) -> None:
    """Measure; the last line printed is the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--format", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--loads", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logits", type=Path, help="write those of fixed tokens here, as .npy")
    args = parser.parse_args()
    prompts, start = Prompts(args.seed), time.perf_counter()
    engine = open_engine(args.model, args.format, args.threads)
    loaded = time.perf_counter() - start
    seconds_of(engine, prompts.take(1, 8), 1)
    first, memory, rates = time.perf_counter() - start, [pss_mb()], {}
    record = {"loaded_s": loaded, "first_token_s": first, **engine.describe()}
    if args.loads:
        seconds_of(engine, prompts.take(2, INPUT_LEN), 3)  # warm-up
    for load in args.loads:
        if load.startswith("r"):
            seconds_of(engine, prompts.take(int(load[1:]), 16), 3)  # these batches for the first time
        rates[load] = run_load(engine, prompts, load)
        memory.append(pss_mb())
    if args.logits:
        np.save(args.logits, engine.logits(Prompts(1).take(1, INPUT_LEN)[0]))
    record |= {"rates": rates, "pss_mb": max(memory), "pss_after_first_token_mb": memory[0]}
    record["peak_rss_mb"] = memory_mb("status", "VmHWM")
    read = read_gb_s(args.threads, args.model.parent) if args.loads else []
    if read:
        record["read_gb_s"] = {"median": statistics.median(read), "best": read[-1]}
    print(json.dumps(record))

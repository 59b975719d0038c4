"""What tuning an engine changes on this GPU: `python benchmarks/gpu/tuned.py --out FILE`.

For each scheme an engine of a published shape, with fewer layers and random weights, is built and tuned as `tritium
tune` does it, with a timing cache of its own. Then the engine as it was built and the tuned one are opened side by side
and generate the same requests in turn, every second turn in reverse. FILE gets, by scheme, each site's times by size of
batch, what was chosen, and the tokens a second of every turn.
"""

import argparse
import dataclasses
import gc
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from throughput import Row, requests, run_all

import tritium
from tritium.config import BuildConfig, Effort, RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.environment import gpu_environment
from tritium.models.presets import preset
from tritium.runtime.assemble import make_loop
from tritium.runtime.engine_loop import EngineLoop
from tritium.tuner.sites import Site, sites, time_key
from tritium.tuner.timing_cache import TimingCache
from tritium.tuner.tune import tune_engine

MAX_MODEL_LEN = 4096  # room for the prompt of 2,048 tokens that is timed
MAX_NUM_BATCHED_TOKENS = 2048
KV_CACHE_MEMORY = 4 << 30
INPUT_LEN = 128
WARM_UP_TOKENS = 24


def build_engine(arch: str, layers: int, scheme: str | None, place: Path) -> Engine:
    """The engine, built if it is not in `place` yet."""
    path = place / f"{arch}-{layers}-{scheme or 'bf16'}"
    if path.is_dir():
        return Engine.load(path)
    model = preset(arch, dtype="bfloat16", max_model_len=MAX_MODEL_LEN)
    model = dataclasses.replace(model, num_layers=layers, windows=(0,) * layers)
    kept: Any = {"scheme": scheme}
    config = BuildConfig(device="cuda", dtype="bfloat16", max_model_len=MAX_MODEL_LEN, **kept)
    return tritium.build(model, config, output_dir=path, weights="dummy")


def tuned_copy(engine: Engine, effort: Effort, place: Path) -> tuple[Engine, TimingCache, float]:
    """A copy of the engine that is tuned here and now; all its times, and the seconds that it took."""
    path = shutil.copytree(engine.path, place / "tuned")
    cache = TimingCache(gpu_environment(), place / "timings.json")
    start = time.perf_counter()
    return tune_engine(Engine.load(path), effort, cache), cache, time.perf_counter() - start


def site_rows(engine: Engine, cache: TimingCache) -> list[dict[str, Any]]:
    """By site and size: microseconds of a step by every candidate, the default first, and the chosen one."""
    assert engine.tactics is not None
    capability = torch.cuda.get_device_capability()
    found = {site.key: site for site in sites(engine.plan, (), "cuda", is_thorough=False, capability=capability)}
    rows = []
    for choice in engine.tactics.choices:
        site = found[choice.site]
        for count in map(int, choice.seconds):
            tactic = engine.tactics.tactic(choice.steps[0], choice.kernel, count)
            rows.append(
                {
                    "op": site.op,
                    "weight": weight_shape(site),
                    "count": count,
                    "chosen": ":".join([choice.kernel, *(f"{name}={value}" for name, value in tactic.items())]),
                    "us": {
                        candidate.name: round(seconds * 1e6, 1)
                        for candidate in site.candidates
                        if (seconds := cache.get(time_key(site, count, candidate))) is not None
                    },
                }
            )
    return rows


def weight_shape(site: Site) -> list[int]:
    """Of a linear's weight, as it lies there; nothing for other ops."""
    args = json.loads(site.key)[2]
    found = args.get("qweight") or args.get("weight_NK")
    return found[2] if found else []


def tokens_per_second(loop: EngineLoop, num_requests: int, output_len: int, seed: int) -> float:
    """Of one run, all requests at the start, lengths forced."""
    row = Row("", None, INPUT_LEN, output_len, num_requests, num_requests, MAX_NUM_BATCHED_TOKENS)
    seconds, _, outputs = run_all(loop, requests(row, num_requests, output_len, 100_000, seed))
    assert [len(output.token_ids) for output in outputs] == [output_len] * num_requests
    return num_requests * output_len / seconds


def in_turns(engines: list[Engine], counts: list[int], output_len: int, turns: int) -> list[dict[str, Any]]:
    """For each number of requests the output tokens a second of [untuned, tuned] by turn, and the ratio's median."""
    config = RuntimeConfig(
        max_num_seqs=max(counts),
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_model_len=INPUT_LEN + output_len,
        kv_cache_memory=KV_CACHE_MEMORY,
        enable_prefix_caching=False,
        block_size=64,
        seed=0,
    )
    loops = [make_loop(engine, config, None) for engine in engines]
    gc.collect()
    gc.freeze()
    rows = []
    for count in counts:
        for loop in loops:
            tokens_per_second(loop, count, WARM_UP_TOKENS, 1)
        rates = []
        for turn in range(turns):
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            measured = {number: tokens_per_second(loops[number], count, output_len, 2 + turn) for number in order}
            rates.append([round(measured[0]), round(measured[1])])
        ratio = median(tuned / untuned for untuned, tuned in rates)
        rows.append({"requests": count, "output_len": output_len, "untuned, tuned": rates, "ratio": round(ratio, 4)})
        print(f"  {count} requests: {rates} output tokens/s untuned, tuned: {ratio:.3f}", flush=True)
    for loop in loops:
        loop.close()
    gc.unfreeze()
    return rows


def print_gains(rows: list[dict[str, Any]]) -> None:
    """What differs from the default."""
    for row in rows:
        default, chosen = next(iter(row["us"])), row["chosen"]
        if chosen != default and chosen in row["us"]:
            gain = f"{row['us'][default]} -> {row['us'][chosen]} us, {chosen.removeprefix('gpu.')}"
            print(f"  {row['op']} {row['weight']} {row['count']}: {gain}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arch", default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--schemes", nargs="*", default=["w4a16_g128", "fp8"], help="bf16: none")
    parser.add_argument("--effort", default="quick", choices=["quick", "full"])
    parser.add_argument("--requests", nargs="*", type=int, default=[64, 256, 1])
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--engines", type=Path, help="a folder of engines, which are built there when missing")
    parser.add_argument("--build-only", action="store_true", help="build the engines; needs no GPU")
    args = parser.parse_args()
    place = args.engines or Path(tempfile.mkdtemp(prefix="tritium-tuned-"))
    schemes = {name: None if name == "bf16" else name for name in args.schemes}
    if args.build_only:
        for scheme in schemes.values():
            build_engine(args.arch, args.layers, scheme, place)
        return
    if not torch.cuda.is_available() or args.out is None:
        sys.exit("tuned.py measures a CUDA GPU, and writes what it finds to --out FILE")
    result: dict[str, Any] = {"gpu": gpu_environment(), "arch": args.arch, "layers": args.layers, "schemes": {}}
    for name, scheme in schemes.items():
        engine = build_engine(args.arch, args.layers, scheme, place)
        with tempfile.TemporaryDirectory(dir=place) as folder:
            tuned, cache, seconds = tuned_copy(engine, args.effort, Path(folder))
            assert tuned.tactics is not None
            print(f"{name}: {tuned.tactics.num_measured} times measured in {seconds:.1f} s", flush=True)
            row = {"effort": args.effort, "seconds": round(seconds, 1), "num_measured": tuned.tactics.num_measured}
            result["schemes"][name] = row | {"sites": site_rows(tuned, cache)}
            print_gains(result["schemes"][name]["sites"])
            args.out.write_text(json.dumps(result, indent=1))
            runs = in_turns([engine, tuned], args.requests, args.output_len, args.turns)
        result["schemes"][name]["runs"] = runs
        args.out.write_text(json.dumps(result, indent=1))
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

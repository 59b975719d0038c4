"""What each optional pass saves: steps and launches a layer, and time, with the whole pipeline, without it, and without
each pass alone.

    python benchmarks/bench_passes.py counts llama-3.2-1b bfloat16 --out counts.json
    python benchmarks/bench_passes.py speed llama-3.2-1b bfloat16 --out speed.json
    python benchmarks/bench_passes.py speed llama-3.2-1b bfloat16 --cpu-time

The published shape is cut to 4 layers, its weights are random. Steps of a layer: plan steps of 4 layers less those of
3. Launches of a layer: its compiled steps, and the ops that torch's profiler counts while the others run; for counting
the vocabulary is cut too, of which no layer knows.

Speed: a batch of 8 decodes behind 128 tokens, and one prompt of 256 tokens. The engine with all passes and the one
without some run in one process, a step of each in turn, every second turn in reverse, so that what else the machine
does meets both; the gain is the median over the turns of the time without over the time with, and its range the middle
half of them, both from two loadings. The gain at best is that of the sums of each step's shortest time, which others
who use the machine lengthen least. "the same" measures all passes against themselves: what gain the method finds
where there is none. A choice that gives the plan of the whole pipeline is not timed. Rows are written to --out one by
one, and those that it has are not measured again. --cpu-time counts one thread's CPU time in place of the seconds of
two: where others use the machine, it leaves out what they take, but not what they do to its caches.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from tritium import models
from tritium.compiler import build
from tritium.config import SCHEMES, BuildConfig
from tritium.engine.engine import Engine
from tritium.engine.environment import environment
from tritium.engine.plan import Plan
from tritium.models.config import ModelConfig
from tritium.passes.pipeline import OPTIONAL
from tritium.runtime.step_times import StepTimer, TimedBatch, rounds_in_turn

Row = dict[str, str | float]
Choices = Sequence[tuple[str, tuple[str, ...]]]
NUM_LAYERS, NUM_DECODES, CONTEXT, PROMPT = 4, 8, 128, 256
COUNTED_VOCABULARY = 512
SAME = "the same"
BATCHES: dict[str, tuple[int, Callable[[StepTimer], TimedBatch]]] = {  # tokens, and what is timed
    "decode": (NUM_DECODES, lambda timer: timer.decode_batch(NUM_DECODES, CONTEXT)),
    "prefill": (PROMPT, lambda timer: timer.prefill_batch(PROMPT)),
}


def cut(name: str, dtype: str, num_layers: int) -> ModelConfig:
    """The published shape with its first layers alone."""
    config = models.preset(name, dtype=dtype)
    scales = config.attention_scales and config.attention_scales[:num_layers]
    windows = config.windows[:num_layers]
    return dataclasses.replace(config, num_layers=num_layers, windows=windows, attention_scales=scales)


def engine_of(config: ModelConfig, disabled: tuple[str, ...], directory: Path, scheme: str | None = None) -> Engine:
    """Built without the passes `disabled`; weights are generated when it is run, or built for a scheme."""
    config_of_build = BuildConfig(disabled_passes=disabled, max_model_len=2048, scheme=scheme)
    return build(config, config_of_build, output_dir=directory, weights="dummy")


def launches(engine: Engine) -> int:
    """Compiled steps, and the ops of torch that its profiler counts in one batch more."""
    counts = []
    for rounds in (1, 2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            StepTimer(engine).decode(1, CONTEXT, rounds)
        counts.append(sum(e.cpu_parent is None and e.name.startswith("aten::") for e in profile.events()))
    return sum(step.kernel.startswith("cpu.") for step in engine.plan.steps) + counts[1] - counts[0]


def compare(name: str, whole: Engine, other: Engine, seconds: float, *, is_cpu_time: bool) -> Row:
    """Tokens/s of the whole pipeline, and the gain of its passes: median, quartiles, at best, and number of turns.

    Both are loaded twice, each of them first once: where an engine's weights come to lie in memory makes it up to a
    tenth faster or slower.
    """
    num_tokens, batch_of = BATCHES[name]
    num_threads, clock = (1, time.thread_time) if is_cpu_time else (None, time.perf_counter)
    gains, best, rates = [], [], []
    for order in ((whole, other), (other, whole)):
        batches = [batch_of(StepTimer(engine, num_threads=num_threads)) for engine in order]
        once = sum(sum(batch.round(clock)) for batch in batches)
        rounds = rounds_in_turn(batches, min(200, max(6, int(seconds / 2 / once))), clock)
        with_it, without = ([sum(one) for one in rounds[order.index(engine)]] for engine in (whole, other))
        gains.append([b / a for a, b in zip(with_it, without, strict=True)])
        rates += with_it
        shortest = [sum(map(min, zip(*of_one, strict=True))) for of_one in rounds]  # each step's, over the turns
        best.append(shortest[order.index(other)] / shortest[order.index(whole)])
    quartiles = [statistics.quantiles(half, n=4) for half in gains]
    low, middle, high = (statistics.geometric_mean(pair) for pair in zip(*quartiles, strict=True))
    rate = num_tokens / statistics.median(rates)
    found = {"tokens_per_second": rate, "gain": middle, "gain_low": low, "gain_high": high}
    found |= {"gain_at_best": statistics.geometric_mean(best), "turns": len(rates)}
    return {f"{name}_{key}": round(value, 4) for key, value in found.items()}


def speeds(
    config: ModelConfig, scheme: str | None, choices: Choices, seconds: float, place: Path, *, is_cpu_time: bool
) -> Iterator[Row]:
    """One row for each choice of passes."""
    whole = engine_of(config, (), place / "whole", scheme)
    for number, (what, disabled) in enumerate(choices):
        engine = engine_of(config, disabled, place / f"{number}", scheme)
        row: Row = {"passes": what}
        if engine.plan == whole.plan and what != SAME:
            row["plan"] = "the same"
        else:
            for name in BATCHES:
                row |= compare(name, whole, engine, seconds, is_cpu_time=is_cpu_time)
        yield row


def counts(shape: str, dtype: str, choices: Choices, place: Path) -> Iterator[Row]:
    """Steps and launches of one layer, for each choice of passes; counted once for each plan."""
    configs = [
        dataclasses.replace(cut(shape, dtype, num), vocab_size=COUNTED_VOCABULARY)
        for num in (NUM_LAYERS - 1, NUM_LAYERS)
    ]
    counted: list[tuple[Plan, Row]] = []
    for what, disabled in choices:
        few, many = (engine_of(config, disabled, place / f"{config.num_layers}") for config in configs)
        row = next((row for plan, row in counted if plan == many.plan), None)
        if row is None:
            steps = len(many.plan.steps) - len(few.plan.steps)
            row = {"steps": steps, "launches": launches(many) - launches(few)}
            counted.append((many.plan, row))
        yield {"passes": what, **row}


def main() -> None:
    """Print one line for each choice of passes, and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measure", choices=("counts", "speed"))
    parser.add_argument("shape", choices=models.PRESETS)
    parser.add_argument("dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--scheme", choices=SCHEMES, help="of the weights whose speed is measured")
    parser.add_argument("--only", nargs="*", help="passes to leave out; by default each, and all of them")
    parser.add_argument("--seconds", type=float, default=8.0, help="of turns, for each choice and batch")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, in place of seconds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    choices = [(f"without {name}", (name,)) for name in options.only or OPTIONAL]
    if not options.only:
        choices = [(SAME if options.measure == "speed" else "all on", ()), ("all off", OPTIONAL), *choices]
    head = {
        "shape": options.shape,
        "dtype": options.dtype,
        "scheme": options.scheme,
        "layers": NUM_LAYERS,
        "environment": environment(),
    }
    head["clock"] = "CPU time of one thread" if options.cpu_time else "seconds"
    result = {**head, "date": datetime.date.today().isoformat(), options.measure: []}
    if options.out is not None and options.out.exists():
        result = json.loads(options.out.read_text())
        done = {row["passes"] for row in result[options.measure]}
        choices = [choice for choice in choices if choice[0] not in done]
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if options.measure == "counts":
            rows = counts(options.shape, options.dtype, choices, place)
        else:
            config = cut(options.shape, options.dtype, NUM_LAYERS)
            rows = speeds(config, options.scheme, choices, options.seconds, place, is_cpu_time=options.cpu_time)
        for row in rows:
            print(options.shape, options.dtype, *(f"{key} {value}" for key, value in row.items()), flush=True)
            result[options.measure].append(row)
            if options.out is not None:
                options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

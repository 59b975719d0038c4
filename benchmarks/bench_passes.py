"""What each optional pass saves: steps and launches a layer, and time, with the whole pipeline, without it, and without
each pass alone.

    python benchmarks/bench_passes.py counts llama-3.2-1b bfloat16
    python benchmarks/bench_passes.py speed llama-3.2-1b bfloat16 --out speed.json

The published shape is cut to 4 layers, its weights are random. Steps of a layer: plan steps of 4 layers less those of
3. Launches of a layer: its compiled steps, and the ops that torch's profiler counts while the others run. Tokens/s are
those of the plan's steps (the median of each over the rounds, added up) in a batch of 8 decodes behind 128 tokens, and
of one prompt of 256 tokens; the whole pipeline is timed first, between and last, and each choice against their median.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import tempfile
from pathlib import Path

import torch

from tritium import models
from tritium.compiler import build
from tritium.engine.engine import Engine
from tritium.engine.environment import environment
from tritium.models.config import ModelConfig
from tritium.passes.pipeline import OPTIONAL
from tritium.runtime.step_times import StepTimer

NUM_LAYERS, NUM_DECODES, CONTEXT, PROMPT = 4, 8, 128, 256
REPEATS = 15


def cut(name: str, dtype: str, num_layers: int) -> ModelConfig:
    """The published shape with its first layers alone."""
    config = models.preset(name, dtype=dtype)
    scales = config.attention_scales and config.attention_scales[:num_layers]
    windows = config.windows[:num_layers]
    return dataclasses.replace(config, num_layers=num_layers, windows=windows, attention_scales=scales)


def engine_of(config: ModelConfig, disabled: tuple[str, ...], directory: Path) -> Engine:
    """Built without the passes `disabled`; weights are generated when it is run."""
    return build(config, output_dir=directory, weights="dummy", disabled_passes=disabled, max_model_len=2048)


def launches(engine: Engine) -> int:
    """Compiled steps, and the ops of torch that its profiler counts in one batch more."""
    counts = []
    for rounds in (1, 2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            StepTimer(engine).decode(1, CONTEXT, rounds)
        counts.append(sum(e.cpu_parent is None and e.name.startswith("aten::") for e in profile.events()))
    return sum(step.kernel.startswith("cpu.") for step in engine.plan.steps) + counts[1] - counts[0]


def speed(engine: Engine) -> dict[str, float]:
    """Tokens/s of decodes and of a prompt."""
    timer = StepTimer(engine)
    return {
        "decode": NUM_DECODES / sum(timer.decode(NUM_DECODES, CONTEXT, REPEATS)),
        "prefill": PROMPT / sum(timer.prefill(PROMPT, REPEATS)),
    }


def steps_of(name: str, dtype: str, disabled: tuple[str, ...], directory: Path) -> tuple[int, int]:
    """Steps and launches of one layer."""
    few, many = (
        engine_of(cut(name, dtype, num), disabled, directory / f"{num}") for num in (NUM_LAYERS - 1, NUM_LAYERS)
    )
    return len(many.plan.steps) - len(few.plan.steps), launches(many) - launches(few)


def main() -> None:
    """Print one line for each choice of passes, and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measure", choices=("counts", "speed"))
    parser.add_argument("shape", choices=models.PRESETS)
    parser.add_argument("dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    choices = [("all on", ()), ("all off", OPTIONAL), *((f"without {name}", (name,)) for name in OPTIONAL)]
    if options.measure == "speed":
        middle = len(choices) // 2
        choices = [*choices[:middle], choices[0], *choices[middle:], choices[0]]
    rows: list[dict[str, str | float]] = []
    for what, disabled in choices:
        with tempfile.TemporaryDirectory() as directory:
            if options.measure == "counts":
                steps, calls = steps_of(options.shape, options.dtype, disabled, Path(directory))
                rows.append({"passes": what, "steps": steps, "launches": calls})
            else:
                engine = engine_of(cut(options.shape, options.dtype, NUM_LAYERS), disabled, Path(directory) / "engine")
                rows.append({"passes": what, **{key: round(value, 2) for key, value in speed(engine).items()}})
        print(options.shape, options.dtype, *(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    for key in ("decode", "prefill") if options.measure == "speed" else ():
        whole = statistics.median(float(row[key]) for row in rows if row["passes"] == "all on")
        for row in rows:
            row[f"{key}_of_whole"] = round(float(row[key]) / whole, 3)
    if options.out is not None:
        head = {"shape": options.shape, "dtype": options.dtype, "layers": NUM_LAYERS, "environment": environment()}
        result = {**head, "date": datetime.date.today().isoformat(), options.measure: rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

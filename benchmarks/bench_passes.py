"""What each optional pass saves: steps a layer, with the whole pipeline, without it, and without each pass alone.

    python benchmarks/bench_passes.py

Counts plan steps (each is one kernel launch) of two published shapes cut to 4 layers; no weight is made. Steps of one
layer are the difference between 4 layers and 3.
"""

import dataclasses

import torch

from tritium import models
from tritium.compiler import compile_module
from tritium.config import BuildConfig
from tritium.passes.pipeline import OPTIONAL

SHAPES = ("llama-3.2-1b", "gpt-j-6b")


def steps(name: str, num_layers: int, dtype: str, disabled: tuple[str, ...]) -> int:
    """Steps of the plan for the shape cut to `num_layers`."""
    config = models.preset(name, dtype=dtype)
    config = dataclasses.replace(
        config,
        num_layers=num_layers,
        windows=config.windows[:num_layers],
        attention_scales=config.attention_scales and config.attention_scales[:num_layers],
    )
    module = models.create(config)
    return len(compile_module(module, BuildConfig(disabled_passes=disabled)).plan.steps)


def main() -> None:
    """Print one line a shape, dtype and choice of passes."""
    torch.set_num_threads(1)
    for name in SHAPES:
        for dtype in ("bfloat16", "float32"):
            for what, disabled in (("all on", ()), ("all off", OPTIONAL), *((f"no {p}", (p,)) for p in OPTIONAL)):
                layer = steps(name, 4, dtype, disabled) - steps(name, 3, dtype, disabled)
                print(f"{name:14} {dtype:9} {what:28} {layer} steps a layer")


if __name__ == "__main__":
    main()

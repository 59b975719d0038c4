"""Refit: other weights for an engine that is built. The compiler is not needed: the engine keeps its recipes.

The new weights are checked completely before anything is written, then streamed into a new directory beside the engine,
one recipe at a time; one exchange of the two directories puts it in place. Until then the old engine is whole.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from tritium.engine import recipe_file
from tritium.engine.manifest import FileRecord, Manifest
from tritium.engine.plan import Plan
from tritium.engine.serialise import WEIGHTS_NAME, replace_weights
from tritium.errors import ConfigError, EngineError
from tritium.weights.bind import bind
from tritium.weights.checkpoint_files import open_checkpoint
from tritium.weights.fit import check_fit
from tritium.weights.hub import model_directory
from tritium.weights.recipe_source import RecipeSource
from tritium.weights.recipes import Recipe
from tritium.weights.source import DictSource, TensorSpec, WeightSource, dtype_name

Progress = Callable[[int, int], None]


def open_source(source: Any) -> tuple[WeightSource, str]:
    """The tensors that `source` names, and a name for people: a state dict, a checkpoint directory or a hub id."""
    if isinstance(source, Mapping):
        return DictSource(source), "a state dict"
    if isinstance(source, (str, Path)):
        return open_checkpoint(model_directory(source)), str(source)
    raise ConfigError(
        f"new weights must be a state dict, a checkpoint directory or a hub id, not {type(source).__name__}: "
        f"{str(source)[:80]}"
    )


def new_weights(directory: Path, manifest: Manifest, plan: Plan, source: WeightSource) -> RecipeSource:
    """The engine's weights made of `source`, checked completely; each is computed when it is asked for.

    Raises `CheckpointError` that names every tensor which is missing, left over, or of another shape or dtype.
    """
    recipes, kept = _checked(directory, manifest, plan, source)
    return RecipeSource({name: recipes[name] for name in recipe_file.weight_specs(plan)}, source, kept)


def refit_directory(
    directory: Path,
    manifest: Manifest,
    plan: Plan,
    source: Any,
    progress: Progress | None = None,
    *,
    generation: int | None = None,
) -> None:
    """Replace the weights of the engine at `directory`; see `Engine.refit`. generation: None is its next one."""
    start = time.perf_counter()
    tensors, label = open_source(source)
    recipes, kept = _checked(directory, manifest, plan, tensors)
    specs = recipe_file.weight_specs(plan)
    specs |= {name: TensorSpec(dtype_name(x.dtype), tuple(x.shape)) for name, x in kept.items() if name not in specs}

    def write(path: Path) -> FileRecord:
        def report(name: str, done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)

        return FileRecord(*bind(recipes, specs, tensors, path, constants=kept, progress=report))

    changed = msgspec.structs.replace(
        manifest,
        dummy_seed=None,
        weights_generation=manifest.weights_generation + 1 if generation is None else generation,
        weights_source=label,
    )
    replace_weights(
        directory,
        lambda: msgspec.structs.replace(changed, timings=manifest.timings | {"refit": _seconds_since(start)}),
        write,
    )


def _checked(
    directory: Path, manifest: Manifest, plan: Plan, source: WeightSource
) -> tuple[dict[str, Recipe], dict[str, torch.Tensor]]:
    """The engine's recipes and constants, when `source` has what they ask for and nothing else."""
    if manifest.calibration == "numbers":
        raise EngineError(
            f"{directory}: its weights are the numbers that GPTQ made of the old ones, and new weights cannot be put "
            "through them: make another engine with `tritium quantize`"
        )
    recipes = recipe_file.read_recipes(directory)
    kept = recipe_file.constants(recipes, _weights_path(directory, manifest))
    check_fit(recipes, recipe_file.weight_specs(plan), source, kept, ignored=manifest.ignored_tensors)
    return recipes, kept


def _weights_path(directory: Path, manifest: Manifest) -> Path | None:
    return directory / WEIGHTS_NAME if WEIGHTS_NAME in manifest.files else None


def _seconds_since(start: float) -> float:
    return round(time.perf_counter() - start, 3)

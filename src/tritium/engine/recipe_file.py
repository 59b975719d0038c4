"""`recipes.json`: how each weight of an engine comes from a checkpoint's tensors, read without the compiler."""

from pathlib import Path

import msgspec
import torch

from tritium.engine.plan import Extent, Plan
from tritium.errors import CheckpointError, EngineError
from tritium.weights.recipe_json import from_json
from tritium.weights.recipes import Constant, Recipe
from tritium.weights.safetensors import SafetensorsSource
from tritium.weights.source import TensorSpec

RECIPES_NAME = "recipes.json"


def weight_specs(plan: Plan) -> dict[str, TensorSpec]:
    """Every weight a plan reads: dtype and sizes."""
    return {
        value.name: TensorSpec(value.dtype, tuple(Extent.parse(dim).constant for dim in value.shape))
        for value in plan.values
        if value.kind == "weight"
    }


def read_recipes(directory: Path) -> dict[str, Recipe]:
    """The recipes by weight name. `EngineError` when the file is missing or holds anything else."""
    path = directory / RECIPES_NAME
    try:
        data = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise EngineError(f"{path} is missing: this engine cannot be refit; build it again") from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} is damaged ({error}): build the engine again") from None
    if not isinstance(data, dict):
        raise EngineError(f"{path} is damaged (a {type(data).__name__}, not an object): build the engine again")
    try:
        return {name: from_json(tree) for name, tree in data.items()}
    except EngineError as error:
        raise EngineError(f"{path}: {error}") from None


def constants(recipes: dict[str, Recipe], weights_path: Path | None) -> dict[str, torch.Tensor]:
    """The model's own tensors, which the engine keeps in its weights file under their names."""
    names = [name for name, recipe in recipes.items() if recipe == Constant(name)]
    if not names:
        return {}
    if weights_path is None:
        raise EngineError(f"the engine has no weights file, which should hold {names[0]!r}: build the engine again")
    try:
        source = SafetensorsSource(weights_path)
        return {name: source.get(name) for name in names}
    except CheckpointError as error:
        raise EngineError(f"{error}; or build the engine again") from error

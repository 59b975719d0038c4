"""Whether two ranks' engines are parts of one model: every manifest says how it was built, the weights are in parts."""

import hashlib

import torch

from tritium.engine.engine import Engine
from tritium.engine.recipe_file import read_recipes
from tritium.weights.recipes import Cast, Checkpoint, Recipe
from tritium.weights.safetensors import SafetensorsSource


def describe_model(engine: Engine) -> str:
    """How it was built, for people; equal for ranks of one model."""
    manifest = engine.manifest
    made = f"made of seed {manifest.dummy_seed}" if manifest.dummy_seed is not None else "of a checkpoint"
    return (
        f"{manifest.model.get('architecture', '')} in {manifest.dtype}, scheme {manifest.scheme}, "
        f"{manifest.invariance}, weights {made}, generation {manifest.weights_generation}"
    )


def whole_weights(engine: Engine) -> dict[str, str]:
    """A hash, by name, of each weight of one dimension that this rank has whole: norms, as a rule. Two models that have
    these alike are not told apart."""
    if engine.weights_path is None:
        return {}
    recipes, source = read_recipes(engine.path), SafetensorsSource(engine.weights_path)
    names = [name for name in recipes.keys() & source.names if _is_whole(recipes[name])]
    return {name: _hash(source.get(name)) for name in names if len(source.spec(name).shape) == 1}


def difference(own: dict[str, str], other: dict[str, str]) -> str | None:
    """The name of a weight that both have and that differs."""
    return next((name for name in sorted(own.keys() & other.keys()) if own[name] != other[name]), None)


def _is_whole(recipe: Recipe) -> bool:
    """A tensor of the checkpoint as it is: no slice."""
    return isinstance(recipe.of if isinstance(recipe, Cast) else recipe, Checkpoint)


def _hash(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

"""Whether two ranks' engines are parts of one model: its shape is in every rank's plan, its weights are not."""

import hashlib

import torch

from tritium.engine.engine import Engine
from tritium.engine.recipe_file import read_recipes
from tritium.weights.recipes import Cast, Checkpoint, Constant, Recipe
from tritium.weights.safetensors import SafetensorsSource


def describe_model(engine: Engine) -> str:
    """For people, and equal for ranks of one model: what was built how, and a hash of what all ranks have whole: norms,
    biases of sums, frequencies. Two models with the same of these are not told apart."""
    manifest = engine.manifest
    digest = hashlib.sha256(f"{manifest.dummy_seed} {manifest.vocab_size}".encode())
    if engine.weights_path is not None:
        recipes, source = read_recipes(engine.path), SafetensorsSource(engine.weights_path)
        for name in sorted(recipes.keys() & source.names):
            if _is_whole(recipes[name]) and len(source.spec(name).shape) == 1:
                digest.update(name.encode() + source.get(name).view(torch.uint8).numpy().tobytes())
    return (
        f"{manifest.model.get('architecture', '')} in {manifest.dtype}, scheme {manifest.scheme}, "
        f"{manifest.invariance}, weights {digest.hexdigest()[:16]} of generation {manifest.weights_generation}"
    )


def _is_whole(recipe: Recipe) -> bool:
    """No slice of anything."""
    return isinstance(recipe.of if isinstance(recipe, Cast) else recipe, (Checkpoint, Constant))

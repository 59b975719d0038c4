"""The recipes of an engine's weights: what passes have made of the module's tensors, over the checkpoint's."""

from collections.abc import Mapping

from torch import Tensor

from tritium.engine.manifest import CalibrationKind
from tritium.errors import EngineError
from tritium.passes.quantize import IMPORTANCE, INPUT_SCALE, NUMBERS
from tritium.passes.smooth import SMOOTHING
from tritium.quant.schemes import WeightFormat
from tritium.weights.fit import checkpoint_leaves
from tritium.weights.recipes import Checkpoint, Constant, Recipe, Zeros, leaves, map_checkpoint, stored_format
from tritium.weights.source import TensorSpec, WeightSource, dtype_name


def engine_recipes(
    specs: Mapping[str, TensorSpec],
    known: Mapping[str, Recipe],
    made: Mapping[str, Recipe],
    constants: Mapping[str, Tensor],
) -> tuple[dict[str, Recipe], dict[str, TensorSpec]]:
    """The recipe and spec of each weight, and of constants that are only parts of some: a refit needs them.

    known: by the module's names. made: by passes, over the module's tensors. Raises `EngineError` for a weight that is
    neither.
    """

    def recipe(name: str) -> Recipe:
        if name in known:
            return known[name]
        if (tree := made.get(name)) is not None and tree != Constant(name):
            return map_checkpoint(tree, lambda leaf: recipe(leaf.name))
        if name in constants:
            return Constant(name)
        raise EngineError(f"weight {name!r} of the plan is neither a parameter nor a buffer of the model")

    trees, all_specs = {name: recipe(name) for name in specs}, dict(specs)
    inner = [leaf for tree in trees.values() if _follows_checkpoint(tree) for leaf in leaves(tree)]
    for leaf in dict.fromkeys(inner):
        if isinstance(leaf, Constant) and leaf.name not in trees:
            tensor = constants[leaf.name]
            trees[leaf.name] = leaf
            all_specs[leaf.name] = TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape))
    return trees, all_specs


def kept_recipes(trees: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The trees as an engine keeps them: what no checkpoint tensor is part of, which a refit leaves, is a constant."""
    return {name: tree if _follows_checkpoint(tree) else Constant(name) for name, tree in trees.items()}


def calibration_kind(trees: Mapping[str, Recipe]) -> CalibrationKind | None:
    """What of a calibration is in an engine: vectors that new weights can be put through, or the weights' numbers."""
    names = [leaf.name for tree in trees.values() for leaf in leaves(tree) if isinstance(leaf, Constant)]
    if any(name.endswith(NUMBERS) for name in names):
        return "numbers"
    return "vectors" if any(name.endswith((SMOOTHING, IMPORTANCE, INPUT_SCALE)) for name in names) else None


def _follows_checkpoint(tree: Recipe) -> bool:
    return isinstance(tree, Zeros) or any(isinstance(leaf, Checkpoint) for leaf in leaves(tree))


def unread_tensors(trees: Mapping[str, Recipe], source: WeightSource | None) -> tuple[str, ...]:
    """The tensors of the checkpoint that no weight is made of."""
    read = checkpoint_leaves(trees.values())
    return tuple(name for name in (source.names if source is not None else ()) if name not in read)


def stored_formats(known: Mapping[str, Recipe], source: WeightSource | None) -> dict[str, WeightFormat]:
    """The module's tensors that the checkpoint keeps quantised, in a form that kernels can take as it is."""
    if source is None:
        return {}
    found = ((name, stored_format(tree, source)) for name, tree in known.items())
    return {name: kept for name, kept in found if kept is not None}

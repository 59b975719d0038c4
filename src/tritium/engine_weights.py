"""The recipes of an engine's weights: what passes have made of the module's tensors, over the checkpoint's."""

from collections.abc import Mapping

from torch import Tensor

from tritium.errors import EngineError
from tritium.quant.schemes import WeightFormat
from tritium.weights.fit import checkpoint_leaves
from tritium.weights.recipes import Constant, Recipe, leaves, map_checkpoint, stored_format
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
    for leaf in dict.fromkeys(leaf for tree in trees.values() for leaf in leaves(tree)):
        if isinstance(leaf, Constant) and leaf.name not in trees:
            tensor = constants[leaf.name]
            trees[leaf.name] = leaf
            all_specs[leaf.name] = TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape))
    return trees, all_specs


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

"""Engine weights computed from a checkpoint's tensors when they are asked for, not read from an engine's file."""

from collections.abc import Collection, Mapping

from torch import Tensor

from tritium.weights.recipes import Checkpoint, Recipe, evaluate, infer, leaves
from tritium.weights.source import TensorSpec, WeightSource


class RecipeSource:
    """A `WeightSource` of recipes' results, by the weights' names. Each `get` evaluates; nothing is kept.

    A result never shares memory with the source: whoever owns a state dict may go on writing to it.
    """

    def __init__(self, recipes: Mapping[str, Recipe], source: WeightSource, constants: Mapping[str, Tensor]) -> None:
        self._recipes, self._source, self._constants = recipes, source, constants

    @property
    def names(self) -> Collection[str]:
        return self._recipes.keys()

    def where(self, name: str) -> str:
        first = next((leaf.name for leaf in leaves(self._recipes[name]) if isinstance(leaf, Checkpoint)), name)
        return self._source.where(first)

    def spec(self, name: str) -> TensorSpec:
        return infer(self._recipes[name], self._source, self._constants)

    def get(self, name: str) -> Tensor:
        made = evaluate(self._recipes[name], self._source, self._constants)
        given = [self._given(leaf.name, isinstance(leaf, Checkpoint)) for leaf in leaves(self._recipes[name])]
        is_shared = any(made.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in given)
        return made.clone() if is_shared else made

    def _given(self, name: str, is_checkpoint: bool) -> Tensor:
        return self._source.get(name) if is_checkpoint else self._constants[name]

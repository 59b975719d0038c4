"""Where a weight is when the checkpoint does not keep it as a tensor of its own, in our layout."""

from dataclasses import dataclass
from typing import Protocol

from tritium.models.config import ModelConfig
from tritium.weights.recipes import Checkpoint, Recipe, Slice, Transpose


class Place(Protocol):
    """path: the checkpoint's name, `*` for a layer's number, without `.weight` or `.bias`."""

    @property
    def path(self) -> str: ...

    def recipe(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> Recipe:
        """Our weight of this shape, from the checkpoint's tensor `name`."""
        ...


@dataclass(frozen=True)
class Conv1D:
    """A linear that the checkpoint keeps as [in, out], perhaps as part `part` of `parts` side by side along out."""

    path: str
    part: int = 0
    parts: int = 1

    def recipe(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> Recipe:
        """From a weight [in, parts · out] or a bias [parts · out]."""
        out, dim = shape[0], len(shape) - 1
        recipe: Recipe = Checkpoint(name, (*shape[1:], out * self.parts))
        if self.parts > 1:
            recipe = Slice(recipe, dim, self.part * out, (self.part + 1) * out)
        return Transpose(recipe) if dim else recipe

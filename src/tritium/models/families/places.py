"""Where a weight is when the checkpoint does not keep it as a tensor of its own, in our layout."""

from dataclasses import dataclass
from typing import Literal, Protocol

from tritium.models.config import ModelConfig
from tritium.weights.recipes import Checkpoint, Concat, Recipe, Reshape, Slice, Transpose


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


@dataclass(frozen=True)
class StackedRows:
    """Some rows of a linear that the checkpoint keeps as [q; k; v] or as [gate; up] (Phi-3)."""

    path: str
    part: Literal["q", "k", "v", "gate", "up"]

    def recipe(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> Recipe:
        """From a weight [rows of all parts, in] or a bias [rows of all parts]."""
        q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        before = {"q": 0, "k": q, "v": q + kv, "gate": 0, "up": config.intermediate_size}[self.part]
        total = q + 2 * kv if self.part in ("q", "k", "v") else 2 * config.intermediate_size
        return Slice(Checkpoint(name, (total, *shape[1:])), 0, before, before + shape[0])


@dataclass(frozen=True)
class GroupedRows:
    """The rows of q, k or v in a linear that keeps, for each kv head, its query heads, then its k and its v.

    With as many kv heads as query heads that is [q0 k0 v0 q1 k1 v1 ...] (GPT-NeoX, BLOOM); with one kv head
    [q; k; v] (Falcon 7B); Falcon 40B lies between.
    """

    path: str
    part: Literal["q", "k", "v"]

    def recipe(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> Recipe:
        """From a weight [(N + 2 K) · H, in] or a bias [(N + 2 K) · H]."""
        groups, size = config.num_kv_heads, config.head_size
        members = config.num_heads // groups
        whole = Checkpoint(name, (groups * (members + 2) * size, *shape[1:]))
        first, end = {"q": (0, members), "k": (members, members + 1), "v": (members + 1, members + 2)}[self.part]
        return Reshape(Slice(Reshape(whole, (groups, members + 2, size, *shape[1:])), 1, first, end), shape)


@dataclass(frozen=True)
class RowsFrom:
    """A table without its first `start` rows, which nothing reads (OPT's positions)."""

    path: str
    start: int

    def recipe(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> Recipe:
        """From a table of `start` rows more."""
        end = self.start + shape[0]
        return Slice(Checkpoint(name, (end, *shape[1:])), 0, self.start, end)


@dataclass(frozen=True)
class Heads:
    """A weight with a row for each head, which the checkpoint keeps head by head (StableLM's norms of q and k)."""

    path: str

    def recipe(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> Recipe:
        """[heads, H] from `path`.0.weight, `path`.1.weight, ..."""
        stem, _, leaf = name.rpartition(".")
        rows = (Checkpoint(f"{stem}.{head}.{leaf}", shape[1:]) for head in range(shape[0]))
        return Concat(tuple(Reshape(row, (1, *shape[1:])) for row in rows), 0)


@dataclass(frozen=True)
class Experts:
    """A weight of all experts, which the checkpoint keeps expert by expert, each as `parts` one below the other."""

    path: str
    parts: tuple[str, ...]

    def recipe(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> Recipe:
        """[experts, out, in] from `name`.0.`part`.weight, ...; the parts of an expert are as long as each other."""
        num_experts, rows, columns = shape
        size = (rows // len(self.parts), columns)
        each = (tuple(Checkpoint(f"{name}.{e}.{p}.weight", size) for p in self.parts) for e in range(num_experts))
        stacked = (parts[0] if len(parts) == 1 else Concat(parts, 0) for parts in each)
        return Concat(tuple(Reshape(expert, (1, rows, columns)) for expert in stacked), 0)

"""Whether a source of tensors can take the place of the one an engine was built from. Reads headers, not weights."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from tritium.errors import CheckpointError, EngineError
from tritium.weights.recipes import Checkpoint, Recipe, describe, infer, leaves
from tritium.weights.source import TensorSpec, WeightSource

SHOWN = 8  # problems listed in a message


def check_fit(
    recipes: Mapping[str, Recipe],
    specs: Mapping[str, TensorSpec],
    source: WeightSource,
    constants: Mapping[str, Tensor],
    *,
    ignored: Collection[str] = (),
) -> None:
    """Raise `CheckpointError` that names every tensor of `source` that is missing, left over or does not fit.

    ignored: names that the first build left unread, too. A left-over tensor that equals one that is read (a head tied
    to the embedding, which a state dict has under both names) is no problem; only to see that are tensors read.
    """
    wanted = checkpoint_leaves(recipes[name] for name in specs)
    problems = [f"{name!r} is missing" for name in wanted if name not in source.names]
    problems += [text for leaf in wanted.values() if leaf.name in source.names for text in _refusal(leaf, source)]
    extra = [name for name in source.names if name not in wanted and name not in ignored]
    problems += [f"{name!r} is read by no weight" for name in extra if not _is_duplicate(name, wanted, source)]
    if not problems:
        problems = [text for name, spec in specs.items() for text in _mismatch(name, recipes, spec, source, constants)]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{source.where(next(iter(wanted), ''))} does not fit this engine: {'; '.join(problems[:SHOWN])}{more}. "
            "Nothing was changed. Give tensors with the names and shapes of the model it was built from, or build anew"
        )


def checkpoint_leaves(recipes: Iterable[Recipe]) -> dict[str, Checkpoint]:
    """The checkpoint tensors that recipes read, by name."""
    return {leaf.name: leaf for recipe in recipes for leaf in leaves(recipe) if isinstance(leaf, Checkpoint)}


def _refusal(leaf: Checkpoint, source: WeightSource) -> list[str]:
    spec = source.spec(leaf.name)
    if leaf.shape is not None and spec.shape != leaf.shape:
        return [f"{leaf.name!r} is {list(spec.shape)}, expected {list(leaf.shape)}"]
    try:
        infer(leaf, source)
    except CheckpointError:
        return [f"{leaf.name!r} has dtype {spec.dtype}, which no weight is made of"]
    return []


def _mismatch(
    name: str,
    recipes: Mapping[str, Recipe],
    spec: TensorSpec,
    source: WeightSource,
    constants: Mapping[str, Tensor],
) -> list[str]:
    """What a whole recipe gives; leaves that say no shape are found out here."""
    try:
        found = infer(recipes[name], source, constants)
    except (CheckpointError, EngineError) as error:
        return [str(error)]
    if found == spec:
        return []
    shapes = f"{found.dtype} {list(found.shape)}, expected {spec.dtype} {list(spec.shape)}"
    return [f"weight {name!r} = {describe(recipes[name])} would be {shapes}"]


def _is_duplicate(name: str, wanted: Collection[str], source: WeightSource) -> bool:
    spec = source.spec(name)
    same = (other for other in wanted if other in source.names and source.spec(other) == spec)
    return any(torch.equal(source.get(name), source.get(other)) for other in same)

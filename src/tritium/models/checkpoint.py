"""From a module to its weight recipes, and what a checkpoint must have for it."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tritium.errors import CheckpointError, ConfigError
from tritium.models.config import ModelConfig
from tritium.models.decoder import Decoder
from tritium.models.encoder import Encoder
from tritium.models.encoder_config import EncoderConfig
from tritium.models.families import Family, family_named
from tritium.models.families.bert import EncoderFamily, encoder_named, encoder_names
from tritium.models.families.places import Place
from tritium.weights.recipes import Cast, Checkpoint, Constant, Recipe, infer, leaves, map_checkpoint
from tritium.weights.source import WeightSource, dtype_name

Naming = Mapping[str, str | Recipe]  # our name -> the checkpoint's name, or a recipe
SHOWN = 8  # names listed in a message


def constants(module: nn.Module) -> dict[str, Tensor]:
    """The module's buffers that hold real numbers (rotary frequencies, ...): what its `Constant` recipes stand for."""
    return {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if not buffer.is_meta}


def weight_recipes(
    module: nn.Module,
    config: ModelConfig | EncoderConfig | None = None,
    *,
    source: WeightSource | None = None,
    mapping: Naming | None = None,
) -> dict[str, Recipe]:
    """How each parameter and buffer of `module` is computed, by its name in the module; tied ones under each name.

    The first that applies: `mapping`, the module's own `checkpoint_names` (a class attribute of the same form), the
    family's naming (built-in decoders and their subclasses), and else a parameter is the checkpoint's tensor of the
    same name. A mapping goes from our name to the checkpoint's or to a recipe; `*` stands for a layer's number, and
    `.weight` / `.bias` may be left out on both sides. Buffers with real numbers are constants.

    With `source`, everything is checked against it, without reading weights (but to compare a tied head): raises
    `CheckpointError` when tensors are missing, unexpected, of another shape, or contradict `tie_word_embeddings`.
    A key of `mapping` that names no parameter is a `ConfigError`.
    """
    config = config or getattr(module, "config", None)
    family, names = _naming(module, config)
    spell = _spelling(family, source)
    recipes: dict[str, Recipe] = {}
    mapping = {**getattr(module, "checkpoint_names", {}), **(mapping or {})}
    _check_mapping(mapping, module)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        shape = tuple(parameter.shape)
        found = _look_up(name, mapping, shape, config) or _look_up(name, names, shape, config)
        recipe = map_checkpoint(found or Checkpoint(name, shape), spell)
        recipes[name] = Cast(recipe, dtype_name(parameter.dtype))
    kept = constants(module)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        recipes[name] = (
            Constant(name) if name in kept else Cast(Checkpoint(name, tuple(buffer.shape)), dtype_name(buffer.dtype))
        )
    if source is not None:
        _check_tensors(recipes, source)
        if family is not None:
            _check_leftovers(recipes, source, family, config)
    return recipes


def _naming(module: nn.Module, config: Any) -> tuple[Family | EncoderFamily | None, Mapping[str, str | Place]]:
    """The row that names a built-in model's tensors, and its names."""
    if isinstance(module, Encoder) and isinstance(config, EncoderConfig):
        encoder = encoder_named(config)
        return encoder, encoder_names(encoder, config) if encoder else {}
    family = family_named(config) if isinstance(module, Decoder) and isinstance(config, ModelConfig) else None
    return family, family.names if family else {}


def _look_up(name: str, names: Mapping[str, Any], shape: tuple[int, ...], config: Any) -> Recipe | None:
    """The recipe that a naming gives for a parameter, by its full name or without `.weight` / `.bias`."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    for key, suffix in _keys(name):
        target = names.get(key)
        if isinstance(target, str):
            return Checkpoint(_fill(target, numbers) + suffix, shape)
        if target is not None and not isinstance(target, Recipe):
            return target.recipe(_fill(target.path, numbers) + suffix, shape, config)
        if target is not None:
            return target
    return None


def _keys(name: str) -> Iterator[tuple[str, str]]:
    """The keys a naming may have for a parameter, the most specific first, and what is then appended to its target."""
    path, _, leaf = name.rpartition(".")
    for key, suffix in ((name, ""), (path, f".{leaf}")):
        yield key, suffix
        yield ".".join("*" if part.isdigit() else part for part in key.split(".")), suffix


def _check_mapping(mapping: Naming, module: nn.Module) -> None:
    known = {key for name, _ in module.named_parameters(remove_duplicate=False) for key, _ in _keys(name)}
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"mapping: {key!r} is no parameter of {type(module).__name__}{hint}")


def _fill(target: str, numbers: list[str]) -> str:
    for number in numbers:
        target = target.replace("*", number, 1)
    return target


def _spelling(family: Family | EncoderFamily | None, source: WeightSource | None) -> Callable[[Checkpoint], Checkpoint]:
    """Gives a leaf the name that this checkpoint has for it, where publications of the family differ."""
    starts = family.respelled if family and source else ()
    others = {here: there for here, there in starts if source and not any(n.startswith(here) for n in source.names)}

    def spell(leaf: Checkpoint) -> Checkpoint:
        for here, there in others.items():
            if leaf.name.startswith(here):
                return Checkpoint(there + leaf.name.removeprefix(here), leaf.shape)
        return leaf

    return spell


def _check_tensors(recipes: Mapping[str, Recipe], source: WeightSource) -> None:
    """Every leaf is there, with its shape and a floating-point dtype."""
    wanted = {leaf.name: leaf for recipe in recipes.values() for leaf in leaves(recipe) if isinstance(leaf, Checkpoint)}
    missing = [name for name in wanted if name not in source.names]
    if missing:
        if missing == ["lm_head.weight"]:
            raise CheckpointError(
                f"{source.where('lm_head.weight')}: tensor 'lm_head.weight' is missing, and config.json says "
                "tie_word_embeddings is false; if the model ties its head to its embedding, set it to true"
            )
        raise CheckpointError(
            f"{source.where(missing[0])}: {len(missing)} of {len(wanted)} tensors are missing: {_some(missing)}; "
            f"it has {_some(list(source.names))}: config.json and the weights do not belong together, or the download "
            "is incomplete"
        )
    for leaf in wanted.values():
        infer(leaf, source)


def _check_leftovers(
    recipes: Mapping[str, Recipe], source: WeightSource, family: Family | EncoderFamily, config: Any
) -> None:
    """No tensor is left unread, but known buffers and a tied head that equals the embedding."""
    used = {leaf.name for recipe in recipes.values() for leaf in leaves(recipe)}
    left = [name for name in source.names if name not in used]
    if isinstance(config, ModelConfig) and config.tie_word_embeddings and "lm_head.weight" in left:
        embedding = next(leaf.name for leaf in leaves(recipes["embed_tokens.weight"]))
        head, tied = source.spec("lm_head.weight"), source.spec(embedding)
        if head != tied or not torch.equal(source.get("lm_head.weight"), source.get(embedding)):
            raise CheckpointError(
                f"{source.where('lm_head.weight')}: config.json says tie_word_embeddings is true, but 'lm_head.weight' "
                f"differs from {embedding!r}; set tie_word_embeddings to false to use the file's head"
            )
        left.remove("lm_head.weight")
    unexpected = [name for name in left if not any(re.fullmatch(pattern, name) for pattern in family.ignored)]
    if unexpected:
        raise CheckpointError(
            f"{source.where(unexpected[0])}: {len(unexpected)} of {len(source.names)} tensors have no place in a "
            f"{family.architecture} with this config.json: {_some(unexpected)}; it leaves something out (a bias, "
            "layers), or they must be removed"
        )


def _some(names: list[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more

"""What `build` was given, made explicit: the module, where its weights come from, and what its files say of tokens."""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tritium import models
from tritium.config import BuildConfig
from tritium.engine.manifest import EncoderInfo
from tritium.errors import ConfigError
from tritium.models.config import ModelConfig
from tritium.models.encoder_config import EncoderConfig
from tritium.models.sentence_transformers import SentenceConfig, read_sentence_config
from tritium.text.tokenizer import Tokenizer
from tritium.text.tokenizer_files import read_eos_token_ids
from tritium.weights.checkpoint_files import open_checkpoint
from tritium.weights.gguf_source import GgufSource
from tritium.weights.hub import model_directory
from tritium.weights.recipes import Cast, Checkpoint, Recipe
from tritium.weights.source import DictSource, ModuleSource, WeightSource, dtype_name

Model = str | Path | nn.Module | ModelConfig | EncoderConfig
Weights = Mapping[str, torch.Tensor] | Literal["dummy"] | None
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model ready to compile.

    name, architecture, origin: for people. model_dir: the checkpoint's directory, or None. dtype: of the parameters,
    when they are to be cast. recipes: by parameter and buffer name. source: None for dummy weights.
    encoder: what an encoder's outputs mean; None for any other model.
    """

    module: nn.Module
    name: str
    architecture: str
    origin: str
    max_model_len: int
    recipes: dict[str, Recipe]
    source: WeightSource | None
    dtype: torch.dtype | None = None
    model_dir: Path | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    encoder: EncoderInfo | None = None


def resolve_model(model: Model, config: BuildConfig, weights: Weights) -> ResolvedModel:
    """Read what describes the model; no weight is read. Raises `ConfigError`, `CheckpointError`, `UnsupportedModel`."""
    if weights is not None and weights != "dummy" and not isinstance(weights, Mapping):
        raise ConfigError(f'weights must be None, "dummy" or a state dict, not {type(weights).__name__}')
    if isinstance(model, EncoderConfig):
        if weights is None:
            raise ConfigError('an EncoderConfig has no weights: pass weights="dummy" or weights=<state dict>')
        described = model if config.dtype == "auto" else replace(model, dtype=config.dtype)
        return _encoder(described, config, _source(weights), None, "EncoderConfig")
    if isinstance(model, ModelConfig):
        return _from_config(model, config, weights)
    if isinstance(model, nn.Module) and _is_of_transformers(model):
        return _from_transformers(model, config, weights)
    if isinstance(model, nn.Module):
        return _from_module(model, config, weights)
    if isinstance(model, (str, Path)):
        path = model_directory(model)
        return (_from_directory if path.is_dir() else _from_gguf)(path, str(model), config, weights)
    raise ConfigError(
        f"model must be a directory, a hub id, an nn.Module or a ModelConfig, not {type(model).__name__}: {model!r}"
    )


def _from_directory(model_dir: Path, origin: str, config: BuildConfig, weights: Weights) -> ResolvedModel:
    source = _source(weights, lambda: open_checkpoint(model_dir))
    encoder = models.read_encoder_config(model_dir, dtype=config.dtype, source=source)
    if encoder is not None:
        return _encoder(encoder, config, source, model_dir, origin)
    described = models.read_config(model_dir, dtype=config.dtype, max_model_len=config.max_model_len, source=source)
    bos, eos = _special_tokens(model_dir, described.vocab_size)
    return _decoder(
        described,
        source,
        name=model_dir.name,
        origin=origin,
        model_dir=model_dir,
        bos_token_id=bos,
        eos_token_ids=eos,
    )


def _from_gguf(path: Path, origin: str, config: BuildConfig, weights: Weights) -> ResolvedModel:
    """A .gguf file. Its tokenizer is the tokenizer.json beside it."""
    file = GgufSource(path)
    source = _source(weights, lambda: open_checkpoint(path))
    described = models.read_gguf_config(file, dtype=config.dtype, max_model_len=config.max_model_len)
    bos, eos = models.gguf_special_tokens(file)
    own_bos, own_eos = _special_tokens(path.parent, described.vocab_size)
    return _decoder(
        described,
        source,
        name=path.stem,
        origin=origin,
        model_dir=path.parent,
        bos_token_id=bos if own_bos is None else own_bos,
        eos_token_ids=own_eos or eos,
    )


def _decoder(described: ModelConfig, source: WeightSource | None, **about: Any) -> ResolvedModel:
    """A model of a family. about: what is known beside its configuration."""
    module = models.create(described)
    return ResolvedModel(
        module=module,
        architecture=described.family,
        max_model_len=described.max_model_len or described.default_model_len,
        recipes=models.weight_recipes(module, described, source=source),
        source=source,
        **about,
    )


def _encoder(
    described: EncoderConfig, config: BuildConfig, source: WeightSource | None, model_dir: Path | None, origin: str
) -> ResolvedModel:
    if config.tensor_parallel > 1:
        raise ConfigError(f"tensor_parallel={config.tensor_parallel} is for decoders: leave it out for an encoder")
    if config.scheme == "fp8" and described.dtype != "bfloat16":
        raise ConfigError(
            f"scheme='fp8' with dtype={described.dtype!r}: the results of fp8 linears are in bfloat16; give "
            "dtype='bfloat16' with it"
        )
    module = models.create_encoder(described)
    sentence = read_sentence_config(model_dir) if model_dir is not None else SentenceConfig()
    longest = described.num_positions
    wanted = config.max_model_len or min(sentence.max_len or longest, longest)
    if wanted > longest:
        raise ConfigError(f"max_model_len ({wanted}) must be at most {longest}: this model has no more positions")
    bos, eos = _special_tokens(model_dir, described.vocab_size) if model_dir is not None else (None, ())
    return ResolvedModel(
        module=module,
        name=model_dir.name if model_dir is not None else described.architecture,
        architecture=described.architecture,
        origin=origin,
        max_model_len=wanted,
        recipes=models.weight_recipes(module, described, source=source),
        source=source,
        model_dir=model_dir,
        bos_token_id=bos,
        eos_token_ids=eos,
        encoder=EncoderInfo(
            pooling=sentence.pooling,
            is_normalized=sentence.is_normalized,
            labels=described.labels,
            score_activation=described.score_activation,
            num_token_types=described.num_token_types,
        ),
    )


def _from_config(described: ModelConfig, config: BuildConfig, weights: Weights) -> ResolvedModel:
    if weights is None:
        raise ConfigError('a ModelConfig has no weights: pass weights="dummy" or weights=<state dict>')
    described = replace(
        described,
        dtype=described.dtype if config.dtype == "auto" else config.dtype,
        max_model_len=config.max_model_len or described.max_model_len,
    )
    return _decoder(described, _source(weights), name=described.family or "model", origin="ModelConfig")


def _from_module(module: nn.Module, config: BuildConfig, weights: Weights) -> ResolvedModel:
    described = getattr(module, "config", None)
    described = described if isinstance(described, ModelConfig) else None
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    source = _source(weights, lambda: ModuleSource(module))
    return ResolvedModel(
        module=module,
        name=type(module).__name__,
        architecture=described.family if described else type(module).__name__,
        origin=f"{type(module).__module__}.{type(module).__qualname__}",
        max_model_len=_module_len(module, described, config),
        recipes=_cast(_module_recipes(module, described, source), module, dtype),
        source=source,
        dtype=dtype,
    )


def _is_of_transformers(model: nn.Module) -> bool:
    """True for a model of transformers, which then is loaded already."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _from_transformers(model: nn.Module, config: BuildConfig, weights: Weights) -> ResolvedModel:
    """Any decoder of transformers, by its own code: no row of the model table is needed."""
    edge = importlib.import_module("tritium.models.transformers_model")
    module = edge.for_capture(model)
    known_len = edge.model_len(model)
    if config.max_model_len is None and known_len is None:
        raise ConfigError(f"max_model_len must be given: the configuration of {type(model).__name__} does not say it")
    if config.max_model_len is not None and known_len is not None and config.max_model_len > known_len:
        raise ConfigError(f"max_model_len is {config.max_model_len}; {type(model).__name__} is made for {known_len}")
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    own = {name: name for name, _ in module.named_parameters(remove_duplicate=False)}
    return ResolvedModel(
        module=module,
        name=type(model).__name__,
        architecture=type(model).__name__,
        origin=f"{type(model).__module__}.{type(model).__qualname__}",
        max_model_len=config.max_model_len or known_len,
        recipes=_cast(models.weight_recipes(module, mapping=own), module, dtype),
        source=_source(weights, lambda: ModuleSource(model)),
        dtype=dtype,
        eos_token_ids=edge.eos_token_ids(model),
    )


def resolve_stateless(module: nn.Module, config: BuildConfig, weights: Weights) -> ResolvedModel:
    """A stateless module with its own weights. Raises `ConfigError` for options that only a language model has."""
    if not isinstance(module, nn.Module):
        raise ConfigError(f"example_inputs are for an nn.Module, not {type(module).__name__}: {module!r:.100}")
    for name in (
        *("dtype", "scheme", "kv_dtype", "quantize_embedding", "unquantized", "max_model_len", "disabled_passes"),
        "tensor_parallel",
    ):
        if (value := getattr(config, name)) != getattr(BuildConfig(), name):
            hint = "; convert the module itself, by module.to(...)" if name == "dtype" else ""
            raise ConfigError(f"{name}={value!r} has no meaning for a stateless module{hint}")
    source = _source(weights, lambda: ModuleSource(module))
    own = {name: name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = dict(module.named_buffers(remove_duplicate=False))
    learned = {
        name: Cast(Checkpoint(name, tuple(buffers[name].shape)), dtype_name(buffers[name].dtype))
        for name in learned_buffers(module)
    }
    return ResolvedModel(
        module=module,
        name=type(module).__name__,
        architecture=type(module).__name__,
        origin=f"{type(module).__module__}.{type(module).__qualname__}",
        max_model_len=0,
        recipes=models.weight_recipes(module, mapping=own) | learned,
        source=source,
    )


def learned_buffers(module: nn.Module) -> list[str]:
    """Buffers that training has filled, as a batch norm's means: those of floating type that the state dict has."""
    kept = module.state_dict().keys()
    return [n for n, b in module.named_buffers(remove_duplicate=False) if n in kept and b.is_floating_point()]


def _module_recipes(module: nn.Module, described: ModelConfig | None, source: WeightSource | None) -> dict[str, Recipe]:
    """By the module's own names where the weights have them, else by its family's."""
    own = {name: name for name, _ in module.named_parameters(remove_duplicate=False)}
    if source is None or all(name in source.names for name, _ in module.named_parameters()):
        return models.weight_recipes(module, described, mapping=own)
    return models.weight_recipes(module, described, source=source)


def _cast(recipes: dict[str, Recipe], module: nn.Module, dtype: torch.dtype | None) -> dict[str, Recipe]:
    """The recipes of floating parameters in another dtype."""
    if dtype is None:
        return recipes
    floating = {name for name, p in module.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    name_of = str(dtype).removeprefix("torch.")
    return {
        name: replace(recipe, dtype=name_of) if name in floating and isinstance(recipe, Cast) else recipe
        for name, recipe in recipes.items()
    }


def _module_len(module: nn.Module, described: ModelConfig | None, config: BuildConfig) -> int:
    """The longest sequence, in tokens."""
    if described is None:
        if config.max_model_len is None:
            raise ConfigError(f"max_model_len must be given: {type(module).__name__} has no ModelConfig that says it")
        return config.max_model_len
    built_for = described.max_model_len or described.default_model_len
    wanted = config.max_model_len or built_for
    if wanted != built_for and described.rope is not None and described.rope.type == "dynamic":
        raise ConfigError(
            f"max_model_len is {wanted}, but the module was created for {built_for}, on which its dynamic RoPE "
            "depends: create it with that max_model_len in its ModelConfig"
        )
    replace(described, max_model_len=wanted)  # raises when the model has not so many positions
    return wanted


def _source(weights: Weights, own: Callable[[], WeightSource | None] = lambda: None) -> WeightSource | None:
    """Where weights are read: a state dict that was given, nowhere for dummies, else the model's own place."""
    if isinstance(weights, Mapping):
        return DictSource(weights)
    return None if weights == "dummy" else own()


def _special_tokens(model_dir: Path, vocab_size: int) -> tuple[int | None, tuple[int, ...]]:
    """bos and eos ids; a tokenizer that is there must fit the model."""
    if not any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        return None, tuple(sorted(read_eos_token_ids(model_dir)))
    tokenizer = Tokenizer.from_directory(model_dir, model_vocab_size=vocab_size)
    return tokenizer.bos_token_id, tuple(sorted(tokenizer.eos_token_ids))

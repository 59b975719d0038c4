"""Weight recipes: how each weight of an engine is computed from the tensors of a checkpoint.

A recipe is a frozen expression tree. Passes rewrite trees, never tensors; binding evaluates one tree at a time.

    Checkpoint(name, shape)          a tensor of the checkpoint; a leaf
    Constant(name)                   a tensor the model brings along (rotary frequencies); a leaf
    Cast(of, dtype)                  converted to a dtype
    Reshape(of, shape)               the same elements in the same order under other sizes
    Transpose(of)                    dimensions 0 and 1 swapped (GPT-2 keeps its linears as [in, out])
    Slice(of, dim, start, stop)      a range of one dimension
    Concat(parts, dim)               parts one after the other along a dimension
    Sum(parts)                       parts added up in float32, rounded once to the first one's dtype
    Zeros(shape, dtype)              zeros: the bias of a linear that has none, beside one that has; a leaf
    Scaled(of, by, is_inverse, ...)  each channel (last dimension) times, or divided by, a calibrated vector
    Scales(of, format)               the scales by which a linear's weight is quantised (quant/weights.py)
    Quantized(of, format)            its numbers by those scales, as `ops.quantized` or `ops.fp8` lays them out; where
                                     a checkpoint keeps the weight in that format, these two are what it keeps

Passes write trees over the model's own tensors: a leaf `Checkpoint` is one of its parameters, and `map_checkpoint` then
puts in the tree of each. Trees are kept in the engine as JSON (`to_json`, `from_json`), so that new weights can be
bound without the compiler.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritium.errors import CheckpointError, EngineError
from tritium.quant.schemes import WeightFormat
from tritium.quant.weights import DTYPES, SCALE_DTYPES, quantize_weight, scales_of
from tritium.weights.source import FLOAT_DTYPES, TensorSpec, WeightSource, dtype_name
from tritium.weights.stored import StoredWeight, stored_weight


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint's tensor `name`. `shape`, when given, is what that tensor must have."""

    name: str
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Constant:
    """The model's own tensor `name`, kept in the engine; a refit does not change it."""

    name: str


@dataclass(frozen=True)
class Cast:
    """`of` in `dtype` (torch's name without `torch.`), rounded to nearest even."""

    of: "Recipe"
    dtype: str


@dataclass(frozen=True)
class Transpose:
    """`of` with dimensions 0 and 1 swapped."""

    of: "Recipe"


@dataclass(frozen=True)
class Reshape:
    """The elements of `of`, in their order, as a tensor of `shape`."""

    of: "Recipe"
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """Elements `start` to `stop` (exclusive) of `of` along dimension `dim`."""

    of: "Recipe"
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Concat:
    """The parts one after the other along dimension `dim`."""

    parts: tuple["Recipe", ...]
    dim: int


@dataclass(frozen=True)
class Sum:
    """The parts added up in float32, in order, and rounded to the dtype of the first."""

    parts: tuple["Recipe", ...]


@dataclass(frozen=True)
class Zeros:
    """A tensor of zeros."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Scaled:
    """`of * by` along the last dimension, or `(of + offset) / by - offset`; in float32, then in the dtype of `of`."""

    of: "Recipe"
    by: Constant
    is_inverse: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Scales:
    """The scales of a linear's weight, [N, G]. importance: what an error in each input counts."""

    of: "Recipe"
    format: WeightFormat
    importance: Constant | None = None


@dataclass(frozen=True)
class Quantized:
    """The numbers of a linear's weight by its `Scales`: int8 or e4m3 [N, K], or uint8 [N, K / 2]."""

    of: "Recipe"
    format: WeightFormat
    importance: Constant | None = None


Recipe = Checkpoint | Constant | Cast | Reshape | Transpose | Slice | Concat | Sum | Zeros | Scaled | Scales | Quantized


def leaves(recipe: Recipe) -> Iterator[Checkpoint | Constant]:
    """The leaves of a tree that are tensors somebody must provide, left to right."""
    match recipe:
        case Zeros():
            return
        case Checkpoint() | Constant():
            yield recipe
        case Cast(of=of) | Reshape(of=of) | Transpose(of=of) | Slice(of=of):
            yield from leaves(of)
        case Scales(of=of, importance=vector) | Quantized(of=of, importance=vector) | Scaled(of=of, by=vector):
            yield from leaves(of)
            if vector is not None:
                yield vector
        case Concat(parts=parts) | Sum(parts=parts):
            for part in parts:
                yield from leaves(part)


def map_checkpoint(recipe: Recipe, change: Callable[[Checkpoint], Recipe]) -> Recipe:
    """The tree with each `Checkpoint` leaf replaced by what `change` makes of it."""
    match recipe:
        case Checkpoint():
            return change(recipe)
        case Cast() | Reshape() | Transpose() | Slice() | Scaled() | Scales() | Quantized():
            return replace(recipe, of=map_checkpoint(recipe.of, change))
        case Concat(parts=parts) | Sum(parts=parts):
            return replace(recipe, parts=tuple(map_checkpoint(part, change) for part in parts))
        case _:
            return recipe


def evaluate(recipe: Recipe, source: WeightSource, constants: Mapping[str, Tensor] | None = None) -> Tensor:
    """The tensor a recipe stands for. It may be a view of the source's memory: do not write to it.

    Raises `CheckpointError` when a leaf is missing, has another shape than its leaf says or is not floating point.
    """

    def value(node: Recipe) -> Tensor:
        match node:
            case Checkpoint():
                _leaf_spec(node, source)
                return source.get(node.name)
            case Constant(name=name):
                return _constant(name, constants or {})
            case Cast(of=of, dtype=dtype):
                return value(of).to(getattr(torch, dtype))
            case Reshape(of=of, shape=shape):
                return value(of).reshape(shape)
            case Transpose(of=of):
                return value(of).transpose(0, 1)
            case Slice(of=of, dim=dim, start=start, stop=stop):
                return value(of).narrow(dim, start, stop - start)
            case Concat(parts=parts, dim=dim):
                return torch.cat([value(part) for part in parts], dim)
            case Sum(parts=parts):
                first, *others = (value(part) for part in parts)
                total = first.to(torch.float32)
                for other in others:
                    total = total + other
                return total.to(first.dtype)
            case Zeros(shape=shape, dtype=dtype):
                return torch.zeros(shape, dtype=getattr(torch, dtype))
            case Scaled(of=of, by=by, is_inverse=is_inverse, offset=offset):
                tensor, vector = value(of), value(by).float()
                scaled = (tensor.float() + offset) / vector - offset if is_inverse else tensor.float() * vector
                return scaled.to(tensor.dtype)
            case Scales(of=of, format=kept, importance=vector):
                if (stored := _stored(of, kept, source)) is not None:
                    return _rows(of, stored.scales())
                return scales_of(value(of), kept, None if vector is None else value(vector))
            case Quantized(of=of, format=kept, importance=vector):
                if (stored := _stored(of, kept, source)) is not None:
                    return _rows(of, stored.numbers())
                weight = value(of)
                scales = scales_of(weight, kept, None if vector is None else value(vector))
                return quantize_weight(weight, scales, kept)

    return value(recipe)


def infer(recipe: Recipe, source: WeightSource, constants: Mapping[str, Tensor] | None = None) -> TensorSpec:
    """Shape and dtype of `evaluate(recipe, ...)` without reading a tensor. Raises what `evaluate` would raise."""
    match recipe:
        case Checkpoint():
            return _leaf_spec(recipe, source)
        case Constant(name=name):
            tensor = _constant(name, constants or {})
            return TensorSpec(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        case Cast(of=of, dtype=dtype):
            return TensorSpec(dtype, infer(of, source, constants).shape)
        case Reshape(of=of, shape=shape):
            spec = infer(of, source, constants)
            if math.prod(spec.shape) != math.prod(shape):
                raise CheckpointError(f"{describe(recipe)}: cannot reshape a tensor of shape {list(spec.shape)}")
            return TensorSpec(spec.dtype, shape)
        case Transpose(of=of):
            spec = infer(of, source, constants)
            if len(spec.shape) < 2:
                raise CheckpointError(f"{describe(recipe)}: cannot transpose a tensor of shape {list(spec.shape)}")
            return TensorSpec(spec.dtype, (spec.shape[1], spec.shape[0], *spec.shape[2:]))
        case Slice(of=of, dim=dim, start=start, stop=stop):
            spec = infer(of, source, constants)
            if not (0 <= dim < len(spec.shape) and 0 <= start <= stop <= spec.shape[dim]):
                raise CheckpointError(f"{describe(recipe)}: out of range for a tensor of shape {list(spec.shape)}")
            return TensorSpec(spec.dtype, (*spec.shape[:dim], stop - start, *spec.shape[dim + 1 :]))
        case Concat(parts=parts, dim=dim):
            specs = [infer(part, source, constants) for part in parts]
            rest = {(s.dtype, s.shape[:dim], s.shape[dim + 1 :]) for s in specs}
            if len(rest) != 1 or not 0 <= dim < len(specs[0].shape):
                shapes = ", ".join(f"{s.dtype}{list(s.shape)}" for s in specs)
                raise CheckpointError(f"{describe(recipe)}: parts do not fit together along dimension {dim}: {shapes}")
            first = specs[0].shape
            return TensorSpec(specs[0].dtype, (*first[:dim], sum(s.shape[dim] for s in specs), *first[dim + 1 :]))
        case Sum(parts=parts):
            specs = [infer(part, source, constants) for part in parts]
            if len(set(specs)) != 1:
                shapes = ", ".join(f"{s.dtype}{list(s.shape)}" for s in specs)
                raise CheckpointError(f"{describe(recipe)}: parts that are added must be alike: {shapes}")
            return specs[0]
        case Zeros(shape=shape, dtype=dtype):
            return TensorSpec(dtype, shape)
        case Scaled(of=of, by=by):
            spec, vector = infer(of, source, constants), infer(by, source, constants)
            if spec.shape[-1:] != vector.shape:
                raise CheckpointError(f"{describe(recipe)}: {list(spec.shape)} by a vector of {list(vector.shape)}")
            return spec
        case Scales(of=of, format=kept) | Quantized(of=of, format=kept):
            spec, group_size = infer(of, source, constants), kept.group_size
            if len(spec.shape) != 2 or spec.shape[1] % (group_size or 1) or spec.shape[1] * kept.bits % 8:
                raise CheckpointError(f"{describe(recipe)}: cannot quantise a tensor of shape {list(spec.shape)} so")
            num_out, num_in = spec.shape
            if isinstance(recipe, Scales):
                return TensorSpec(dtype_name(SCALE_DTYPES[kept.kind]), (num_out, num_in // (group_size or num_in)))
            return TensorSpec(dtype_name(DTYPES[kept.kind]), (num_out, num_in * kept.bits // 8))


def stored_format(recipe: Recipe, source: WeightSource) -> WeightFormat | None:
    """The format in which the source keeps the outputs of a linear's weight, so that its numbers can be taken."""
    leaf = _row_leaf(recipe)
    stored = stored_weight(source, leaf.name) if leaf is not None else None
    return stored.format if stored is not None else None


def _stored(recipe: Recipe, kept: WeightFormat, source: WeightSource) -> StoredWeight | None:
    """The weight as the source keeps it, when that is in this format: its numbers are taken as they are."""
    if stored_format(recipe, source) != kept:
        return None
    leaf = _row_leaf(recipe)
    assert leaf is not None
    _leaf_spec(leaf, source)
    return stored_weight(source, leaf.name)


def _row_leaf(recipe: Recipe) -> Checkpoint | None:
    """The tensor of which a tree takes whole outputs and nothing else."""
    match recipe:
        case Checkpoint():
            return recipe
        case Cast(of=of) | Slice(of=of, dim=0):
            return _row_leaf(of)
        case _:
            return None


def _rows(recipe: Recipe, values: Tensor) -> Tensor:
    """The outputs that such a tree takes."""
    match recipe:
        case Slice(of=of, start=start, stop=stop):
            return _rows(of, values)[start:stop]
        case Cast(of=of):
            return _rows(of, values)
        case _:
            return values


def describe(recipe: Recipe) -> str:
    """One line for people: `cast(transpose(h.0.mlp.c_fc.weight), bfloat16)`."""
    match recipe:
        case Checkpoint(name=name):
            return name
        case Constant(name=name):
            return f"constant {name}"
        case Cast(of=of, dtype=dtype):
            return f"cast({describe(of)}, {dtype})"
        case Reshape(of=of, shape=shape):
            return f"reshape({describe(of)}, {list(shape)})"
        case Transpose(of=of):
            return f"transpose({describe(of)})"
        case Slice(of=of, dim=dim, start=start, stop=stop):
            return f"slice({describe(of)}, dim={dim}, {start}:{stop})"
        case Concat(parts=parts, dim=dim):
            return f"concat({', '.join(map(describe, parts))}, dim={dim})"
        case Sum(parts=parts):
            return f"sum({', '.join(map(describe, parts))})"
        case Zeros(shape=shape, dtype=dtype):
            return f"zeros({list(shape)}, {dtype})"
        case Scaled(of=of, by=by, is_inverse=is_inverse):
            return f"scaled({describe(of)}, {'1 / ' if is_inverse else ''}{by.name})"
        case Scales(of=of, format=kept):
            return f"scales({describe(of)}, {kept.name})"
        case Quantized(of=of, format=kept):
            return f"quantized({describe(of)}, {kept.name})"


def _leaf_spec(leaf: Checkpoint, source: WeightSource) -> TensorSpec:
    spec = source.spec(leaf.name)
    if leaf.shape is not None and spec.shape != leaf.shape:
        raise CheckpointError(
            f"{source.where(leaf.name)}: tensor {leaf.name!r} is {list(spec.shape)}, expected {list(leaf.shape)}; "
            "config.json and the weights do not belong together"
        )
    if spec.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{source.where(leaf.name)}: tensor {leaf.name!r} has dtype {spec.dtype}; only {', '.join(FLOAT_DTYPES)} "
            "weights can be read: use the original, unquantised checkpoint"
        )
    return spec


def _constant(name: str, constants: Mapping[str, Tensor]) -> Tensor:
    if name not in constants:
        raise EngineError(f"constant {name!r} was not given; known: {', '.join(sorted(constants)) or 'none'}")
    return constants[name]

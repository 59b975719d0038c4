"""Recipes as JSON: how an engine keeps them, so that new weights can be bound without the compiler."""

import math
from collections.abc import Callable
from typing import Any

from tritium.errors import EngineError
from tritium.quant.schemes import WeightFormat, format_named
from tritium.weights.recipes import (
    Cast,
    Checkpoint,
    Concat,
    Constant,
    Quantized,
    Recipe,
    Reshape,
    Scaled,
    Scales,
    Slice,
    Sum,
    Transpose,
    Zeros,
)  # fmt: skip
from tritium.weights.source import FLOAT_DTYPES


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The tree as JSON values; `from_json` is the inverse."""
    match recipe:
        case Checkpoint(name=name, shape=shape):
            return {"checkpoint": name} | ({"shape": list(shape)} if shape is not None else {})
        case Constant(name=name):
            return {"constant": name}
        case Cast(of=of, dtype=dtype):
            return {"cast": to_json(of), "dtype": dtype}
        case Reshape(of=of, shape=shape):
            return {"reshape": to_json(of), "shape": list(shape)}
        case Transpose(of=of):
            return {"transpose": to_json(of)}
        case Slice(of=of, dim=dim, start=start, stop=stop):
            return {"slice": to_json(of), "dim": dim, "start": start, "stop": stop}
        case Concat(parts=parts, dim=dim):
            return {"concat": [to_json(part) for part in parts], "dim": dim}
        case Sum(parts=parts):
            return {"sum": [to_json(part) for part in parts]}
        case Zeros(shape=shape, dtype=dtype):
            return {"zeros": list(shape), "dtype": dtype}
        case Scaled(of=of, by=by, is_inverse=is_inverse, offset=offset):
            return {"scaled": to_json(of), "by": by.name, "is_inverse": is_inverse, "offset": offset}
        case Scales(of=of, format=kept, importance=vector):
            return {"scales": to_json(of), "format": kept.name} | _importance(vector)
        case Quantized(of=of, format=kept, importance=vector):
            return {"quantized": to_json(of), "format": kept.name} | _importance(vector)


def from_json(data: object) -> Recipe:
    """The tree that `to_json` wrote. Raises `EngineError` for anything else."""
    try:
        return _from_json(data)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise EngineError(f"not a weight recipe ({error}): {str(data)[:200]}; build the engine again") from error


def _from_json(data: Any) -> Recipe:
    if not isinstance(data, dict) or not data:
        raise TypeError("expected an object")
    kind = next(iter(data))
    build: dict[str, Callable[[], Recipe]] = {
        "checkpoint": lambda: Checkpoint(_str(data.pop("checkpoint")), _shape(data.pop("shape", None))),
        "constant": lambda: Constant(_str(data.pop("constant"))),
        "cast": lambda: Cast(_from_json(data.pop("cast")), _dtype(data.pop("dtype"))),
        "reshape": lambda: Reshape(_from_json(data.pop("reshape")), _sizes(data.pop("shape"))),
        "transpose": lambda: Transpose(_from_json(data.pop("transpose"))),
        "slice": lambda: Slice(
            _from_json(data.pop("slice")), _int(data.pop("dim")), _int(data.pop("start")), _int(data.pop("stop"))
        ),
        "concat": lambda: Concat(_parts(data.pop("concat")), _int(data.pop("dim"))),
        "sum": lambda: Sum(_parts(data.pop("sum"))),
        "scaled": lambda: Scaled(
            _from_json(data.pop("scaled")),
            Constant(_str(data.pop("by"))),
            _bool(data.pop("is_inverse")),
            _float(data.pop("offset")),
        ),
        "scales": lambda: Scales(
            _from_json(data.pop("scales")), _format(data.pop("format")), _vector(data.pop("importance", None))
        ),
        "quantized": lambda: Quantized(
            _from_json(data.pop("quantized")), _format(data.pop("format")), _vector(data.pop("importance", None))
        ),
        "zeros": lambda: Zeros(tuple(_int(size) for size in data.pop("zeros")), _dtype(data.pop("dtype"))),
    }
    data = dict(data)
    recipe = build[kind]()
    if data:
        raise ValueError(f"unknown keys {sorted(data)}")
    return recipe


def _parts(value: Any) -> tuple[Recipe, ...]:
    if not value:
        raise ValueError("a list of parts is empty")
    return tuple(_from_json(part) for part in value)


def _str(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a name, not {value!r}")
    return value


def _int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"expected a number, not {value!r}")
    return value


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, not {value!r}")
    return value


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"expected a number, not {value!r}")
    return float(value)


def _importance(vector: Constant | None) -> dict[str, Any]:
    return {} if vector is None else {"importance": vector.name}


def _vector(name: object) -> Constant | None:
    return None if name is None else Constant(_str(name))


def _format(value: object) -> WeightFormat:
    return format_named(_str(value))


def _shape(value: Any) -> tuple[int, ...] | None:
    return None if value is None else _sizes(value)


def _sizes(value: Any) -> tuple[int, ...]:
    return tuple(_int(size) for size in value)


def _dtype(value: object) -> str:
    if value not in FLOAT_DTYPES:
        raise ValueError(f"{value!r} is not a dtype of a weight")
    return str(value)

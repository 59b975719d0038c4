"""`tritium plan`: the memory a model will take, before anything of it is loaded. Exit code 1: it does not fit."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from tritium.cli.build_command import choose_model
from tritium.cli.options import fields_of
from tritium.cli.report import print_json, say, say_config
from tritium.compiler import compile_module, compute_dtype
from tritium.config import BuildConfig, RuntimeConfig, available_memory
from tritium.engine.engine import Engine
from tritium.engine.manifest import is_engine
from tritium.engine.plan import Plan
from tritium.errors import ConfigError
from tritium.resolve import resolve_model
from tritium.runtime.footprint import Footprint, footprint
from tritium.runtime.kernel_choice import choose_kernels
from tritium.runtime.memory import megabytes


class Planned(NamedTuple):
    """A model's plan and what the footprint needs beside it."""

    plan: Plan
    max_model_len: int
    is_bitwise: bool
    dtype: str


def run(*, model: str | None, arch: str | None, memory: int | None, config: Mapping[str, Any], is_json: bool) -> None:
    """Say what fits; `OutOfMemory`, and so exit code 1, when the model does not."""
    build = BuildConfig(**fields_of(BuildConfig, config))
    runtime = RuntimeConfig(**fields_of(RuntimeConfig, config))
    if memory is not None and memory < 1:
        raise ConfigError(f"--memory must be a number of bytes from 1 on, not {memory}")
    planned = plan_of(model, arch, build)
    available = available_memory() if memory is None else memory
    found = predict(planned, runtime, available)
    about = {
        "model": model or arch,
        "dtype": planned.dtype,
        "max_num_seqs": runtime.max_num_seqs,
        "max_num_batched_tokens": runtime.max_num_batched_tokens,
        "block_size": runtime.block_size,
    }
    if is_json:
        print_json({"config": {**about, **asdict(runtime), "memory": available}, **figures(found)})
        return
    say_config(about, is_json=False)
    rows = {
        "weights": megabytes(found.weights_bytes),
        "arena": f"{megabytes(found.arena_bytes)} (activations of {found.largest.tokens:,} tokens in one step)",
        "KV cache": f"{megabytes(found.memory.kv_bytes)} in {found.memory.num_blocks:,} blocks",
        "in all": f"{megabytes(found.total_bytes)} of {megabytes(available)}",
        "fits": f"{found.memory.num_tokens:,} tokens: {found.memory.num_sequences:,} sequences of "
        f"{found.memory.max_model_len:,}",
    }
    for name, text in rows.items():
        print(f"{name:<9} {text}")
    sys.stdout.flush()


def plan_of(model: str | None, arch: str | None, build: BuildConfig) -> Planned:
    """The plan of an engine directory, or of a model as `build` would compile it; no weight is read."""
    if model is not None and is_engine(model):
        engine = Engine.load(model)
        if engine.manifest.kind != "decoder":
            raise ConfigError(f"{model} is of kind {engine.manifest.kind!r}: only decoders have a KV cache to plan")
        is_bitwise = engine.manifest.invariance == "bitwise"
        return Planned(engine.plan, engine.manifest.max_model_len, is_bitwise, engine.manifest.dtype)
    say("compiling the graph, without weights")
    resolved = resolve_model(choose_model(model, arch, build, is_dummy=True), build, "dummy" if arch else None)
    compiled = compile_module(resolved.module, build, dtype=resolved.dtype)
    dtype = compute_dtype(compiled.plan)
    return Planned(compiled.plan, resolved.max_model_len, build.invariance == "bitwise", dtype)


def predict(planned: Planned, runtime: RuntimeConfig, available_bytes: int) -> Footprint:
    """What an executor of this plan would allocate on this machine's kernels. Raises `OutOfMemory`."""
    return footprint(
        planned.plan,
        choose_kernels(planned.plan),
        runtime,
        is_bitwise=planned.is_bitwise,
        engine_max_model_len=planned.max_model_len,
        available_bytes=available_bytes,
    )


def figures(found: Footprint) -> dict[str, int]:
    """The footprint in numbers."""
    return {
        "weights_bytes": found.weights_bytes,
        "arena_bytes": found.arena_bytes,
        "kv_bytes": found.memory.kv_bytes,
        "total_bytes": found.total_bytes,
        "kv_blocks": found.memory.num_blocks,
        "num_tokens": found.memory.num_tokens,
        "num_sequences": found.memory.num_sequences,
        "max_model_len": found.memory.max_model_len,
    }

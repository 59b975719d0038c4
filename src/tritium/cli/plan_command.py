"""`tritium plan`: the memory a model will take, before anything of it is loaded. Exit code 1: it does not fit."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from tritium.cli.build_command import choose_model
from tritium.cli.options import fields_of
from tritium.cli.report import print_json, say, say_config
from tritium.compiled import compile_encoder, compile_module, compute_dtype
from tritium.config import BuildConfig, Device, RuntimeConfig, available_memory
from tritium.engine.engine import Engine
from tritium.engine.manifest import is_engine
from tritium.engine.plan import Plan
from tritium.errors import ConfigError
from tritium.resolve import resolve_model
from tritium.runtime.footprint import Footprint, encoder_footprint, footprint, gpu_footprint
from tritium.runtime.gpu.device import check_capability
from tritium.runtime.gpu.known import gpu_named
from tritium.runtime.kernel_choice import choose_kernels
from tritium.runtime.memory import megabytes

CONTEXT_BYTES = 600 << 20  # of a GPU's memory: what CUDA takes for a process before anything is allocated
NCCL_BYTES = 400 << 20  # kept for NCCL on each GPU: an estimate, not measured


class Planned(NamedTuple):
    """A model's plan, or a rank's, and what the footprint needs beside it."""

    plan: Plan
    max_model_len: int
    is_bitwise: bool
    dtype: str
    device: Device = "cpu"
    num_ranks: int = 1
    capability: tuple[int, int] | None = None  # the GPU's; None: not known


def run(
    *,
    model: str | None,
    arch: str | None,
    memory: int | None,
    gpu: str | None,
    config: Mapping[str, Any],
    is_json: bool,
) -> None:
    """Say what fits; `OutOfMemory`, and so exit code 1, when the model does not."""
    if memory is not None and memory < 1:
        raise ConfigError(f"--memory must be a number of bytes from 1 on, not {memory}")
    if memory is not None and gpu is not None:
        raise ConfigError(f"--gpu {gpu} and --memory {memory} both say how much there is: give one")
    known = gpu_named(gpu) if gpu is not None else None
    build = BuildConfig(**fields_of(BuildConfig, dict(config) | ({"device": "cuda"} if known else {})))
    runtime = RuntimeConfig(**fields_of(RuntimeConfig, config))
    planned = plan_of(model, arch, build)
    if known is not None and planned.device != "cuda":
        raise ConfigError(f"--gpu {gpu}: {model} is an engine for a CPU; build it with --device cuda")
    if known is not None:
        check_capability(choose_kernels(planned.plan, device="cuda"), known.name, known.capability)
        available = known.memory_bytes - CONTEXT_BYTES - (NCCL_BYTES if planned.num_ranks > 1 else 0)
        planned = planned._replace(capability=known.capability)
    else:
        available = _memory_of(planned.device, planned.num_ranks) if memory is None else memory
    found = predict(planned, runtime, available)
    has_cache = planned.plan.kind == "decoder"
    about = {
        "model": model or arch,
        "dtype": planned.dtype,
        "device": planned.device,
        **({"tensor_parallel": planned.num_ranks} if planned.num_ranks > 1 else {}),
        "max_num_seqs": runtime.max_num_seqs,
        "max_num_batched_tokens": runtime.max_num_batched_tokens,
        "block_size": runtime.block_size,
    }
    if is_json:
        print_json({"config": {**about, **asdict(runtime), "memory": available}, **figures(found, has_cache=has_cache)})
        return
    say_config(about, is_json=False)
    if planned.num_ranks > 1:
        print(f"each of {planned.num_ranks} ranks:")
    rows = {
        "weights": megabytes(found.weights_bytes),
        "arena": f"{megabytes(found.arena_bytes)} (activations of {found.largest.tokens:,} tokens in one step)",
        **(
            {"KV cache": f"{megabytes(found.memory.kv_bytes)} in {found.memory.num_blocks:,} blocks"}
            if has_cache
            else {}
        ),
        **({"workspace": megabytes(found.workspace_bytes)} if found.workspace_bytes else {}),
        "in all": f"{megabytes(found.total_bytes)} of {megabytes(available)}",
        "fits": f"{found.memory.num_tokens:,} tokens: {found.memory.num_sequences:,} sequences of "
        f"{found.memory.max_model_len:,}"
        if has_cache
        else f"{found.largest.tokens:,} tokens at once, of up to {runtime.max_num_seqs:,} texts",
    }
    for name, text in rows.items():
        print(f"{name:<9} {text}")
    sys.stdout.flush()


def plan_of(model: str | None, arch: str | None, build: BuildConfig) -> Planned:
    """The plan of an engine directory, or of a model as `build` would compile it; no weight is read."""
    if model is not None and is_engine(model):
        engine = Engine.load(model)
        manifest = engine.manifest
        if manifest.kind == "module":
            raise ConfigError(
                f"{model} is a stateless module: it takes its weights and the activations of one batch, and nothing "
                "here could change that; decoders and encoders are planned"
            )
        device: Device = "cuda" if manifest.backend == "cuda" else "cpu"
        is_bitwise = manifest.invariance == "bitwise"
        num_ranks = manifest.mapping.get("tensor_parallel", 1)
        return Planned(engine.plan, manifest.max_model_len, is_bitwise, manifest.dtype, device, num_ranks)
    say("compiling the graph, without weights")
    resolved = resolve_model(choose_model(model, arch, build, is_dummy=True), build, "dummy" if arch else None)
    if resolved.encoder is not None:
        compiled = compile_encoder(resolved.module, build)
    else:
        compiled = compile_module(resolved.module, build, dtype=resolved.dtype)
    dtype = compute_dtype(compiled.plan)
    is_bitwise = build.resolved_invariance == "bitwise"
    return Planned(compiled.plan, resolved.max_model_len, is_bitwise, dtype, build.device, build.tensor_parallel)


def _memory_of(device: Device, num_ranks: int) -> int:
    """Bytes that a rank's process may use, on a GPU what is free of the first one."""
    if device == "cpu":
        return available_memory() // num_ranks
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU here; say by --gpu which you have, or by --memory its bytes")
    return torch.cuda.mem_get_info()[0]


def predict(planned: Planned, runtime: RuntimeConfig, available_bytes: int) -> Footprint:
    """What an executor of this plan would allocate, on a CPU by this machine's kernels. Raises `OutOfMemory`."""
    known: dict[str, Any] = {"engine_max_model_len": planned.max_model_len, "available_bytes": available_bytes}
    kernels = choose_kernels(planned.plan, device=planned.device, is_bitwise=planned.is_bitwise)
    if planned.plan.kind == "encoder":
        return encoder_footprint(planned.plan, kernels, runtime, **known, device=planned.device)
    known["num_ranks"] = planned.num_ranks
    if planned.device == "cuda":
        return gpu_footprint(planned.plan, kernels, runtime, **known, capability=planned.capability)
    return footprint(planned.plan, kernels, runtime, is_bitwise=planned.is_bitwise, **known)


def figures(found: Footprint, *, has_cache: bool = True) -> dict[str, int]:
    """The footprint in numbers; the KV cache's only where there is one."""
    cache = {
        "kv_bytes": found.memory.kv_bytes,
        "kv_blocks": found.memory.num_blocks,
        "num_tokens": found.memory.num_tokens,
        "num_sequences": found.memory.num_sequences,
    }
    return {
        "weights_bytes": found.weights_bytes,
        "arena_bytes": found.arena_bytes,
        "workspace_bytes": found.workspace_bytes,
        "total_bytes": found.total_bytes,
        "max_model_len": found.memory.max_model_len,
        **(cache if has_cache else {}),
    }

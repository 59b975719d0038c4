"""The flags that commands share, each declared once, and the groups that they come in.

A command names the groups that it takes (`takes`) and gets, for each, a mapping of the flags that the user gave: for
the others the library's own defaults hold.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Given = Mapping[str, Any]  # the flags of a group that the user gave
Model = Annotated[str, typer.Argument(help="Engine directory, Hugging Face model directory, or hub id.")]
OptionalModel = Annotated[str | None, typer.Argument(help="Engine or model directory, or hub id.")]

# how a model is compiled
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16; auto is the checkpoint's own.")]
Scheme = Annotated[
    str | None,
    typer.Option(
        help="Keep weights in 8 or 4 bits: w8a8, w8a16, w4a16_g128; on a CPU w4a8_g32 or w4a8_g128 too, on a GPU fp8."
    ),
]
KVDtype = Annotated[str | None, typer.Option("--kv-dtype", help="What the KV cache holds: auto (as computed) or int8.")]
QuantizeEmbedding = Annotated[
    bool | None, typer.Option("--quantize-embedding", help="On a CPU: keep the table of tokens in 8 bits too.")
]
Device = Annotated[str | None, typer.Option(help="cpu, or cuda for an NVIDIA GPU; default cpu.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt plus output, in tokens.")]
TensorParallel = Annotated[
    int | None, typer.Option("--tensor-parallel", help="Processes, each with a GPU if on GPUs, that share each layer.")
]
Arch = Annotated[str | None, typer.Option(help="A well-known shape instead of a model, e.g. llama-3.2-1b.")]
DummyWeights = Annotated[bool, typer.Option("--dummy-weights", help="Random weights; needs no download.")]

Unquantized = Annotated[
    list[str] | None, typer.Option(help="A tensor that the scheme leaves as it is; * and ? match. May be repeated.")
]
DisabledPasses = Annotated[
    list[str] | None, typer.Option("--disable-pass", help="Leave out an optional pass. May be repeated.")
]
Tune = Annotated[str | None, typer.Option(help="Time kernels for this machine, or its GPU: none, quick or full.")]
TuneBlockSize = Annotated[
    int | None, typer.Option("--block-size", help="With --tune, on a GPU: the --block-size that it will run with.")
]
Certificate = Annotated[str | None, typer.Option(help="Compare with the checkpoint in fp32: none, quick or full.")]
MaxMeanKL = Annotated[
    float | None, typer.Option("--max-mean-kl", help="Nats that this may differ, in place of the scheme's bound.")
]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="Ops and kernels of your own, as module:name. May be repeated."),
]

# how an engine is run
MaxNumSeqs = Annotated[int | None, typer.Option(help="Requests in flight at most.")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option(help="Tokens computed in one step at most.")]
KVCacheMemory = Annotated[int | None, typer.Option("--kv-cache-memory", help="Bytes for the KV cache.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens in a block of the KV cache.")]
NumThreads = Annotated[int | None, typer.Option(help="Compute threads; default: what affinity and cgroup leave.")]
NumNodes = Annotated[int | None, typer.Option(help="Machines that the ranks are on.")]
Rendezvous = Annotated[
    str | None, typer.Option(help="host:port of the first of several machines; others `join` there.")
]

# how tokens are chosen
MaxTokens = Annotated[int | None, typer.Option(help="Output tokens at most.")]
MinTokens = Annotated[int | None, typer.Option(help="Output tokens before anything may stop it.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float | None, typer.Option(help="Keep the smallest set of this probability.")]
MinP = Annotated[float | None, typer.Option(help="Keep tokens this likely relative to the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="Makes the draws repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="A string that ends the output. May be repeated.")]
IgnoreEos = Annotated[bool | None, typer.Option("--ignore-eos", help="Do not stop at the model's end token.")]

# how it is served
Host = Annotated[str | None, typer.Option(help="Address to listen at; 0.0.0.0 for every one.")]
Port = Annotated[int | None, typer.Option(help="Port to listen at; 0 takes a free one.")]
ApiKey = Annotated[str | None, typer.Option(help="Clients must send it; better: $TRITIUM_API_KEY.")]
ServedModelName = Annotated[str | None, typer.Option(help="What clients call the model.")]
MaxQueue = Annotated[int | None, typer.Option(help="Unfinished requests accepted at most.")]
MaxConnections = Annotated[int | None, typer.Option(help="Connections open at once, at most.")]
DrainSeconds = Annotated[int | None, typer.Option(help="How long requests may go on after SIGTERM.")]
StallSeconds = Annotated[int | None, typer.Option(help="Without progress for so long is unhealthy.")]

Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt. May be repeated.")]
Input = Annotated[Path | None, typer.Option(help='JSON lines: {"id", "prompt" or "messages", sampling options}.')]
Output = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines, appended as requests finish. Ids it has answers for are skipped; errors are tried again."
    ),
]
EngineOutput = Annotated[Path, typer.Option("--output", help="The engine directory to write.")]


Group = Mapping[str, Any]  # the names of flags, as keyword arguments, and their declarations

COMPILED: Group = {
    "dtype": Dtype,
    "scheme": Scheme,
    "kv_dtype": KVDtype,
    "quantize_embedding": QuantizeEmbedding,
    "device": Device,
    "max_model_len": MaxModelLen,
    "tensor_parallel": TensorParallel,
}
BUILT: Group = {
    **COMPILED,
    "unquantized": Unquantized,
    "disabled_passes": DisabledPasses,
    "tune": Tune,
    "tune_block_size": TuneBlockSize,
    "certificate": Certificate,
    "max_mean_kl": MaxMeanKL,
}
BATCHED: Group = {"max_num_seqs": MaxNumSeqs, "max_num_batched_tokens": MaxNumBatchedTokens}
PLANNED: Group = {**COMPILED, **BATCHED, "kv_cache_memory": KVCacheMemory, "block_size": BlockSize}
NODES: Group = {"num_nodes": NumNodes, "rendezvous": Rendezvous}
SERVED: Group = {**PLANNED, "num_threads": NumThreads, **NODES, "seed": Seed}
OPENED: Group = {**PLANNED, "num_threads": NumThreads, **NODES, "plugins": Plugins}
JOINED: Group = {**COMPILED, **NODES, "plugins": Plugins}
MEASURED: Group = {**OPENED, "seed": Seed}
CHOSEN: Group = {
    "max_tokens": MaxTokens,
    "min_tokens": MinTokens,
    "temperature": Temperature,
    "top_k": TopK,
    "top_p": TopP,
    "min_p": MinP,
    "seed": Seed,
    "stop": Stop,
    "ignore_eos": IgnoreEos,
}

LISTENING: Group = {
    "host": Host,
    "port": Port,
    "api_key": ApiKey,
    "served_model_name": ServedModelName,
    "max_queue": MaxQueue,
    "max_connections": MaxConnections,
    "drain_seconds": DrainSeconds,
    "stall_seconds": StallSeconds,
}


def takes(**groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command groups of flags. A group arrives as the argument of its name: the flags that were given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        flags = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=declaration)
            for group in groups.values()
            for name, declaration in group.items()
        ]
        kept = [parameter for name, parameter in own.parameters.items() if name not in groups]

        def run(**values: Any) -> None:
            for name, group in groups.items():
                given = {flag: values.pop(flag) for flag in group}
                values[name] = {flag: _value(value) for flag, value in given.items() if value not in (None, [])}
            command(**values)

        wrapped: Any = functools.wraps(command)(run)
        wrapped.__signature__ = own.replace(parameters=[*kept, *flags])
        return wrapped

    return decorate


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def fields_of(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of the dataclass `kind`."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in options.items() if name in names}

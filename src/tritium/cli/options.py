"""The flags that commands share, each declared once."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Model = Annotated[str, typer.Argument(help="Engine directory, Hugging Face model directory, or hub id.")]

# how a model is compiled
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16; auto is the checkpoint's own.")]
Scheme = Annotated[
    str | None, typer.Option(help="Keep weights in 8 or 4 bits: w8a8, w8a16, w4a16_g128, w4a8_g32 or w4a8_g128.")
]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt plus output, in tokens.")]
Arch = Annotated[str | None, typer.Option(help="A well-known shape instead of a model, e.g. llama-3.2-1b.")]
DummyWeights = Annotated[bool, typer.Option("--dummy-weights", help="Random weights; needs no download.")]

Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="Ops and kernels of your own, as module:name. May be repeated."),
]

# how an engine is run
MaxNumSeqs = Annotated[int | None, typer.Option(help="Requests in flight at most.")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option(help="Tokens computed in one step at most.")]
KVCacheMemory = Annotated[int | None, typer.Option("--kv-cache-memory", help="Bytes for the KV cache.")]
NumThreads = Annotated[int | None, typer.Option(help="Compute threads; default: what affinity and cgroup leave.")]

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

Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt. May be repeated.")]
Input = Annotated[Path | None, typer.Option(help='JSON lines: {"id", "prompt" or "messages", sampling options}.')]
Output = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines, appended as requests finish. Ids it has answers for are skipped; errors are tried again."
    ),
]
EngineOutput = Annotated[Path, typer.Option("--output", help="The engine directory to write.")]


def given(**options: object) -> dict[str, object]:
    """The options that the user gave; for the others the library's own defaults hold."""
    return {name: value for name, value in options.items() if value is not None}


def fields_of(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of the dataclass `kind`."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in options.items() if name in names}

"""The `tritium` command: what it takes. Each command's work is in a module of its own, loaded when it runs.

This module and what it imports stay light: `tritium --help` must not load torch.
"""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from tritium import __version__
from tritium.cli import options as o
from tritium.cli.report import reporting

app = typer.Typer(
    help="Tritium compiles a language model into an engine and runs it, with in-flight batching.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="Engines that were built on first use and kept.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """The entry point of the `tritium` script and of `python -m tritium`."""
    app()


def _work(module: str, options: dict[str, Any]) -> None:
    """Run `tritium.cli.<module>.run(**options)`; the module loads torch, this one does not."""
    with reporting(is_json=options["is_json"]):
        import_module(f"tritium.cli.{module}").run(**options)


def _print_version(value: bool) -> None:
    if value:
        print(f"tritium {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


@app.command()
def build(
    output: o.EngineOutput,
    model: Annotated[str | None, typer.Argument(help="Hugging Face model directory or hub id.")] = None,
    arch: o.Arch = None,
    dummy_weights: o.DummyWeights = False,
    dtype: o.Dtype = None,
    scheme: o.Scheme = None,
    unquantized: Annotated[
        list[str] | None, typer.Option(help="A tensor that the scheme leaves as it is; * and ? match. May be repeated.")
    ] = None,
    max_model_len: o.MaxModelLen = None,
    disable_pass: Annotated[list[str] | None, typer.Option(help="Leave out an optional pass. May be repeated.")] = None,
    tune: Annotated[str | None, typer.Option(help="Time kernels for this machine: none, quick or full.")] = None,
    certificate: Annotated[
        str | None, typer.Option(help="Compare with the checkpoint in fp32: none, quick or full.")
    ] = None,
    max_mean_kl: Annotated[
        float | None, typer.Option("--max-mean-kl", help="Nats that this may differ, in place of the scheme's bound.")
    ] = None,
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Compile a model into an engine directory."""
    passes = tuple(disable_pass) if disable_pass else None
    left_out = tuple(unquantized) if unquantized else None
    effort = {"tune": tune, "certificate": certificate, "max_mean_kl": max_mean_kl}
    weights = {"scheme": scheme, "unquantized": left_out}
    config = o.given(dtype=dtype, max_model_len=max_model_len, disabled_passes=passes, **weights, **effort)
    source = {"model": model, "arch": arch, "is_dummy": dummy_weights}
    work = {**source, "output": output, "config": config, "plugins": plugin or []}
    _work("build_command", {**work, "is_json": is_json})


@app.command()
def refit(
    engine: Annotated[Path, typer.Argument(help="The engine directory whose weights are replaced.")],
    checkpoint: Annotated[str, typer.Argument(help="Directory or hub id of a checkpoint of the same model.")],
    is_json: o.Json = False,
) -> None:
    """Give an engine other weights, without compiling anything; all or nothing."""
    _work("refit_command", {"engine": engine, "checkpoint": checkpoint, "is_json": is_json})


@app.command()
def inspect(
    engine: Annotated[Path, typer.Argument(help="The engine directory to look into.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained HTML page instead of text.")] = None,
    num_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, or decoding sequences.", min=1)] = 64,
    decode: Annotated[bool, typer.Option("--decode", help="Time a decode instead of a prompt.")] = False,
    no_timing: Annotated[bool, typer.Option("--no-timing", help="Predict costs alone; run nothing.")] = False,
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Show every step of an engine: what it covers, its kernel, what it costs and how long it takes here."""
    work = {"engine": engine, "html": html, "num_tokens": num_tokens, "is_decode": decode, "is_measured": not no_timing}
    _work("inspect_command", {**work, "plugins": plugin or [], "is_json": is_json})


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="An engine directory.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Compare two engines: configuration, files, steps, kernels, recipes, graph, certificate."""
    _work("diff_command", {"first": first, "second": second, "plugins": plugin or [], "is_json": is_json})


@app.command()
def bisect(
    engine: Annotated[Path, typer.Argument(help="The engine directory.")],
    model: Annotated[str | None, typer.Option(help="The model it was built from, where it has moved.")] = None,
    max_kl: Annotated[float, typer.Option("--max-kl", help="Nats that a pass may change any distribution by.")] = 1e-6,
    max_ratio: Annotated[float, typer.Option(help="Time with a pass over time without it, at most.")] = 1.0,
    num_tokens: Annotated[int, typer.Option(help="Tokens to compare on.", min=2, max=512)] = 64,
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Find the pass, and its steps, that changes an engine's numbers or its time beyond a bound."""
    bounds = {"max_kl": max_kl, "max_ratio": max_ratio, "num_tokens": num_tokens}
    _work("bisect_command", {"engine": engine, "model": model, **bounds, "plugins": plugin or [], "is_json": is_json})


@app.command()
def tune(
    engine: Annotated[Path | None, typer.Argument(help="The engine directory to tune for this machine.")] = None,
    effort: Annotated[str, typer.Option(help="none, quick or full; none chooses among times already known.")] = "quick",
    deny: Annotated[
        list[str] | None,
        typer.Option(
            help="Never choose this kernel, or tactic as kernel:name=value, on this machine. May be repeated."
        ),
    ] = None,
    export_to: Annotated[Path | None, typer.Option("--export", help="Write this machine's times to a file.")] = None,
    import_from: Annotated[Path | None, typer.Option("--import", help="Add the times of a file.")] = None,
    num_threads: o.NumThreads = None,
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Measure which kernels and tactics are fastest for an engine here, and note them in it."""
    files = {"export_to": export_to, "import_from": import_from}
    work = {"engine": engine, "effort": effort, "deny": deny or [], **files, "plugins": plugin or []}
    _work("tune_command", {**work, "num_threads": num_threads, "is_json": is_json})


@app.command()
def run(
    model: o.Model,
    prompt: o.Prompts = None,
    input: o.Input = None,
    output: o.Output = None,
    max_tokens: o.MaxTokens = None,
    min_tokens: o.MinTokens = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    seed: o.Seed = None,
    stop: o.Stop = None,
    ignore_eos: o.IgnoreEos = None,
    dtype: o.Dtype = None,
    max_model_len: o.MaxModelLen = None,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxNumBatchedTokens = None,
    kv_cache_memory: o.KVCacheMemory = None,
    num_threads: o.NumThreads = None,
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Complete prompts: given here, streaming, or from a file of JSON lines, resumable."""
    sampling = o.given(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=stop or None,
        ignore_eos=ignore_eos,
    )
    config = o.given(
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
        num_threads=num_threads,
        plugins=plugin,
    )
    files = {"input": input, "output": output}
    work = {"model": model, "prompts": prompt or [], **files, "sampling": sampling, "config": config}
    _work("run_command", {**work, "is_json": is_json})


@app.command()
def chat(
    model: o.Model,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: o.MaxTokens = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    seed: o.Seed = None,
    stop: o.Stop = None,
    dtype: o.Dtype = None,
    max_model_len: o.MaxModelLen = None,
    kv_cache_memory: o.KVCacheMemory = None,
    num_threads: o.NumThreads = None,
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Talk to a model. Reads lines; /reset forgets the conversation, /exit ends it."""
    sampling = o.given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=stop or None,
    )
    config = o.given(
        dtype=dtype,
        max_model_len=max_model_len,
        kv_cache_memory=kv_cache_memory,
        num_threads=num_threads,
        plugins=plugin,
    )
    work = {"model": model, "system": system, "sampling": sampling, "config": config}
    _work("chat_command", {**work, "is_json": is_json})


@app.command()
def serve(
    model: o.Model,
    host: Annotated[str | None, typer.Option(help="Address to listen at; 0.0.0.0 for every one.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at; 0 takes a free one.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Clients must send it; better: $TRITIUM_API_KEY.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Unfinished requests accepted at most.")] = None,
    drain_seconds: Annotated[int | None, typer.Option(help="How long requests may go on after SIGTERM.")] = None,
    stall_seconds: Annotated[int | None, typer.Option(help="Without progress for so long is unhealthy.")] = None,
    dtype: o.Dtype = None,
    max_model_len: o.MaxModelLen = None,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxNumBatchedTokens = None,
    kv_cache_memory: o.KVCacheMemory = None,
    num_threads: o.NumThreads = None,
    seed: o.Seed = None,
    is_json: o.Json = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's protocol."""
    server = o.given(
        host=host,
        port=port,
        api_key=api_key,
        served_model_name=served_model_name,
        max_queue=max_queue,
        drain_seconds=drain_seconds,
        stall_seconds=stall_seconds,
    )
    config = o.given(
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
        num_threads=num_threads,
        seed=seed,
    )
    _work("serve_command", {"model": model, "config": config, "server": server, "is_json": is_json})


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help="Engine or model directory, or hub id.")] = None,
    arch: o.Arch = None,
    memory: Annotated[int | None, typer.Option(help="Bytes there are; default: what this process may use.")] = None,
    dtype: o.Dtype = None,
    max_model_len: o.MaxModelLen = None,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxNumBatchedTokens = None,
    kv_cache_memory: o.KVCacheMemory = None,
    is_json: o.Json = False,
) -> None:
    """Say what memory a model will take and how much fits, before loading it; exit code 1: it does not fit."""
    config = o.given(
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
    )
    _work("plan_command", {"model": model, "arch": arch, "memory": memory, "config": config, "is_json": is_json})


@app.command("eval")
def evaluate(
    model: o.Model,
    text: Annotated[Path, typer.Option(help="The text to score, in UTF-8.")],
    window: Annotated[int | None, typer.Option(help="Tokens of a window; default 512, or what the model has.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens to the next window; default: disjoint windows.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Score the first so many tokens of the text alone.")] = None,
    dtype: o.Dtype = None,
    scheme: o.Scheme = None,
    max_model_len: o.MaxModelLen = None,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxNumBatchedTokens = None,
    kv_cache_memory: o.KVCacheMemory = None,
    num_threads: o.NumThreads = None,
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Perplexity and bits per byte of a model on a text."""
    config = o.given(
        dtype=dtype,
        scheme=scheme,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
        num_threads=num_threads,
        plugins=plugin,
    )
    work = {"model": model, "text": text, "window": window, "stride": stride, "max_tokens": max_tokens}
    _work("eval_command", {**work, "config": config, "is_json": is_json})


@cache_app.command("list")
def cache_list(is_json: o.Json = False) -> None:
    """List the engines in the cache, the most recently used first."""
    _work("cache_command", {"action": "list", "is_json": is_json})


@cache_app.command("prune")
def cache_prune(
    days: Annotated[int, typer.Option(help="Remove what was not used for so many days; 0 removes all.", min=0)] = 30,
    is_json: o.Json = False,
) -> None:
    """Remove engines from the cache."""
    _work("cache_command", {"action": "prune", "days": days, "is_json": is_json})


@bench_app.command("throughput")
def bench_throughput(
    model: Annotated[str | None, typer.Argument(help="Engine or model directory, or hub id.")] = None,
    arch: o.Arch = None,
    dummy_weights: o.DummyWeights = False,
    num_prompts: Annotated[int, typer.Option(help="Requests, all submitted at once.", min=1)] = 32,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt, all distinct and random.", min=1)] = 128,
    output_len: Annotated[int, typer.Option(help="Output tokens of each request, forced.", min=1)] = 128,
    temperature: o.Temperature = None,
    seed: o.Seed = None,
    dtype: o.Dtype = None,
    scheme: o.Scheme = None,
    max_model_len: o.MaxModelLen = None,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxNumBatchedTokens = None,
    kv_cache_memory: o.KVCacheMemory = None,
    num_threads: o.NumThreads = None,
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Offline throughput at forced lengths, with percentiles of TTFT, TPOT and latency."""
    config = o.given(
        dtype=dtype,
        scheme=scheme,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
        num_threads=num_threads,
        seed=seed,
        plugins=plugin,
    )
    work = {"model": model, "arch": arch, "is_dummy": dummy_weights, "config": config}
    load = {"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
    _work("throughput", {**work, **load, "temperature": temperature or 0.0, "is_json": is_json})

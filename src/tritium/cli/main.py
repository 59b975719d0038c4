"""The `tritium` command: what it takes. Each command's work is in a module of its own, loaded when it runs.

This module and what it imports stay light: `tritium --help` must not load torch.
"""

from pathlib import Path
from typing import Annotated

import typer

from tritium import __version__
from tritium.cli import options as o
from tritium.cli.bench_commands import bench_app
from tritium.cli.work import do_work

app = typer.Typer(
    help="Tritium compiles a language model into an engine and runs it, with in-flight batching.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="Engines that were built on first use and kept.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """The entry point of the `tritium` script and of `python -m tritium`."""
    app()


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
@o.takes(config=o.BUILT)
def build(
    output: o.EngineOutput,
    config: o.Given,
    model: Annotated[str | None, typer.Argument(help="Hugging Face model directory or hub id.")] = None,
    arch: o.Arch = None,
    dummy_weights: o.DummyWeights = False,
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Compile a model into an engine directory."""
    source = {"model": model, "arch": arch, "is_dummy": dummy_weights}
    work = {**source, "output": output, "config": config, "plugins": plugin or []}
    do_work("build_command", {**work, "is_json": is_json})


@app.command()
@o.takes(config=o.BUILT)
def quantize(
    model: Annotated[str, typer.Argument(help="Hugging Face model directory or hub id, or a .gguf file.")],
    output: o.EngineOutput,
    config: o.Given,
    method: Annotated[str, typer.Option(help="rtn (to nearest), smoothquant, awq, gptq; on a GPU static.")] = "rtn",
    calibration: Annotated[Path | None, typer.Option(help="A file of text that the other methods learn from.")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="How much of it.", min=2)] = 16_384,
    work_dir: Annotated[
        Path | None, typer.Option(help="Keeps finished layers: a second start goes on behind them.")
    ] = None,
    is_json: o.Json = False,
) -> None:
    """Keep a model's weights in fewer bits, by a method that may learn from a text, as an engine directory."""
    source = {"model": model, "calibration": calibration, "calibration_tokens": calibration_tokens}
    work = {**source, "output": output, "method": method, "work_dir": work_dir, "config": config}
    do_work("quantize_command", {**work, "is_json": is_json})


@app.command()
def refit(
    engine: Annotated[Path, typer.Argument(help="The engine directory whose weights are replaced.")],
    checkpoint: Annotated[str, typer.Argument(help="Directory or hub id of a checkpoint of the same model.")],
    is_json: o.Json = False,
) -> None:
    """Give an engine other weights, without compiling anything; all or nothing."""
    do_work("refit_command", {"engine": engine, "checkpoint": checkpoint, "is_json": is_json})


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
    do_work("inspect_command", {**work, "plugins": plugin or [], "is_json": is_json})


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="An engine directory.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Compare two engines: configuration, files, steps, kernels, recipes, graph, certificate."""
    do_work("diff_command", {"first": first, "second": second, "plugins": plugin or [], "is_json": is_json})


@app.command()
def bisect(
    engine: Annotated[Path, typer.Argument(help="The engine directory.")],
    model: Annotated[str | None, typer.Option(help="The model it was built from, where it has moved.")] = None,
    max_divergence: Annotated[
        float, typer.Option(help="Nats that a pass may move next tokens by; an encoder's squared relative error.")
    ] = 1e-6,
    max_ratio: Annotated[float, typer.Option(help="Time with a pass over time without it, at most.")] = 1.1,
    num_tokens: Annotated[int, typer.Option(help="Tokens to compare on.", min=2, max=512)] = 64,
    only: Annotated[list[str] | None, typer.Option("--pass", help="Look at this pass alone. May be repeated.")] = None,
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Find the pass, and the site, that changes an engine's numbers or its time beyond a bound."""
    bounds = {"max_divergence": max_divergence, "max_ratio": max_ratio, "num_tokens": num_tokens}
    work = {"engine": engine, "model": model, **bounds, "passes": only or [], "plugins": plugin or []}
    do_work("bisect_command", {**work, "is_json": is_json})


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
    block_size: Annotated[
        int | None,
        typer.Option(help="On a GPU: the --block-size that the engine will run with, in which attention is timed."),
    ] = None,
    plugin: o.Plugins = None,
    is_json: o.Json = False,
) -> None:
    """Measure which kernels and tactics are fastest for an engine here, and note them in it."""
    files = {"export_to": export_to, "import_from": import_from}
    work = {"engine": engine, "effort": effort, "deny": deny or [], **files, "plugins": plugin or []}
    here = {"num_threads": num_threads, "block_size": block_size}
    do_work("tune_command", {**work, **here, "is_json": is_json})


@app.command()
@o.takes(sampling=o.CHOSEN, config=o.OPENED)
def run(
    model: o.Model,
    sampling: o.Given,
    config: o.Given,
    prompt: o.Prompts = None,
    input: o.Input = None,
    output: o.Output = None,
    is_json: o.Json = False,
) -> None:
    """Complete prompts: given here, streaming, or from a file of JSON lines, resumable."""
    files = {"input": input, "output": output}
    work = {"model": model, "prompts": prompt or [], **files, "sampling": sampling, "config": config}
    do_work("run_command", {**work, "is_json": is_json})


@app.command()
@o.takes(sampling=o.CHOSEN, config=o.OPENED)
def chat(
    model: o.Model,
    sampling: o.Given,
    config: o.Given,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    is_json: o.Json = False,
) -> None:
    """Talk to a model. Reads lines; /reset forgets the conversation, /exit ends it."""
    work = {"model": model, "system": system, "sampling": sampling, "config": config}
    do_work("chat_command", {**work, "is_json": is_json})


@app.command()
@o.takes(server=o.LISTENING, config=o.SERVED)
def serve(model: o.Model, server: o.Given, config: o.Given, is_json: o.Json = False) -> None:
    """Serve a model over HTTP, with OpenAI's protocol."""
    do_work("serve_command", {"model": model, "config": config, "server": server, "is_json": is_json})


@app.command()
@o.takes(config=o.JOINED)
def join(
    model: o.Model,
    config: o.Given,
    node_rank: Annotated[int, typer.Option(help="Which of the machines this is; the first, 0, is who serves or runs.")],
    is_json: o.Json = False,
) -> None:
    """Run this machine's ranks of a model that several machines share; $TRITIUM_RENDEZVOUS_SECRET on all of them."""
    do_work("join_command", {"model": model, "node_rank": node_rank, "config": config, "is_json": is_json})


@app.command()
@o.takes(config=o.PLANNED)
def plan(
    config: o.Given,
    model: o.OptionalModel = None,
    arch: o.Arch = None,
    memory: Annotated[int | None, typer.Option(help="Bytes there are; default: what may be used here.")] = None,
    gpu: Annotated[str | None, typer.Option(help="For h200, h100, a100 or l40s, without having one.")] = None,
    is_json: o.Json = False,
) -> None:
    """Say what memory a model will take and how much fits, before loading it; exit code 1: it does not fit."""
    where = {"model": model, "arch": arch, "memory": memory, "gpu": gpu}
    do_work("plan_command", {**where, "config": config, "is_json": is_json})


@app.command("eval")
@o.takes(config=o.OPENED)
def evaluate(
    model: o.Model,
    config: o.Given,
    text: Annotated[Path, typer.Option(help="The text to score, in UTF-8.")],
    window: Annotated[int | None, typer.Option(help="Tokens of a window; default 512, or what the model has.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens to the next window; default: disjoint windows.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Score the first so many tokens of the text alone.")] = None,
    is_json: o.Json = False,
) -> None:
    """Perplexity and bits per byte of a model on a text."""
    work = {"model": model, "text": text, "window": window, "stride": stride, "max_tokens": max_tokens}
    do_work("eval_command", {**work, "config": config, "is_json": is_json})


@cache_app.command("list")
def cache_list(is_json: o.Json = False) -> None:
    """List the engines in the cache, the most recently used first."""
    do_work("cache_command", {"action": "list", "is_json": is_json})


@cache_app.command("prune")
def cache_prune(
    days: Annotated[int, typer.Option(help="Remove what was not used for so many days; 0 removes all.", min=0)] = 30,
    is_json: o.Json = False,
) -> None:
    """Remove engines from the cache."""
    do_work("cache_command", {"action": "prune", "days": days, "is_json": is_json})

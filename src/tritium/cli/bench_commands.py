"""`tritium bench ...`: what these commands take."""

from typing import Annotated

import typer

from tritium.cli import options as o
from tritium.cli.work import do_work

bench_app = typer.Typer(help="Measure.", no_args_is_help=True)

InputLen = Annotated[int, typer.Option(help="Tokens of each prompt, all distinct and random.", min=1)]
OutputLen = Annotated[int, typer.Option(help="Output tokens of each request, forced.", min=1)]


@bench_app.command("throughput")
@o.takes(config=o.MEASURED)
def bench_throughput(
    config: o.Given,
    model: o.OptionalModel = None,
    arch: o.Arch = None,
    dummy_weights: o.DummyWeights = False,
    num_prompts: Annotated[int, typer.Option(help="Requests, all submitted at once.", min=1)] = 32,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    temperature: o.Temperature = None,
    is_json: o.Json = False,
) -> None:
    """Offline throughput at forced lengths, with percentiles of TTFT, TPOT and latency."""
    work = {"model": model, "arch": arch, "is_dummy": dummy_weights, "config": config}
    load = {"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
    do_work("throughput", {**work, **load, "temperature": temperature or 0.0, "is_json": is_json})


@bench_app.command("latency")
@o.takes(config=o.MEASURED)
def bench_latency(
    config: o.Given,
    model: o.OptionalModel = None,
    arch: o.Arch = None,
    dummy_weights: o.DummyWeights = False,
    num_prompts: Annotated[int, typer.Option(help="Requests of each load.", min=1)] = 32,
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    concurrency: Annotated[int | None, typer.Option(help="Requests in flight; default 8.", min=1)] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, at random moments, in place of --concurrency.")
    ] = None,
    temperature: o.Temperature = None,
    is_json: o.Json = False,
) -> None:
    """Percentiles of the time to the first token and between tokens, alone and under load, at forced lengths."""
    work = {"model": model, "arch": arch, "is_dummy": dummy_weights, "config": config}
    load = {"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
    arrivals = {"concurrency": concurrency, "rate": rate, "temperature": temperature or 0.0}
    do_work("latency", {**work, **load, **arrivals, "is_json": is_json})

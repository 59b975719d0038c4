"""`tritium bench throughput` (DESIGN §7): forced and asserted lengths, distinct random prompts, submitted at once."""

import platform
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import tritium
from tritium.cli.build_command import choose_model
from tritium.cli.opening import describe, resolved_config
from tritium.cli.options import fields_of
from tritium.cli.report import print_json, say, say_config
from tritium.compiler import build
from tritium.config import BuildConfig
from tritium.errors import ConfigError, EngineError
from tritium.llm import LLM, RequestOutput
from tritium.sampling_params import SamplingParams

PERCENTILES = (50, 90, 99)
WARM_UP_TOKENS = 4  # per request: binds every kernel of the steps that follow, and compiles them the first time


def run(
    *,
    model: str | None,
    arch: str | None,
    is_dummy: bool,
    num_prompts: int,
    input_len: int,
    output_len: int,
    temperature: float,
    config: Mapping[str, Any],
    is_json: bool,
) -> None:
    """Open or build the model, warm up, measure, report."""
    if model is not None and is_dummy:
        raise ConfigError("--dummy-weights goes with --arch; a model is measured with its own weights")
    directory = tempfile.TemporaryDirectory(prefix="tritium-bench-") if arch else nullcontext("")
    with directory as place:
        path, config = (model, config) if arch is None else _build_arch(arch, config, Path(place), is_dummy=is_dummy)
        if path is None:
            raise ConfigError("name a model, or use --arch with --dummy-weights")
        with LLM(path, **config) as llm:
            resolved = resolved_config(llm)
            say_config(describe(resolved), is_json=is_json)
            load = {"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
            result = measure(llm, **load, temperature=temperature, seed=config.get("seed", 0))
    result = {**result, "config": {**resolved, **load, "temperature": temperature}}
    if is_json:
        print_json(result)
    else:
        _say_result(result)


def measure(
    llm: LLM, *, num_prompts: int, input_len: int, output_len: int, temperature: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """One measurement: from the first submit to the last token received. Raises `EngineError` for a wrong length."""
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, temperature=temperature)
    vocab_size = llm.engine.plan.vocab_size
    prompts = random_prompts(2 * num_prompts, input_len, vocab_size, seed)
    few = SamplingParams(max_tokens=min(WARM_UP_TOKENS, output_len), ignore_eos=True, temperature=temperature)
    llm.generate(prompts[num_prompts:], few, use_progress=False)
    before = llm.stats
    start = time.perf_counter()
    outputs = llm.generate(prompts[:num_prompts], params, use_progress=False)
    seconds = time.perf_counter() - start
    after = llm.stats
    assert_lengths(outputs, input_len, output_len)
    manifest = llm.engine.manifest
    return {
        "seconds": seconds,
        "output_tokens_per_second": num_prompts * output_len / seconds,
        "total_tokens_per_second": num_prompts * (input_len + output_len) / seconds,
        "ttft_seconds": percentiles([_ttft(out) for out in outputs]),
        "tpot_seconds": percentiles([_tpot(out) for out in outputs if output_len > 1]),
        "latency_seconds": percentiles([_latency(out) for out in outputs]),
        "prefix_hit_tokens": after.num_prefix_hit_tokens - before.num_prefix_hit_tokens,
        "preemptions": after.num_preemptions - before.num_preemptions,
        "steps": after.num_steps - before.num_steps,
        "plan_sha256": manifest.files["plan.json"].sha256,
        "versions": {
            "tritium": tritium.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "machine": {"processor": processor(), "system": platform.platform()},
    }


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random token ids, no two alike; the same for the same seed."""
    draw = random.Random(seed)
    prompts: set[tuple[int, ...]] = set()
    if vocab_size**length < 2 * count:
        raise ConfigError(f"there are not {count} distinct prompts of {length} tokens: raise --input-len")
    while len(prompts) < count:
        prompts.add(tuple(draw.randrange(vocab_size) for _ in range(length)))
    return sorted(map(list, prompts))


def assert_lengths(outputs: Sequence[RequestOutput], input_len: int, output_len: int) -> None:
    """Raise `EngineError` unless every request had exactly these lengths."""
    for out in outputs:
        completion = out.outputs[0]
        if completion.finish_reason != "length" or len(completion.token_ids) != output_len:
            raise EngineError(
                f"request {out.request_id} ended with {completion.finish_reason!r} after {len(completion.token_ids)} "
                f"of {output_len} tokens{f': {out.error}' if out.error else ''}; nothing was measured"
            )
        if len(out.prompt_token_ids) != input_len:
            raise EngineError(f"request {out.request_id} has a prompt of {len(out.prompt_token_ids)} tokens")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles (the smallest value that so many per cent do not exceed); {} of nothing."""
    if not values:
        return {}
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in PERCENTILES}
    return {"mean": sum(ordered) / len(ordered), **ranks}


def processor() -> str:
    """The CPU's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _build_arch(arch: str, config: Mapping[str, Any], place: Path, *, is_dummy: bool) -> tuple[str, dict[str, Any]]:
    """Build an engine of a well-known shape; what is left of `config` is for running it."""
    names = {field.name for field in fields(BuildConfig)}
    build_config = BuildConfig(**fields_of(BuildConfig, config))
    source = choose_model(None, arch, build_config, is_dummy=is_dummy)
    start = time.perf_counter()
    plugins = config.get("plugins", ())
    build(source, build_config, output_dir=place / arch, weights="dummy", plugins=plugins)
    say(f"built {arch} with random weights in {time.perf_counter() - start:.1f} s")
    runtime = {name: value for name, value in config.items() if name not in names or name == "max_model_len"}
    return str(place / arch), runtime


def _ttft(out: RequestOutput) -> float:
    assert out.timings.first_token is not None and out.timings.arrival is not None
    return out.timings.first_token - out.timings.arrival


def _latency(out: RequestOutput) -> float:
    assert out.timings.finished is not None and out.timings.arrival is not None
    return out.timings.finished - out.timings.arrival


def _tpot(out: RequestOutput) -> float:
    return (_latency(out) - _ttft(out)) / (len(out.outputs[0].token_ids) - 1)


def _say_result(result: Mapping[str, Any]) -> None:
    for name in ("ttft", "tpot", "latency"):
        values = result[f"{name}_seconds"]
        say(f"{name:<8}" + "  ".join(f"{key} {1000 * value:,.1f} ms" for key, value in values.items()))
    counts = (f"{name.replace('_', ' ')} {result[name]}" for name in ("prefix_hit_tokens", "preemptions", "steps"))
    say(", ".join(counts))
    print(
        f"{result['output_tokens_per_second']:,.1f} output tokens/s, {result['total_tokens_per_second']:,.1f} tokens/s "
        f"with prompts, {result['seconds']:.2f} s"
    )
    sys.stdout.flush()

"""`tritium bench throughput` (DESIGN §7): forced and asserted lengths, distinct random prompts, submitted at once."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tritium.cli.measuring import assert_lengths, opened, percentiles, provenance, random_prompts
from tritium.cli.opening import describe, resolved_config
from tritium.cli.report import print_json, say, say_config
from tritium.llm import LLM, RequestOutput
from tritium.sampling_params import SamplingParams

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
    load = {"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
    with opened(model, arch, config, is_dummy=is_dummy) as llm:
        resolved = resolved_config(llm)
        say_config(describe(resolved), is_json=is_json)
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
        **provenance(llm),
    }


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

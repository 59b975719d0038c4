"""`tritium bench latency` (DESIGN §7): when tokens come, to one request alone and to requests beside others.

Times are those at which the reader of a stream has a token. A request's time starts when it is sent or, at a fixed
rate, when it was due: what delays the sender counts.
"""

import asyncio
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tritium.cli.measuring import assert_lengths, opened, percentiles, provenance, random_prompts
from tritium.cli.opening import describe, resolved_config
from tritium.cli.report import print_json, say, say_config
from tritium.errors import ConfigError
from tritium.llm import LLM, CompletionOutput, RequestOutput
from tritium.sampling_params import SamplingParams

CONCURRENCY = 8  # requests in flight, unless a rate or another number is given
MAX_RATE = 1e6
WARM_UP_TOKENS = 4


@dataclass
class Trace:
    """One request. sent: when it was, or was due. tokens: when each of its tokens came. output: all of it."""

    sent: float
    output: RequestOutput
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens; 0 where two came at once."""
        return [after - before for before, after in pairwise(self.tokens)]


def run(
    *,
    model: str | None,
    arch: str | None,
    is_dummy: bool,
    num_prompts: int,
    input_len: int,
    output_len: int,
    concurrency: int | None,
    rate: float | None,
    temperature: float,
    config: Mapping[str, Any],
    is_json: bool,
) -> None:
    """Open or build the model, warm up, measure both loads, report."""
    if rate is not None and concurrency is not None:
        raise ConfigError(f"--rate {rate} says when requests come, --concurrency {concurrency} too: give one of them")
    if rate is not None and not 0 < rate <= MAX_RATE:
        raise ConfigError(f"--rate must be a number of requests a second above 0, up to {MAX_RATE:g}, not {rate}")
    sizes = {"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
    load = {"rate": rate} if rate is not None else {"concurrency": concurrency or CONCURRENCY}
    # the event loop outlives the engine's last word
    with asyncio.Runner() as runner, opened(model, arch, config, is_dummy=is_dummy) as llm:
        resolved = resolved_config(llm)
        say_config(describe(resolved), is_json=is_json)
        result = runner.run(measure(llm, **sizes, **load, temperature=temperature, seed=config.get("seed", 0)))
        result |= {**provenance(llm), "config": {**resolved, **sizes, **load, "temperature": temperature}}
    if is_json:
        print_json(result)
        return
    _say_part("one request at a time", result["alone"])
    _say_part(f"{rate:g} requests/s" if rate is not None else f"{load['concurrency']} at once", result["loaded"])


async def measure(
    llm: LLM,
    *,
    num_prompts: int,
    input_len: int,
    output_len: int,
    concurrency: int | None = None,
    rate: float | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Both loads, each of `num_prompts` prompts of its own. Raises `EngineError` for a wrong length."""
    width = concurrency or num_prompts
    prompts = random_prompts(2 * num_prompts + width, input_len, llm.engine.plan.vocab_size, seed)
    random.Random(seed).shuffle(prompts)  # they come sorted
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, temperature=temperature)
    few = SamplingParams(max_tokens=min(WARM_UP_TOKENS, output_len), ignore_eos=True, temperature=temperature)
    warm_up, first, second = prompts[:width], prompts[width : width + num_prompts], prompts[width + num_prompts :]
    await _in_flight(llm, warm_up, few, width)
    alone = await _timed(llm, first, params, concurrency=1)
    loaded = await _timed(llm, second, params, concurrency=concurrency, rate=rate, seed=seed)
    return {"alone": alone, "loaded": loaded}


async def _timed(
    llm: LLM,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    before, start = llm.stats, time.perf_counter()
    if rate is not None:
        traces = await _at_rate(llm, prompts, params, rate, seed)
    else:
        traces = await _in_flight(llm, prompts, params, concurrency or 1)
    seconds, after = time.perf_counter() - start, llm.stats
    assert params.max_tokens is not None
    assert_lengths([trace.output for trace in traces], len(prompts[0]), params.max_tokens)
    return {
        "num_requests": len(traces),
        "seconds": seconds,
        "ttft_seconds": percentiles([trace.ttft for trace in traces]),
        "itl_seconds": percentiles([gap for trace in traces for gap in trace.gaps]),
        "latency_seconds": percentiles([trace.tokens[-1] - trace.sent for trace in traces]),
        "output_tokens_per_second": len(traces) * params.max_tokens / seconds,
        "prefix_hit_tokens": after.num_prefix_hit_tokens - before.num_prefix_hit_tokens,
        "preemptions": after.num_preemptions - before.num_preemptions,
    }


async def _in_flight(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams, concurrency: int) -> list[Trace]:
    """So many at once, the next one when one ends."""
    left = iter(prompts)
    traces: list[Trace] = []

    async def one_after_another() -> None:
        for prompt in left:
            traces.append(await _stream(llm, prompt, params, time.perf_counter()))

    await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    return traces


async def _at_rate(
    llm: LLM, prompts: Sequence[list[int]], params: SamplingParams, rate: float, seed: int
) -> list[Trace]:
    """Whatever is still running, as from many who do not know of each other: the gaps are exponential."""
    draw, due, tasks = random.Random(seed), time.perf_counter(), []
    for prompt in prompts:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(_stream(llm, prompt, params, due)))
        due += draw.expovariate(rate)
    return await asyncio.gather(*tasks)


async def _stream(llm: LLM, prompt: list[int], params: SamplingParams, sent: float) -> Trace:
    completion = CompletionOutput()
    output = RequestOutput(request_id="", prompt=None, prompt_token_ids=prompt, outputs=[completion])
    trace = Trace(sent, output)
    async for part in llm.generate_async(prompt, params):
        now, new = time.perf_counter(), part.outputs[0]
        trace.tokens += [now] * len(new.token_ids)
        completion.token_ids += new.token_ids
        completion.finish_reason = new.finish_reason
        output.request_id, output.error = part.request_id, part.error
    return trace


def _say_part(title: str, part: Mapping[str, Any]) -> None:
    print(f"{title}: {part['num_requests']} requests, {part['output_tokens_per_second']:,.1f} output tokens/s")
    for name in ("ttft", "itl", "latency"):
        values = part[f"{name}_seconds"]
        print(f"  {name:<8}" + "  ".join(f"{key} {1000 * value:,.1f} ms" for key, value in values.items()))
    sys.stdout.flush()
    say(f"  prefix hit tokens {part['prefix_hit_tokens']}, preemptions {part['preemptions']}")

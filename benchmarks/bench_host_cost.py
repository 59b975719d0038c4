"""What the host costs in a step: everything but the kernels, which are replaced by calls that do nothing.

    python benchmarks/bench_host_cost.py [--json]

32 sequences in flight on the 16-layer plan of Llama 3.2 1B. Requests come and go: steps mix decodes and prefill
chunks. Half of the requests are greedy; the others sample with temperature and top-p and report 5 logprobs ("plain"),
or also have all penalties, a bias and bad words ("features"). Stages:

    schedule   Scheduler.schedule
    prepare    the batch, written into the plan's inputs
    launch     one ctypes call per step of the plan
    sample     parameters gathered, results made plain Python values (the kernel's own time is not in it)
    update     Scheduler.update
    report     outputs to listeners
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tritium.compiler import build
from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.models.presets import preset
from tritium.runtime.assemble import make_scheduler
from tritium.runtime.engine_loop import EngineLoop
from tritium.runtime.executor import Executor
from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import Request
from tritium.sampling_params import SamplingParams

ARCH = "llama-3.2-1b"
NUM_SEQS = 32
WARM_UP_STEPS = 100
STEPS = 1000
FEATURES = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.2,
    "logit_bias": {5: 1.0, 9: -1.0},
}
NUM_BAD_WORDS, BAD_WORD_LEN = 40, (1, 3)  # token sequences, and their lengths
PROMPT_LEN, OUTPUT_LEN = (50, 400), (20, 120)  # tokens, drawn evenly
STAGES = ("schedule", "prepare", "launch", "sample", "update")


class Stopwatch:
    """Seconds by stage and step."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def wrap(self, owner: object, method: str, stage: str) -> None:
        """Time every call of the method."""
        inner: Callable[..., Any] = getattr(owner, method)
        times = self.seconds[stage]

        def timed(*args: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **keywords)
            finally:
                times.append(time.perf_counter() - start)

        setattr(owner, method, timed)


class Load:
    """Keeps NUM_SEQS requests in flight."""

    def __init__(self, loop: EngineLoop, vocab_size: int, *, is_featured: bool) -> None:
        self._loop, self._vocab_size, self._is_featured = loop, vocab_size, is_featured
        self._random = random.Random(0)
        self._count = 0
        self._unfinished: dict[str, Request] = {}

    @property
    def is_prefilling(self) -> bool:
        """True when the step just made left a request without its first token, or gave one its first."""
        return any(request.num_output_tokens <= 1 for request in self._unfinished.values())

    def top_up(self) -> None:
        """Submit until enough are in flight."""
        while len(self._unfinished) < NUM_SEQS:
            self._count += 1
            length = self._random.randint(*PROMPT_LEN)
            bad_words = () if self._count % 2 or not self._is_featured else self._bad_words()
            request = Request(str(self._count), self._tokens(length), self._params(), bad_word_ids=bad_words)
            self._unfinished[request.request_id] = request
            self._loop.submit(request, self._finish)

    def _params(self) -> SamplingParams:
        common = {"max_tokens": self._random.randint(*OUTPUT_LEN), "ignore_eos": True, "seed": self._count}
        if self._count % 2:
            return SamplingParams(temperature=0, **common)
        return SamplingParams(
            temperature=0.8, top_p=0.9, logprobs=5, **common, **(FEATURES if self._is_featured else {})
        )

    def _bad_words(self) -> tuple[tuple[int, ...], ...]:
        """Every third begins with the token that null kernels give, so that its further tokens are looked at."""
        words = [self._tokens(self._random.randint(*BAD_WORD_LEN)) for _ in range(NUM_BAD_WORDS)]
        return tuple((0, *word) if i % 3 == 0 else tuple(word) for i, word in enumerate(words))

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(1, self._vocab_size) for _ in range(count)]

    def _finish(self, output: StepOutput) -> None:
        del self._unfinished[output.request_id]


def measure(engine: Engine, *, is_featured: bool) -> dict[str, Any]:
    """Run the load; microseconds by stage, median and 99th percentile over the steps."""
    config = RuntimeConfig(max_num_seqs=NUM_SEQS, max_model_len=1024, num_threads=1)
    executor = Executor(engine, config, is_null=True)
    scheduler = make_scheduler(engine, config, executor)
    loop = EngineLoop(scheduler, executor)
    load = Load(loop, engine.plan.vocab_size, is_featured=is_featured)
    for _ in range(WARM_UP_STEPS):
        load.top_up()
        loop.step()
    watch = Stopwatch()
    for owner, method in ((scheduler, "schedule"), (scheduler, "update")):
        watch.wrap(owner, method, method)
    for method in ("prepare", "launch", "sample"):
        watch.wrap(executor, method, method)
    totals: list[float] = []
    num_mixed = 0
    for _ in range(STEPS):
        load.top_up()
        start = time.perf_counter()
        loop.step()
        totals.append(time.perf_counter() - start)
        num_mixed += load.is_prefilling
    stages = {stage: watch.seconds[stage] for stage in STAGES}
    stages["report"] = [total - sum(parts) for total, *parts in zip(totals, *stages.values(), strict=True)]
    return {
        "plan_steps": len(engine.plan.steps),
        "sequences": NUM_SEQS,
        "steps": STEPS,
        "steps_with_prefill": num_mixed,
        "total_us": _summary(totals),
        "stages_us": {stage: _summary(seconds) for stage, seconds in stages.items()},
    }


def _summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median": round(statistics.median(ordered) * 1e6, 1),
        "p99": round(ordered[int(len(ordered) * 0.99)] * 1e6, 1),
    }


def main() -> None:
    """Build the plan, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    is_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as place:
        engine = build(preset(ARCH), output_dir=f"{place}/engine", weights="dummy")
        results = {name: measure(engine, is_featured=name == "features") for name in ("plain", "features")}
    if is_json:
        print(json.dumps(results, indent=2))
        return
    for name, result in results.items():
        print(
            f"{name}: {NUM_SEQS} sequences, {result['plan_steps']} plan steps, {STEPS} steps, "
            f"{result['steps_with_prefill']} mixed"
        )
        for stage, times in {**result["stages_us"], "total": result["total_us"]}.items():
            print(f"{stage:>9}  {times['median']:8.1f} us median  {times['p99']:8.1f} us p99")


if __name__ == "__main__":
    main()

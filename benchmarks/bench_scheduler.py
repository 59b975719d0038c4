"""What scheduling alone costs in a step: `Scheduler.schedule()` and `update()`, no model, no torch.

    python benchmarks/bench_scheduler.py [--json]

CPU time of the thread, so that neighbours on the machine do not count. Steps of only decodes (every request running,
one token each) after prompts of 512 tokens, blocks of 16 tokens, prefix caching on. The p99 is the worst case: every
sixteenth step all requests take a new block, and in another all hash their full one, because they started together.
Also what admitting one prompt of 8,192 tokens costs, once with an empty prefix cache and once with all of it cached.
"""

import argparse
import json
import random
import statistics
import time

from tritium.runtime.request import Request, SampledToken
from tritium.runtime.scheduler import Scheduler
from tritium.runtime.scheduler_config import SchedulerConfig
from tritium.sampling_params import SamplingParams

OUTPUT_LEN = 256
TOKEN = SampledToken(5, -1.0)


def make_scheduler(num_seqs: int, windows: tuple[int, ...], max_model_len: int = 1024) -> Scheduler:
    num_blocks = 2 + num_seqs * len(windows) * (max_model_len // 16 + 1)
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max(512 * num_seqs, 2048),
            max_model_len=max_model_len,
            block_size=16,
            num_blocks=num_blocks,
            windows=windows,
        )
    )


def random_request(request_id: str, prompt_len: int, output_len: int) -> Request:
    prompt = [random.randrange(128_000) for _ in range(prompt_len)]
    return Request(request_id, prompt, SamplingParams(max_tokens=output_len, ignore_eos=True))


def decode_cost(num_seqs: int, windows: tuple[int, ...]) -> dict[str, object]:
    """Microseconds of a step that decodes `num_seqs` requests."""
    scheduler = make_scheduler(num_seqs, windows)
    for index in range(num_seqs):
        scheduler.add(random_request(str(index), 512, OUTPUT_LEN))
    schedule, update = [], []
    while scheduler.has_work:
        t0 = time.thread_time()
        batch = scheduler.schedule()
        t1 = time.thread_time()
        scheduler.update(batch, [TOKEN] * batch.num_sampled)
        t2 = time.thread_time()
        if batch.num_sampled == batch.num_tokens == num_seqs:
            schedule.append((t1 - t0) * 1e6)
            update.append((t2 - t1) * 1e6)
    total = [a + b for a, b in zip(schedule, update, strict=True)]
    return {
        "sequences": num_seqs,
        "windows": windows,
        "steps": len(total),
        "schedule_us": round(statistics.median(schedule), 1),
        "update_us": round(statistics.median(update), 1),
        "total_us": round(statistics.median(total), 1),
        "total_p99_us": round(statistics.quantiles(total, n=100)[98], 1),
    }


def admission_cost() -> dict[str, object]:
    """Microseconds of the step that admits a prompt of 8,192 tokens."""
    scheduler = make_scheduler(2, (0,), max_model_len=16384)
    first = random_request("first", 8192, 1)
    again = Request("again", first.prompt_token_ids, first.params)
    costs = []
    for request in (first, again):
        scheduler.add(request)
        start = time.thread_time()
        batch = scheduler.schedule()
        costs.append((time.thread_time() - start) * 1e6)
        while True:
            scheduler.update(batch, [TOKEN] * batch.num_sampled)
            if not scheduler.has_work:
                break
            batch = scheduler.schedule()
    return {
        "prompt_len": 8192,
        "cached": again.num_cached_tokens,
        "cold_us": round(costs[0]),
        "hit_us": round(costs[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    decodes = [decode_cost(n, windows) for windows in ((0,), (0, 64)) for n in (32, 256)]
    admission = admission_cost()
    if arguments.json:
        print(json.dumps({"decode": decodes, "admission": admission}))
        return
    for row in (*decodes, admission):
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()

"""Does in-flight batching pay? Ours and transformers', one request and many, alternating, on the same weights.

    python benchmarks/bench_in_flight.py [--arch llama-3.2-1b] [--starts 3] [--rounds 2] [--out results.json]

Each start is a process of its own (read bandwidth differs from start to start) that holds both models, filled with the
same random weights, and measures, in turn, in every round:

    ours_1      tritium, one request                      theirs_1     transformers, one request
    ours_N      tritium, N requests submitted at once     theirs_N     transformers, one batch of N, without padding

Prompts are distinct random tokens, lengths are forced and asserted; time runs from the first submit to the last token.
Reported: output tokens/s, and the median and range of the ratios over rounds and starts. In the last start, one more
run of ours_N with a clock around every kernel gives each op's share; that run is in no other number.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

import tritium
from tritium import LLM, SamplingParams, build
from tritium.cli.measuring import assert_lengths, processor, random_prompts
from tritium.config import available_threads
from tritium.engine.plan import Step
from tritium.kernels.kernel import Kernel
from tritium.models.hf_config import parse_config
from tritium.models.presets import PRESETS
from tritium.weights.dummy import DummySource
from tritium.weights.source import TensorSpec

RATIOS = {
    "ours_1 / theirs_1": ("ours_1", "theirs_1"),
    "ours_N / ours_1": ("ours_N", "ours_1"),
    "ours_N / theirs_N": ("ours_N", "theirs_N"),
}


def main() -> None:
    """Start the processes, gather, report."""
    options = parse_options()
    if options.child:
        print(json.dumps(measure(options)), flush=True)
        return
    starts = [run_child(options, index) for index in range(options.starts)]
    result = summarise(starts, options)
    print("\n".join(describe(result)))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="llama-3.2-1b", choices=PRESETS)
    parser.add_argument("--num-layers", type=int, help="fewer layers, for a smoke test")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=("measure", "profile"), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_child(options: argparse.Namespace, index: int) -> dict[str, Any]:
    """One start."""
    print(f"start {index + 1} of {options.starts}", file=sys.stderr, flush=True)
    child = subprocess.run(
        [sys.executable, *sys.argv, "--child", "profile" if index + 1 == options.starts else "measure"],
        stdout=subprocess.PIPE,
        text=True,
    )
    if child.returncode:
        raise SystemExit(f"start {index + 1} failed with exit code {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both models in this process, measured in turn."""
    torch.set_num_threads(available_threads())
    shape = PRESETS[options.arch] | ({"num_hidden_layers": options.num_layers} if options.num_layers else {})
    theirs = make_reference(shape, options.dtype)
    config = parse_config(shape, options.arch, dtype=options.dtype)
    with tempfile.TemporaryDirectory(prefix="tritium-bench-") as place:
        engine = build(config, output_dir=Path(place) / "engine", weights=theirs.state_dict())
        length = options.input_len + options.output_len
        with LLM(engine.path, max_model_len=length, max_num_seqs=options.num_requests) as llm:
            return alternate(llm, theirs, options) | {"plan_sha256": engine.manifest.files["plan.json"].sha256}


def make_reference(shape: dict[str, Any], dtype: str) -> nn.Module:
    """transformers' model of this shape, with random weights of realistic scale."""
    config = transformers.AutoConfig.for_model(**shape)
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.tie_weights()
    specs = {name: TensorSpec(dtype, tuple(p.shape)) for name, p in model.named_parameters()}
    source = DummySource(specs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.get(name))
    return model.eval()


def alternate(llm: LLM, theirs: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every side in every round."""
    count, rounds = options.num_requests, options.rounds
    vocab_size = llm.engine.plan.vocab_size
    prompts = iter(random_prompts((rounds + 2) * 2 * (count + 1), options.input_len, vocab_size, seed=0))

    def take(number: int) -> list[list[int]]:
        return [next(prompts) for _ in range(number)]

    sides: dict[str, Callable[[int], float]] = {
        "ours_1": lambda length: run_ours(llm, take(1), length),
        "theirs_1": lambda length: run_theirs(theirs, take(1), length),
        "ours_N": lambda length: run_ours(llm, take(count), length),
        "theirs_N": lambda length: run_theirs(theirs, take(count), length),
    }
    for run in sides.values():
        run(min(8, options.output_len))  # warm-up: kernels bound, compiled and packed
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in list(sides) if index % 2 == 0 else reversed(list(sides)):
            seconds[name].append(sides[name](options.output_len))
            print(f"  {name:<9} {seconds[name][-1]:8.2f} s", file=sys.stderr, flush=True)
    hits = llm.stats.num_prefix_hit_tokens
    is_profiled = options.child == "profile"
    return {
        "seconds": seconds,
        "prefix_hit_tokens": hits,
        "first_tokens_equal": first_tokens_equal(llm, theirs, take(1)[0]),
        "kernel_seconds": profile(llm, lambda: sides["ours_N"](options.output_len)) if is_profiled else None,
    }


def run_ours(llm: LLM, prompts: list[list[int]], length: int) -> float:
    """Seconds for all prompts, submitted at once."""
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_progress=False)
    seconds = time.perf_counter() - start
    assert_lengths(outputs, len(prompts[0]), length)
    return seconds


def run_theirs(model: nn.Module, prompts: list[list[int]], length: int) -> float:
    """Seconds for one batch of `generate`."""
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=length,
            max_new_tokens=length,
            eos_token_id=None,
            pad_token_id=0,
        )
    seconds = time.perf_counter() - start
    assert out.shape == (len(prompts), len(prompts[0]) + length), out.shape
    return seconds


def first_tokens_equal(llm: LLM, model: nn.Module, prompt: list[int]) -> bool:
    """Both choose the same first token: the weights are the same."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    ours = llm.generate(prompt, params, use_progress=False)[0].outputs[0].token_ids[0]
    with torch.inference_mode():
        theirs = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    return ours == theirs


def profile(llm: LLM, run: Callable[[], float]) -> dict[str, float]:
    """Seconds by op while `run` runs; "total" is all of it, host and sampling included."""
    steps = llm._thread.running_loop.executor.steps
    seconds: Counter[str] = Counter()
    bind = steps.binder.bind

    def timed_bind(step: Step, kernel: Kernel, *sizes_and_tactic: Any) -> Callable[[], None]:
        return partial(timed, step.op, bind(step, kernel, *sizes_and_tactic))

    def timed(op: str, thunk: Callable[[], object]) -> None:
        start = time.perf_counter()
        thunk()
        seconds[op] += time.perf_counter() - start

    steps.binder.bind = timed_bind
    steps.forget()
    total = run()
    return {"total": total, **seconds}


def summarise(starts: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians and ranges over every round of every start."""
    tokens = {"1": options.output_len, "N": options.output_len * options.num_requests}
    rates = {
        name: [tokens[name[-1]] / seconds for start in starts for seconds in start["seconds"][name]]
        for name in starts[0]["seconds"]
    }
    ratios = {
        name: [a / b for a, b in zip(rates[over], rates[under], strict=True)] for name, (over, under) in RATIOS.items()
    }
    seconds = starts[-1]["kernel_seconds"]
    return {
        "config": {name: value for name, value in vars(options).items() if name not in ("child", "out")},
        "versions": {
            "tritium": tritium.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "machine": {"processor": processor(), "threads": available_threads()},
        "plan_sha256": starts[0]["plan_sha256"],
        "prefix_hit_tokens": sum(start["prefix_hit_tokens"] for start in starts),
        "first_tokens_equal": [start["first_tokens_equal"] for start in starts],
        "output_tokens_per_second": {name: spread(values) for name, values in rates.items()},
        "ratios": {name: spread(values) for name, values in ratios.items()},
        "shares": {op: value / seconds["total"] for op, value in sorted(seconds.items(), key=lambda item: -item[1])},
        "starts": starts,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def describe(result: dict[str, Any]) -> list[str]:
    """The result for a person."""
    config, machine = result["config"], result["machine"]
    lines = [
        f"{config['arch']} {config['dtype']}, {config['input_len']} tokens in, {config['output_len']} out, "
        f"N = {config['num_requests']}; {machine['processor']}, {machine['threads']} threads",
        f"prefix hits {result['prefix_hit_tokens']} tokens; first tokens equal: {result['first_tokens_equal']}",
    ]
    for name, values in result["output_tokens_per_second"].items():
        lines.append(f"  {name:<18} {values['median']:9.2f} tokens/s  [{values['min']:.2f}, {values['max']:.2f}]")
    for name, values in result["ratios"].items():
        lines.append(f"  {name:<18} {values['median']:9.2f}           [{values['min']:.2f}, {values['max']:.2f}]")
    lines.append(
        "of ours_N: " + ", ".join(f"{op} {share:.1%}" for op, share in result["shares"].items() if op != "total")
    )
    return lines


if __name__ == "__main__":
    main()

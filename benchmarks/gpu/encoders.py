"""BERT's shapes on this GPU, ours beside transformers: `python benchmarks/gpu/encoders.py --out FILE [--compile]`.

Random weights, the same on both sides, in fp16; texts of one length, so that transformers has nothing to pad. A side is
given token ids on the host and has to give every text's first hidden state to the host; batches follow each other, and
neither side waits for one before it launches the next. Rounds of the sides alternate; FILE gets their medians and what
the two differ by. transformers runs with sdpa, without an attention mask, and with --compile compiled by torch too
(mode reduce-overhead, static sizes). --attention times the kernels of attention alone, with other tiles too.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertModel

import tritium
from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.environment import gpu_environment
from tritium.engine.plan import Ref, Sizes
from tritium.inspection.costs import Batch, step_cost
from tritium.kernels.gpu import varlen, varlen_flash
from tritium.kernels.gpu.varlen import VarlenTactic
from tritium.kernels.kernel import LaunchContext
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.gpu.encoder_runner import GpuEncoderRunner
from tritium.runtime.gpu.step_times import GpuEncoderStepTimer, no_tactics

SHAPES: dict[str, dict[str, int]] = {
    "bert-base": {},
    "bert-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
LENGTHS, BATCHES = (128, 384), (1, 32, 128)
SECONDS = 0.25  # a round, about
ROUNDS = 5
STEP_TOKENS = 16_384
TACTICS = [
    VarlenTactic(block_m=m, tile=tile, num_warps=warps, num_stages=stages)
    for m, tile, warps, stages in (
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2),
        (128, 128, 8, 2), (128, 32, 4, 3),
    )
]  # fmt: skip


def flops(config: Any, length: int) -> float:
    """Of one text: linears and attention."""
    width, layers = config.hidden_size, config.num_hidden_layers
    return layers * length * (2 * width * (4 * width + 2 * config.intermediate_size) + 4 * length * width)


class Ours:
    def __init__(self, runner: GpuEncoderRunner, batch: int, length: int) -> None:
        ids = token_ids(batch, length)
        self._runner = runner
        self._requests = [
            EncoderRequest(token_ids=row, token_types=[0] * length, task="embed", is_normalized=False) for row in ids
        ]

    def run(self, times: int) -> torch.Tensor:
        flying: list[Any] = []
        found: list[torch.Tensor] = []
        for _ in range(times):
            flying.append(self._runner.launch(self._requests))
            if len(flying) == self._runner.num_in_flight:
                found = self._runner.collect(flying.pop(0))
        for launched in flying:
            found = self._runner.collect(launched)
        return torch.stack(found)


class Theirs:
    def __init__(self, model: Callable[..., Any], batch: int, length: int) -> None:
        self._model, self._ids = model, torch.tensor(token_ids(batch, length)).pin_memory()

    @torch.inference_mode()
    def run(self, times: int) -> torch.Tensor:
        for _ in range(times):
            torch.compiler.cudagraph_mark_step_begin()
            hidden = self._model(self._ids.to("cuda", non_blocking=True)).last_hidden_state
            kept = hidden[:, 0].float().to("cpu", non_blocking=True)
        torch.cuda.synchronize()
        return kept


def token_ids(batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randint(1000, 30_000, (batch, length), generator=generator).tolist()


def beside(sides: dict[str, Any]) -> dict[str, Any]:
    """Seconds a batch of each side, medians of rounds in turn; how far their answers are apart."""
    answers, times, rounds = {}, {}, {name: [] for name in sides}
    for name, side in sides.items():
        answers[name] = [side.run(2) for _ in range(3)][-1].float()
        start = time.perf_counter()
        side.run(4)
        times[name] = max(4, int(SECONDS / ((time.perf_counter() - start) / 4)))
    for turn in range(ROUNDS):
        for name in sides if turn % 2 == 0 else reversed(sides):
            start = time.perf_counter()
            sides[name].run(times[name])
            rounds[name].append((time.perf_counter() - start) / times[name])
    first = answers["transformers"]
    apart = {name: float((found - first).norm() / first.norm()) for name, found in answers.items()}
    return {"seconds": {n: statistics.median(r) for n, r in rounds.items()}, "rounds": rounds, "apart": apart}


def measure(shape: str, args: argparse.Namespace, folder: Path, save: Callable[[str, Any], None]) -> None:
    """Every length and batch of a shape; the model and its engine lie in `folder`."""
    config = BertConfig(**SHAPES[shape], attn_implementation="sdpa")
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).eval().half()
    model.save_pretrained(folder / "model")
    how: dict[str, Any] = {"device": "cuda", "dtype": args.dtype, "scheme": args.scheme}
    engine = tritium.build(folder / "model", output_dir=folder / "engine", **how, tune="quick" if args.tune else "none")
    if engine.tactics is not None:
        save(f"{shape} tactics", [(choice.kernel, choice.tactics) for choice in engine.tactics.choices])
    most = max(args.batches) * max(args.lengths)
    runner = GpuEncoderRunner(engine, RuntimeConfig(max_num_seqs=max(args.batches), max_num_batched_tokens=most))
    model = model.cuda()
    compiled = torch.compile(model, mode="reduce-overhead", dynamic=False) if args.compile else None
    for length, batch in itertools.product(args.lengths, args.batches):
        sides = {"ours": Ours(runner, batch, length), "transformers": Theirs(model, batch, length)}
        if compiled is not None:
            sides["compiled"] = Theirs(compiled, batch, length)
        found = beside(sides)
        work = batch * flops(config, length)
        for name, seconds in found["seconds"].items():
            print(
                f"{shape:<11} {batch:>4} x {length:<4} {name:<13} {1e3 * seconds:8.3f} ms {batch / seconds:10,.0f} "
                f"texts/s {work / seconds / 1e12:6.0f} TFLOP/s  x{seconds / found['seconds']['ours']:.2f}  "
                f"apart {found['apart'][name]:.1e}",
                flush=True,
            )
        save(f"{shape} {batch} x {length}", found)
    runner.close()
    if args.steps:
        measure_steps(shape, engine, save)


def measure_steps(shape: str, engine: Engine, save: Callable[[str, Any], None]) -> None:
    """Each step's time among the others in a batch of `STEP_TOKENS` tokens, texts of 256, summed up by kernel."""
    timer = GpuEncoderStepTimer(engine, [STEP_TOKENS], largest_decode=0)
    seconds = timer.times(STEP_TOKENS, no_tactics(), 5)
    timer.close()
    batch = Batch(Sizes(tokens=STEP_TOKENS, sequences=STEP_TOKENS // 256, rows=STEP_TOKENS // 256), 256)
    sums: dict[str, list[float]] = {}
    for step, one in zip(engine.plan.steps, seconds, strict=True):
        weight = step.args.get("weight_NK")
        name = f"{step.kernel} {list(engine.plan.value(weight.value).shape) if isinstance(weight, Ref) else ''}"
        cost = step_cost(engine.plan, step, batch)
        sums[name] = [
            a + b for a, b in zip(sums.get(name, [0.0] * 4), (1, one, cost.num_bytes, cost.flops), strict=True)
        ]
    for name, (count, total, num_bytes, work) in sorted(sums.items(), key=lambda item: -item[1][1]):
        print(
            f"{shape} {name:<42} {count:3.0f} x {1e6 * total / count:7.1f} us, {1e3 * total:7.3f} ms of "
            f"{1e3 * sum(seconds):.3f}, {num_bytes / total / 1e12:5.2f} TB/s, {work / total / 1e12:6.0f} TFLOP/s"
        )
    save(f"{shape} steps", sums)


def measure_attention(save: Callable[[str, Any], None]) -> None:
    """The kernels alone, 12 heads of 64, in one layer of BERT-base."""
    for length, batch in itertools.product(LENGTHS, (1, 32, 128)):
        tokens, found = batch * length, {}
        q, k, v = torch.randn(tokens, 3, 12, 64, dtype=torch.float16, device="cuda").unbind(1)
        starts = torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda")
        counts = torch.tensor([batch, tokens, 0, 0], dtype=torch.int32, device="cuda")
        args = {"q_TNH": q, "k_TKH": k, "v_TKH": v, "cu_seqlens_q": starts, "batch_counts": counts}
        args |= {"scale": 0.125, "softcap": 0.0}
        context = LaunchContext(num_prefills=batch, num_prefill_tokens=tokens, longest_prefill=length)
        out = torch.empty(tokens, 12, 64, dtype=torch.float16, device="cuda")
        thunks = {"flash": varlen_flash.bind(args, [out], context)}
        for tactic in TACTICS:
            name = f"{tactic.block_m} by {tactic.tile}, {tactic.num_warps} warps, {tactic.num_stages} stages"
            thunks[name] = varlen.bind(args, [out], context, tactic)
        for name, thunk in thunks.items():
            found[name] = microseconds(thunk)
        work = 4 * length * tokens * 768
        for name, us in sorted(found.items(), key=lambda item: item[1]):
            print(f"attention {batch:>4} x {length:<4} {name:<34} {us:8.1f} us {work / us / 1e6:6.0f} TFLOP/s")
        save(f"attention {batch} x {length}", found)


def microseconds(thunk: Callable[[], object]) -> float:
    """Of one call among many, behind a wait, so that the host is not what is measured."""
    for _ in range(3):
        thunk()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)
    begin.record()
    for _ in range(50):
        thunk()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--scheme")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--steps", action="store_true", help="time each step too")
    args = parser.parse_args()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results: dict[str, Any] = {"command": sys.argv, "environment": gpu_environment(), "versions": versions}

    def save(name: str, value: Any) -> None:
        results[name] = value
        args.out.write_text(json.dumps(results, indent=1) + "\n")

    if args.attention:
        measure_attention(save)
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            measure(shape, args, Path(folder), save)


if __name__ == "__main__":
    main()

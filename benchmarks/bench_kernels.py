"""Microseconds of one call of every row kernel, compiled and eager, at Llama-3.2-1B's sizes: the best of many runs.

    python benchmarks/bench_kernels.py [--threads 2] [--tokens 1 32 512]

GB/s are the bytes of inputs and outputs over the time; small batches stay in the caches, so it may exceed RAM's.
T tokens, D model, N heads, K kv heads, H head size, F width of the MLP.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tritium.kernels.select import named
from tritium.testing.kernel_cases import bind

D, N, K, H, F = 2048, 32, 8, 64, 8192
Call = tuple[str, dict[str, Any], torch.Tensor, int]  # op, arguments, output, bytes moved


def calls(num_tokens: int, dtype: torch.dtype) -> Iterator[Call]:
    """One decoder block's row kernels, reading views of fused projections as the plan's do."""
    x, weight = torch.randn(num_tokens, D).to(dtype), torch.randn(D).to(dtype)
    q, k, v = torch.randn(num_tokens, N + 2 * K, H).to(dtype).split([N, K, K], dim=1)
    gate, up = torch.randn(num_tokens, 2 * F).to(dtype).chunk(2, dim=-1)
    cos_sin, out_TF = torch.randn(num_tokens, H), torch.empty(num_tokens, F, dtype=dtype)
    cache, slots = torch.zeros(num_tokens // 16 + 1, 2, K, 16, H).to(dtype), torch.randperm(num_tokens)
    size = num_tokens * dtype.itemsize
    yield (
        "embedding",
        {"ids_T": torch.randint(0, D, (num_tokens,)), "weight_VD": torch.randn(D, D).to(dtype)},
        x,
        2 * D * size,
    )
    yield "rms_norm", {"x": x, "weight": weight, "eps": 1e-5}, torch.empty_like(x), 2 * D * size
    yield "layer_norm", {"x": x, "weight": weight, "bias": weight, "eps": 1e-5}, torch.empty_like(x), 2 * D * size
    angles = {"positions_T": torch.arange(num_tokens) + 1000, "inv_freq_P": torch.rand(H // 2)}
    yield "rope_cos_sin", angles, torch.empty(num_tokens, H), 4 * H * num_tokens
    yield "rope", {"x_TNH": q, "cos_sin": cos_sin}, torch.empty(num_tokens, N, H, dtype=dtype), 2 * N * H * size
    yield "kv_store", {"k_TKH": k, "v_TKH": v, "cache_layer": cache, "slot_mapping_T": slots}, x, 4 * K * H * size
    yield "activation", {"x": gate, "kind": "gelu_tanh"}, out_TF, 2 * F * size
    yield "gated_activation", {"gate": gate, "up": up, "kind": "silu"}, out_TF, 3 * F * size


def best_microseconds(call: Callable[[], object], budget_s: float = 0.1) -> float:
    """The best mean of runs of about 2 ms within the budget."""
    call()
    start = time.perf_counter()
    call()
    repeats = max(1, int(2e-3 / max(time.perf_counter() - start, 1e-7)))
    best, end = float("inf"), time.perf_counter() + budget_s
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best * 1e6


def main() -> None:
    """Print one line per dtype, number of tokens and op."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 512])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads")
    for dtype in (torch.bfloat16, torch.float32):
        for num_tokens in options.tokens:
            for op, args, out, num_bytes in calls(num_tokens, dtype):
                cpu, eager = (best_microseconds(bind(named(f"{kind}.{op}"), args, out)) for kind in ("cpu", "eager"))
                rate = num_bytes / cpu / 1e3
                label = f"{str(dtype)[6:]:9} T={num_tokens:<4} {op:17}"
                print(f"{label} {cpu:9.2f} us {rate:6.1f} GB/s   eager {eager:9.2f} us", flush=True)


if __name__ == "__main__":
    main()

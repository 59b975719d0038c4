"""Measure what one GPU can do at our shapes, before any design rests on it: GEMM rates, read bandwidth, decode
attention over a paged fp8 KV cache, and that attention beside a GEMM.

    python benchmarks/gpu/ceilings.py --out ceilings.json

Random data only: on zeros an H200 draws less power and reads 13 % faster. Every figure is a median of CUDA-graph-free,
event-timed repetitions over rotating buffers larger than the 60 MB L2.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl

# (name, N, K): the linears of the table's three models, unmerged and merged.
GEMMS = (
    ("gptj qkv", 12288, 4096),
    ("gptj fc_in", 16384, 4096),
    ("gptj qkv+fc_in", 28672, 4096),
    ("gptj out", 4096, 4096),
    ("gptj fc_out", 4096, 16384),
    ("gptj out+fc_out", 4096, 20480),
    ("llama2 gate+up", 22016, 4096),
    ("llama2 down", 4096, 11008),
    ("llama3 qkv", 6144, 4096),
    ("llama3 gate+up", 28672, 4096),
    ("llama3 down", 4096, 14336),
)
TOKENS = (16, 64, 256, 1024, 2048, 4096, 8192)
# (name, sequences, context, query heads, kv heads, head size)
ATTENTIONS = (
    ("gptj", 1024, 192, 16, 16, 256),
    ("gptj", 2048, 192, 16, 16, 256),
    ("gptj", 256, 2112, 16, 16, 256),
    ("llama2", 1024, 192, 32, 32, 128),
    ("llama3", 1024, 192, 32, 8, 128),
    ("llama3", 2048, 192, 32, 8, 128),
    ("llama3", 512, 1500, 32, 8, 128),
)
PAGE = 64
FP8 = torch.float8_e4m3fn


def median_ms(run: Callable[[int], object], repeats: int = 15) -> float:
    """Median milliseconds of run(i), i counting up so that a caller can rotate its buffers."""
    for i in range(3):
        run(i)
    torch.cuda.synchronize()
    times = []
    for i in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def gemm_rates() -> list[dict]:
    """TFLOP/s of fp8 (per-tensor static scales, fast accumulation) and bf16 at our shapes."""
    rows = []
    one = torch.ones((), device="cuda")
    for name, n, k in GEMMS:
        copies = max(2, int(256e6 // (n * k)) + 1)
        w8 = [torch.randn(n, k, device="cuda").to(FP8) for _ in range(copies)]
        w16 = [w.to(torch.bfloat16) for w in w8]
        for m in TOKENS:
            x16 = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            x8 = x16.to(FP8)
            row_scale, col_scale = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")

            def scaled(i: int, a: torch.Tensor = one, b: torch.Tensor = one, x8=x8, w8=w8) -> torch.Tensor:
                w = w8[i % len(w8)].t()
                return torch._scaled_mm(x8, w, a, b, out_dtype=torch.bfloat16, use_fast_accum=True)

            flops = 2 * m * n * k
            fp8 = median_ms(scaled)
            rowwise = median_ms(lambda i, a=row_scale, b=col_scale, f=scaled: f(i, a, b))
            bf16 = median_ms(lambda i, x=x16, w=w16: x @ w[i % len(w)].t())
            rows.append(
                {
                    "gemm": name, "m": m, "n": n, "k": k,
                    "fp8_tflops": flops / fp8 / 1e9, "rowwise_tflops": flops / rowwise / 1e9,
                    "bf16_tflops": flops / bf16 / 1e9, "fp8_weight_tbps": n * k / fp8 / 1e9,
                }
            )  # fmt: skip
        del w8, w16
    return rows


@triton.jit
def _read_kernel(x_ptr, out_ptr, per_program, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * per_program
    total = tl.zeros([BLOCK], tl.int32)
    for i in range(0, per_program, BLOCK):
        total += tl.load(x_ptr + start + i + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def read_bandwidth() -> float:
    """TB/s of reading 8 GiB once and writing nothing."""
    x = torch.randint(-(2**31), 2**31 - 1, (1 << 31,), dtype=torch.int32, device="cuda")
    programs = 1 << 13
    out = torch.empty(programs, dtype=torch.int32, device="cuda")
    ms = median_ms(lambda i: _read_kernel[(programs,)](x, out, x.numel() // programs, BLOCK=4096, num_warps=8))
    return x.numel() * 4 / ms / 1e9


@triton.jit
def _decode_vector_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, len_ptr, pages_per_seq, scale,
    KH: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """MHA on the vector units: one program a (sequence, head); scores and P.V stay in fp32 registers."""
    s, h = tl.program_id(0), tl.program_id(1)
    context = tl.load(len_ptr + s)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + (s * KH + h) * D + d).to(tl.float32) * scale
    m, norm = -float("inf"), 0.0
    acc = tl.zeros([TILE, D], tl.float32)
    for start in range(0, context, TILE):
        t = start + tl.arange(0, TILE)
        page = tl.load(table_ptr + s * pages_per_seq + start // PAGE).to(tl.int64)
        base = ((page * KH + h) * PAGE + t % PAGE)[:, None] * D + d[None, :]
        k = tl.load(k_ptr + base).to(tl.float32)
        v = tl.load(v_ptr + base).to(tl.float32)
        score = tl.where(t < context, tl.sum(k * q[None, :], 1), -float("inf"))
        new_m = tl.maximum(m, tl.max(score, 0))
        p = tl.exp2(score - new_m)
        alpha = tl.exp2(m - new_m)
        norm = norm * alpha + tl.sum(p, 0)
        acc = acc * alpha + p[:, None] * v
        m = new_m
    tl.store(out_ptr + (s * KH + h) * D + d, (tl.sum(acc, 0) / norm).to(tl.bfloat16))


@triton.jit
def _decode_dot_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, len_ptr, pages_per_seq, scale,
    KH: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, FP8_DOT: tl.constexpr,
):  # fmt: skip
    """GQA on the tensor cores, tokens as rows: S^T[64, 16] = K[64, D] q^T[D, 16]; with FP8_DOT without conversion."""
    s, h = tl.program_id(0), tl.program_id(1)
    context = tl.load(len_ptr + s)
    d, g, t0 = tl.arange(0, D), tl.arange(0, 16), tl.arange(0, PAGE)
    q_off = (s * KH * G + h * G + g)[None, :] * D + d[:, None]
    q = tl.load(q_ptr + q_off, mask=g[None, :] < G, other=0.0)
    m = tl.full([16], -float("inf"), tl.float32)
    norm = tl.zeros([16], tl.float32)
    acc = tl.zeros([D, 16], tl.float32)
    for start in range(0, context, PAGE):
        page = tl.load(table_ptr + s * pages_per_seq + start // PAGE).to(tl.int64)
        base = ((page * KH + h) * PAGE + t0)[:, None] * D + d[None, :]
        k, v = tl.load(k_ptr + base), tl.load(v_ptr + base)
        score = tl.dot(k, q.to(tl.float8e4nv)) * scale if FP8_DOT else tl.dot(k.to(tl.bfloat16), q) * scale
        score = tl.where((start + t0)[:, None] < context, score, -float("inf"))
        new_m = tl.maximum(m, tl.max(score, 0))
        p = tl.exp2(score - new_m[None, :])
        alpha = tl.exp2(m - new_m)
        norm = norm * alpha + tl.sum(p, 0)
        acc = acc * alpha[None, :] + tl.dot(tl.trans(v.to(tl.bfloat16)), p.to(tl.bfloat16))
        m = new_m
    tl.store(out_ptr + q_off, (acc / norm[None, :]).to(tl.bfloat16), mask=g[None, :] < G)


def attention_case(sequences: int, context: int, heads: int, kv_heads: int, size: int):
    """(run functions by variant, bytes of K and V read, check) for one decode step over distinct random pages."""
    pages_per_seq = -(-context // PAGE)
    num_pages = sequences * pages_per_seq
    shape = (num_pages, kv_heads, PAGE, size)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(FP8) for _ in range(2))
    q = torch.randn(sequences, heads, size, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(num_pages, device="cuda", dtype=torch.int32).view(sequences, pages_per_seq)
    lengths = torch.full((sequences,), context, device="cuda", dtype=torch.int32)
    out = torch.full_like(q, float("nan"))
    scale = size**-0.5 * 1.4426950408889634
    common = (q, k, v, out, table, lengths, pages_per_seq, scale)
    grid = (sequences, kv_heads)
    runs = {}
    for warps in (4, 8):
        for stages in (2, 3, 4):
            if heads == kv_heads:
                for tile in (16, 32):
                    runs[f"vector tile {tile} warps {warps} stages {stages}"] = (
                        lambda i, w=warps, st=stages, ti=tile: _decode_vector_kernel[grid](
                            *common, KH=kv_heads, D=size, PAGE=PAGE, TILE=ti, num_warps=w, num_stages=st)
                    )  # fmt: skip
            for fp8 in (False, True):
                runs[f"dot {'fp8' if fp8 else 'bf16'} warps {warps} stages {stages}"] = (
                    lambda i, w=warps, st=stages, f=fp8: _decode_dot_kernel[grid](
                        *common, KH=kv_heads, G=heads // kv_heads, D=size, PAGE=PAGE, FP8_DOT=f,
                        num_warps=w, num_stages=st)
                )  # fmt: skip

    def error() -> float:
        worst = 0.0
        for s in (0, sequences - 1):
            ks = k[table[s].long()].float().transpose(1, 0).reshape(kv_heads, 1, -1, size)[:, :, :, :][:, :, :context]
            vs = v[table[s].long()].float().transpose(1, 0).reshape(kv_heads, 1, -1, size)[:, :, :context]
            qs = q[s].float().view(kv_heads, heads // kv_heads, 1, size)
            p = ((qs * ks).sum(-1) * size**-0.5).softmax(-1)
            ref = (p[..., None] * vs).sum(2).view(heads, size)
            worst = max(worst, ((out[s].float() - ref).norm() / ref.norm()).item())
        return worst

    return runs, 2 * sequences * context * kv_heads * size, out, error


def attention_rates() -> list[dict]:
    """TB/s of each decode-attention variant, its relative error checked first; the best is named."""
    rows = []
    for name, *shape in ATTENTIONS:
        runs, num_bytes, out, error = attention_case(*shape)
        for variant, run in runs.items():
            out.fill_(float("nan"))
            try:
                run(0)
                torch.cuda.synchronize()
                err = error()
                ms = median_ms(run, 9)
                rows.append(
                    {
                        "model": name,
                        "shape": shape,
                        "variant": variant,
                        "ms": ms,
                        "tbps": num_bytes / ms / 1e9,
                        "rel_err": err,
                    }
                )
            except (RuntimeError, triton.CompilationError, triton.runtime.errors.OutOfResources) as e:
                rows.append(
                    {"model": name, "shape": shape, "variant": variant, "failed": str(e).splitlines()[-1][:120]}
                )
        best = max(
            (r for r in rows if r["shape"] == shape and "tbps" in r and r["rel_err"] < 0.1), key=lambda r: r["tbps"]
        )
        print(
            f"attention {name} {shape}: best {best['variant']} {best['tbps']:.2f} TB/s err {best['rel_err']:.4f}",
            flush=True,
        )
        rows.append({**best, "best": True})
    return rows


def overlap(best: dict[str, str]) -> list[dict]:
    """Decode attention and a GEMM one after the other, and on two streams: the share of the sum that the pair takes."""
    rows = []
    one = torch.ones((), device="cuda")
    side = torch.cuda.Stream()
    for name, shape, n, k in (
        ("gptj", (1024, 192, 16, 16, 256), 28672, 4096),
        ("llama3", (1024, 192, 32, 8, 128), 28672, 4096),
    ):
        runs, _, _, _ = attention_case(*shape)
        attend = runs[best[name]]
        x, w = torch.randn(2048, k, device="cuda").to(FP8), torch.randn(n, k, device="cuda").to(FP8)

        def gemm(i: int, x=x, w=w) -> torch.Tensor:
            return torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        def both(i: int, attend=attend, gemm=gemm) -> None:
            here = torch.cuda.current_stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                attend(i)
            gemm(i)
            here.wait_stream(side)

        a, g, pair = median_ms(attend), median_ms(gemm), median_ms(both)
        rows.append({"model": name, "attention_ms": a, "gemm_ms": g, "pair_ms": pair, "share_of_sum": pair / (a + g)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("ceilings.py measures a CUDA GPU and found none")
    torch.manual_seed(0)
    result: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}

    def keep(name: str, value: object) -> None:
        result[name] = value
        args.out.write_text(json.dumps(result, indent=1))

    keep("read_tbps", read_bandwidth())
    print(f"read {result['read_tbps']:.2f} TB/s", flush=True)
    keep("gemm", gemm_rates())
    for row in result["gemm"]:
        print(
            "{gemm:18} M={m:<5} fp8 {fp8_tflops:7.0f} rowwise {rowwise_tflops:7.0f} "
            "bf16 {bf16_tflops:6.0f} TFLOP/s, fp8 weights {fp8_weight_tbps:.2f} TB/s".format(**row),
            flush=True,
        )
    keep("attention", attention_rates())
    best = {r["model"]: r["variant"] for r in reversed(result["attention"]) if r.get("best")}
    keep("overlap", overlap(best))
    for row in result["overlap"]:
        print(
            "overlap {model}: attention {attention_ms:.3f} ms + gemm {gemm_ms:.3f} ms "
            "-> {pair_ms:.3f} ms, {share_of_sum:.2f} of the sum".format(**row)
        )


if __name__ == "__main__":
    main()

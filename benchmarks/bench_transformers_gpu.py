"""transformers with a static cache and torch.compile in bf16, on the shape of LLaMA-3 8B with random weights: the
baseline beside gpu/throughput.py. `python benchmarks/bench_transformers_gpu.py --out FILE [--batch-sizes 1 64]`

`generate` with `cache_implementation="static"` compiles the step of single tokens itself; the first call, which does
so, is not counted. Greedy, distinct random prompts of equal lengths, all outputs forced to the full length.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

LLAMA_3_8B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}


def make_model(num_layers: int) -> Any:
    """Random weights on the GPU, in bf16."""
    config = transformers.LlamaConfig(**{**LLAMA_3_8B, "num_hidden_layers": num_layers})
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model


def measure(model: Any, batch_size: int, input_len: int, output_len: int, repeats: int) -> dict[str, Any]:
    """Seconds of each call of `generate`; the rates are of the fastest."""
    seconds, compile_seconds = [], 0.0
    for repeat in range(repeats + 1):
        generator = torch.Generator().manual_seed(repeat)
        ids = torch.randint(0, LLAMA_3_8B["vocab_size"], (batch_size, input_len), generator=generator).cuda()
        options = {"max_new_tokens": output_len, "min_new_tokens": output_len, "do_sample": False}
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), cache_implementation="static", pad_token_id=0, **options
        )
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        assert out.shape == (batch_size, input_len + output_len), out.shape
        if repeat:
            seconds.append(elapsed)
        else:
            compile_seconds = elapsed
    best = min(seconds)
    return {
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        "seconds": seconds,
        "first_call_seconds": compile_seconds,
        "output_tokens_per_second": batch_size * output_len / best,
        "ms_per_token": 1000 * best / output_len,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_transformers_gpu.py measures a CUDA GPU and found none")
    model = make_model(args.layers)
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": args.layers,
        "rows": [],
    }
    for batch_size in args.batch_sizes:
        row = measure(model, batch_size, args.input_len, args.output_len, args.repeats)
        result["rows"].append(row)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(
            "transformers, batch {batch_size}: {output_tokens_per_second:,.0f} output tokens/s, {ms_per_token:.2f} ms "
            "a token; first call {first_call_seconds:.0f} s".format(**row),
            flush=True,
        )


if __name__ == "__main__":
    main()

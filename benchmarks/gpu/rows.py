"""The rows of docs/gpu-measured.md: which model, by which scheme, under which load. Their engines need no GPU."""

from pathlib import Path
from typing import Any, NamedTuple

import tritium
from tritium.config import BuildConfig
from tritium.engine.engine import Engine
from tritium.models.presets import preset

MAX_MODEL_LEN = 4096  # GPT-J claims 2,048, but its rotary positions do not end there


class Row(NamedTuple):
    """One line of the table. scheme: None is the dtype of the preset, bf16. The rest is as in the configurations."""

    arch: str
    scheme: str | None
    input_len: int
    output_len: int
    num_requests: int
    max_num_seqs: int
    max_num_batched_tokens: int
    invariance: str = "fast"
    kv_dtype: str = "auto"
    block_size: int = 64  # a tile of keys lies in one block


ROWS = {
    "llama3-bf16-128-128": Row("llama-3-8b", None, 128, 128, 4096, 1024, 2048),
    "llama3-fp8-128-128": Row("llama-3-8b", "fp8", 128, 128, 16384, 2048, 4096),
    "llama3-fp8-2048-128": Row("llama-3-8b", "fp8", 2048, 128, 3000, 880, 16384),
    "llama3-fp8-1000-1000": Row("llama-3-8b", "fp8", 1000, 1000, 2048, 768, 2048),
    "llama2-fp8-128-128": Row("llama-2-7b", "fp8", 128, 128, 6144, 1536, 3072),
    # with blocks of 64 the cache, which fills the GPU, would hold 1,900 of these sequences
    "gptj-fp8-128-128": Row("gpt-j-6b", "fp8", 128, 128, 16384, 2560, 5120, block_size=32),
    "gptj-fp8-2048-128": Row("gpt-j-6b", "fp8", 2048, 128, 512, 192, 4096),
    # the schemes side by side, and what one order of sums costs
    **{
        f"schemes-{scheme or 'bf16'}-{invariance}": Row("llama-3-8b", scheme, 128, 128, 2048, 1024, 2048, invariance)
        for scheme, invariance in (
            *((scheme, "fast") for scheme in (None, "fp8", "w8a8", "w8a16", "w4a16_g128")),
            (None, "bitwise"),
            ("fp8", "bitwise"),
        )
    },
    "llama3-bf16-kv-int8": Row("llama-3-8b", None, 128, 128, 2048, 1024, 2048, kv_dtype="int8"),
    # contexts long enough that attention takes most of a step
    "llama3-bf16-1000-1000": Row("llama-3-8b", None, 1000, 1000, 384, 384, 2048),
    "llama3-bf16-1000-1000-kv-int8": Row("llama-3-8b", None, 1000, 1000, 384, 384, 2048, kv_dtype="int8"),
    "llama3-w8a8-batch1": Row("llama-3-8b", "w8a8", 128, 128, 1, 1, 512),
    "llama3-w8a16-batch1": Row("llama-3-8b", "w8a16", 128, 128, 1, 1, 512),
    "llama3-w4a16-batch1": Row("llama-3-8b", "w4a16_g128", 128, 128, 1, 1, 512),
    "llama3-bf16-batch1": Row("llama-3-8b", None, 128, 256, 1, 1, 512),
    "llama3-bf16-batch64": Row("llama-3-8b", None, 128, 128, 64, 64, 8192),
    "llama3-fp8-batch1": Row("llama-3-8b", "fp8", 128, 256, 1, 1, 512),
}


def build_engine(row: Row, place: Path) -> Engine:
    """The row's engine, built if it is not in `place` yet."""
    path = place / f"{row.arch}-{row.scheme or 'bf16'}-{row.invariance}-{row.kv_dtype}"
    if path.is_dir():
        return Engine.load(path)
    kept: Any = {"scheme": row.scheme, "invariance": row.invariance, "kv_dtype": row.kv_dtype}
    config = BuildConfig(device="cuda", dtype="bfloat16", max_model_len=MAX_MODEL_LEN, **kept)
    model = preset(row.arch, dtype="bfloat16", max_model_len=MAX_MODEL_LEN)
    return tritium.build(model, config, output_dir=path, weights="dummy")

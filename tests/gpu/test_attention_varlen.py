"""Prompts through torch's varlen attention: right wherever chunks begin, and where keys are too many to be gathered."""

from typing import Any

import pytest
import torch

from tritium.ops.fp8 import FP8
from tritium.ops.kv_int8 import quantize_cache
from tritium.ops.quantized import quantize_rows
from tritium.testing.attention_problems import Problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
MIXED = [(1, 50), (1, 700), (2, 2), (5, 133), (130, 131), (257, 1000), (700, 700), (33, 1200), (64, 320)]
CACHES = [(torch.bfloat16, dtype) for dtype in (torch.bfloat16, FP8, torch.int8)] + [(torch.float16, torch.float16)]


def compute(args: dict[str, Any], cache_dtype: torch.dtype) -> torch.Tensor:
    from tritium.kernels.gpu import attention_varlen
    from tritium.kernels.kernel import LaunchContext

    cache = args["cache_layer"]
    args["cache_layer"] = quantize_cache(cache) if cache_dtype == torch.int8 else cache.to(cache_dtype)
    args = {name: a.cuda() if isinstance(a, torch.Tensor) else a for name, a in args.items()}
    num_sequences, num_tokens, _, num_decodes = args["batch_counts"].tolist()
    contexts = args["context_lens_S"][num_decodes:num_sequences].tolist()
    context = LaunchContext(
        num_decodes=num_decodes,
        num_prefills=num_sequences - num_decodes,
        num_prefill_tokens=num_tokens - num_decodes,
        num_prefill_keys=sum(contexts),
        longest_prefill=max(contexts),
    )
    out = torch.full_like(args["q_TNH"], float("nan"))
    attention_varlen.bind(args, [out], context)()
    return out.cpu()


@pytest.mark.parametrize("most_bytes", [None, 0])
@pytest.mark.parametrize("shape", [(8, 2, 128), (4, 4, 64), (6, 2, 256), (4, 4, 80)], ids=str)
@pytest.mark.parametrize("dtypes", CACHES, ids=str)
def test_a_mixed_batch_is_right(
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, int, int],
    most_bytes: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritium.kernels.gpu import attention_varlen

    if most_bytes is not None:
        monkeypatch.setattr(attention_varlen, "GATHERED_BYTES", most_bytes)
    problem = Problem.draw([context for _, context in MIXED], *shape, dtypes[0])
    for part in (problem.k, problem.v):
        if dtypes[1] == torch.int8:  # kept in fp32, so that quantising them again finds the same integers
            part[:] = [integers * scales for integers, scales in map(quantize_rows, part)]
        else:
            part[:] = [x.to(dtypes[1]).to(dtypes[0]) for x in part]
    chunks = list(enumerate(MIXED))
    found = problem.run(lambda args: compute(args, dtypes[1]), chunks, block_size=16)
    for (number, chunk), out in zip(chunks, found, strict=True):
        problem.check([out], [(number, chunk)])

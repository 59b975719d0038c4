"""paged_attention whose chunks of prompts go through torch's varlen attention (FlashAttention) over gathered keys.

For GPUs on which neither Hopper's kernel nor Triton's is the fastest: the tuner says. Keys and values leave the pages
by torch's indexing, in q's dtype; single tokens are `attention`'s. What does not fit into the bytes that may be
gathered stays in Triton.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from tritium.kernels.gpu import attention
from tritium.kernels.kernel import LaunchContext, Thunk
from tritium.ops.kv_int8 import parts_of

GATHERED_BYTES = 512 << 20
_GQA: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
)  # torch 2.12 asks for it


def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], context: LaunchContext) -> Thunk:
    """ops.paged_attention without window, cap or slopes into outputs[0]."""
    return attention.bind(args, outputs, context, chunks=_chunks(args, outputs[0], context))


def _chunks(args: Mapping[str, Any], out: torch.Tensor, context: LaunchContext) -> Callable[[], bool]:
    """The chunks of the step; False, and nothing done, when there are more keys than may be gathered."""
    q, cache, table = args["q_TNH"], args["cache_layer"], args["block_table_SB"]
    starts, contexts = args["cu_seqlens_q"], args["context_lens_S"]
    num_kv_heads, page = cache.shape[2:4]
    head_size, is_int8 = q.shape[2], cache.dtype == torch.int8
    stored = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache  # what indexing knows everywhere
    integers, scales = parts_of(cache) if is_int8 else (cache, cache)
    key_bytes = 2 * num_kv_heads * head_size * q.element_size()

    def gathered(part: int, block: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        if not is_int8:
            return stored[block, part, :, offset].view(cache.dtype).to(q.dtype)
        row_scales = scales[block, part, :, offset].contiguous().view(torch.float32)
        return (integers[block, part, :, offset] * row_scales).to(q.dtype)

    def run() -> bool:
        first, sequences, keys = context.num_decodes, context.num_prefills, context.num_prefill_keys
        if not 0 < keys * key_bytes <= GATHERED_BYTES:
            return False
        lengths = contexts[first : first + sequences].long()
        ends = torch.zeros(sequences + 1, dtype=torch.int32, device=q.device)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=ends[1:])
        owner = torch.repeat_interleave(lengths, output_size=keys)
        position = torch.arange(keys, device=q.device) - ends[owner]
        block, offset = table[first + owner, position // page].long(), position % page
        k, v = (gathered(part, block, offset) for part in range(2))
        tokens = slice(first, first + context.num_prefill_tokens)
        since = starts[first : first + sequences + 1] - starts[first]
        longest = context.longest_prefill  # of a context: no chunk has more tokens
        options = {"scale": args["scale"], "window_size": (-1, 0), **_GQA}
        result: Any = varlen_attn(q[tokens], k, v, since, ends, longest, longest, **options)
        out[tokens] = result
        return True

    return run

"""Sequences of one token by FlashInfer's XQA kernel, where the package is installed: the one file that imports it.

XQA reads lengths and block tables on the GPU: the host plans nothing and waits for nothing, so that its launch becomes
a part of a graph like any other. Padded sequences are computed from whatever their rows of the tables say, which are
blocks of the cache all the same, and nobody reads the result.
"""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from tritium.kernels.gpu import scratch
from tritium.kernels.kernel import LaunchContext

logger = logging.getLogger("tritium")

_TESTED = "0.7"  # the series whose signature is known; pyproject's extra asks for the same
PAGES = (16, 32, 64, 128)  # tokens a block that XQA is compiled for

Launch = Callable[[], bool]


def bind(args: Mapping[str, Any], out: torch.Tensor, context: LaunchContext) -> Launch | None:
    """The step's single tokens of ops.paged_attention into out; what it returns says True: they are computed.

    None where XQA cannot take these tensors (rows of q, out or the table that are not dense, another block size than
    `PAGES`), or where FlashInfer cannot be loaded, compiled or called like the one known, which is said once.
    """
    q, cache_layer, table = args["q_TNH"], args["cache_layer"], args["block_table_SB"]
    page = cache_layer.shape[3]
    if page not in PAGES or not all(x.is_contiguous() for x in (q, out, table)):
        return None
    shape = (q.dtype, q.device, q.shape[1], cache_layer.shape[2], page, q.shape[2])
    launch = _launcher(*shape)
    if launch is None:
        return None
    k, v = cache_layer.unbind(1)
    lengths = args["context_lens_S"]
    workspace, semaphores = _memory(context, q.device)

    def run() -> bool:
        count = context.num_decodes
        launch(q[:count], k, v, table[:count], lengths[:count], out[:count], args["scale"], workspace, semaphores)
        return True

    return run


@cache
def _launcher(
    dtype: torch.dtype,
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    page: int,
    head_size: int,
) -> Callable[..., None] | None:
    """launch(q_SNH, k, v, table_SB, lengths_S, out_SNH, scale, workspace, semaphores), compiled and tried; None: it
    cannot run here."""

    def launch(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        workspace: torch.Tensor,
        semaphores: torch.Tensor,
    ) -> None:
        xqa(
            q.unsqueeze(1),
            k,
            v,
            table,
            lengths.view(torch.uint32).unsqueeze(1),
            out.unsqueeze(1),
            workspace,
            semaphores,
            num_kv_heads,
            page,
            q_scale=scale * head_size**0.5,  # it divides by the root itself
            kv_layout="HND",
        )

    try:
        from flashinfer.xqa import xqa  # noqa: PLC0415 - optional

        q = torch.zeros(1, num_heads, head_size, dtype=dtype, device=device)
        block = torch.zeros(1, num_kv_heads, page, head_size, dtype=dtype, device=device)
        table = torch.zeros(1, 1, dtype=torch.int32, device=device)
        launch(q, block, block, table, table[0] + 1, torch.empty_like(q), 1.0, *_memory(None, device))
    except Exception as error:  # noqa: BLE001 - see below
        # Whatever it is: another version has another signature (TypeError) or asserts, a build is a subprocess that
        # fails, and an engine that was tuned with the package must open all the same: nothing needs it.
        logger.warning(
            "FlashInfer is installed and its XQA kernel cannot run here (%s: %s): Tritium's own decode attention takes "
            "its place; it needs flashinfer-python %s with nvcc and ninja, or with the package flashinfer-jit-cache",
            type(error).__name__,
            str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given",
            _TESTED,
        )
        return None
    return launch


def _memory(context: LaunchContext | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """XQA's workspace and semaphores: this context's."""
    workspace, semaphores = (scratch.take(context, piece, device) for piece in scratch.flashinfer())
    return workspace, semaphores.view(torch.uint32)

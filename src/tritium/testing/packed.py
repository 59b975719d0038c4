"""Run a finished graph on a packed batch over a paged KV cache, with the ops' references: the oracle's other side."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import fx

from tritium.engine.plan import KVGroup, Sizes
from tritium.testing.graphs import bound, evaluate, in_fp32, widened

BLOCK_SIZE = 4
BLOCKS_PER_SEQUENCE = 8


class Chunk(NamedTuple):
    """Tokens of one sequence that a step computes: ids[start:] given all ids so far."""

    token_ids: Sequence[int]
    start: int


class PackedRunner:
    """Keeps the cache between steps. Blocks are dealt out interleaved; slots never written are NaN.

    is_widened: a graph in bf16, its cache too, is computed in fp32, with the weights as they are in bf16.
    """

    def __init__(
        self,
        graph: fx.Graph,
        kv_groups: Sequence[KVGroup],
        weights: Mapping[str, torch.Tensor],
        *,
        is_widened: bool = False,
    ) -> None:
        self.graph, self.weights, self.num_groups = graph, bound(graph, weights), len(kv_groups)
        self.caches = {}
        for group in kv_groups:
            shape = (4 * BLOCKS_PER_SEQUENCE + 1, 2, group.num_kv_heads, BLOCK_SIZE, group.head_size)
            for layer in group.layers:
                self.caches[f"kv.{layer}"] = torch.full(
                    shape, _unwritten(group.dtype), dtype=getattr(torch, group.dtype)
                )
        if is_widened:
            self.graph, self.weights, self.caches = in_fp32(graph), widened(self.weights), widened(self.caches)

    def step(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """[sequences, V]: logits of the last token of every chunk. Sequence s is the s-th chunk of every step."""
        ids = [i for chunk in chunks for i in chunk.token_ids[chunk.start :]]
        positions = [p for chunk in chunks for p in range(chunk.start, len(chunk.token_ids))]
        lens = [len(chunk.token_ids) - chunk.start for chunk in chunks]
        ends = torch.tensor(lens).cumsum(0)
        table = 1 + torch.arange(BLOCKS_PER_SEQUENCE)[None, :] * 4 + torch.arange(len(chunks))[:, None]
        rows = [s for s, length in enumerate(lens) for _ in range(length)]
        blocks = [int(table[s, p // BLOCK_SIZE]) for s, p in zip(rows, positions, strict=True)]
        slots = [block * BLOCK_SIZE + p % BLOCK_SIZE for block, p in zip(blocks, positions, strict=True)]
        values = {
            "input_ids": torch.tensor(ids),
            "positions": torch.tensor(positions),
            "sampled_rows": ends - 1,
            "cu_seqlens_q": torch.cat((torch.zeros(1), ends)).to(torch.int32),
            "context_lens": torch.tensor([len(chunk.token_ids) for chunk in chunks], dtype=torch.int32),
            "batch_counts": torch.tensor([len(chunks), len(ids), len(chunks), 0], dtype=torch.int32),
        }
        for group in range(self.num_groups):
            values[f"slot_mapping.{group}"] = torch.tensor(slots)
            values[f"block_table.{group}"] = table.to(torch.int32)
        sizes = Sizes(tokens=len(ids), sequences=len(chunks), rows=len(chunks))
        (logits,) = evaluate(self.graph, {**self.weights, **self.caches, **values}, sizes)
        return logits


def _unwritten(dtype: str) -> float:
    return -1 if dtype == "int8" else torch.nan  # four bytes of -1 are a NaN


def reference_logits(module: torch.nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
    """[V]: the module's own logits of the last token."""
    with torch.no_grad():
        return module(torch.tensor(token_ids), torch.arange(len(token_ids)))[-1]

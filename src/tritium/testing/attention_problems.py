"""Paged attention problems: whole sequences, of which a test asks for any chunks; and the textbook's answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

Chunk = tuple[int, int]  # query tokens, context length with them
Compute = Callable[[dict[str, Any]], torch.Tensor]  # the op or a kernel, from its arguments
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """Whole sequences: every token has a query, a key and a value. A test asks for any part of them."""

    q: list[torch.Tensor]  # [L, N, H]
    k: list[torch.Tensor]  # [L, K, H]
    v: list[torch.Tensor]
    window: int = 0
    softcap: float = 0.0
    slopes: torch.Tensor | None = None  # [N]

    @classmethod
    def draw(
        cls, lengths: list[int], num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, **extra: Any
    ) -> "Problem":
        def heads(count: int) -> list[torch.Tensor]:
            return [torch.randn(length, count, head_size).mul(1.5).to(dtype) for length in lengths]

        return cls(heads(num_heads), heads(num_kv_heads), heads(num_kv_heads), **extra)

    def args(self, chunks: list[tuple[int, Chunk]], *, block_size: int = 16) -> dict[str, Any]:
        """The op's arguments for chunks of sequences; each slot that no query of theirs sees holds NaN.

        chunks: (sequence, (query tokens, context length)). Blocks lie in a random order; those wholly behind the window
        are the null block 0.
        """
        num_kv_heads, head_size = self.k[0].shape[1:]
        num_blocks = [-(-context // block_size) for _, (_, context) in chunks]
        sizes = (1 + sum(num_blocks), 3, 2, num_kv_heads, block_size, head_size)
        cache = torch.full(sizes, float("nan"), dtype=self.k[0].dtype)[:, 1]
        table = torch.full((len(chunks) + 1, max(num_blocks) + 1), -7, dtype=torch.int32)
        free = (torch.randperm(sum(num_blocks)) + 1).tolist()
        starts, queries = [0], []
        for row, (sequence, (num_queries, context)) in enumerate(chunks):
            first_seen = max(0, context - num_queries - self.window + 1) if self.window else 0
            for block in range(num_blocks[row]):
                table[row, block] = 0
                first, end = max(first_seen, block * block_size), min((block + 1) * block_size, context)
                if first < end:
                    table[row, block] = free.pop()
                    slots = slice(first - block * block_size, end - block * block_size)
                    for part, x in enumerate((self.k, self.v)):
                        cache[table[row, block], part, :, slots] = x[sequence][first:end].transpose(0, 1)
            queries.append(self.q[sequence][context - num_queries : context])
            starts.append(starts[-1] + num_queries)
        return {
            "q_TNH": torch.cat(queries),
            "cache_layer": cache,
            "block_table_SB": table,
            "cu_seqlens_q": torch.tensor([*starts, -9], dtype=torch.int32),
            "context_lens_S": torch.tensor([*(context for _, (_, context) in chunks), -9], dtype=torch.int32),
            "batch_counts": torch.tensor([len(chunks), starts[-1], 0, num_leading_singles(chunks)], dtype=torch.int32),
            "scale": head_size**-0.5,
            "window": self.window,
            "softcap": self.softcap,
            "alibi_slopes_N": self.slopes,
        }

    def run(self, compute: Compute, chunks: list[tuple[int, Chunk]], **layout: Any) -> list[torch.Tensor]:
        """What `compute` gives for each chunk."""
        args = self.args(chunks, **layout)
        out = compute(args)
        starts = args["cu_seqlens_q"].tolist()
        return [out[starts[i] : starts[i + 1]] for i in range(len(chunks))]

    def dense(self, sequence: int, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        """The same for one chunk, as a textbook writes it, all in `dtype`."""
        num_queries, context = chunk
        q, k, v = (x[sequence][:context].to(dtype).transpose(0, 1) for x in (self.q, self.k, self.v))
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        scores = q[:, context - num_queries :] @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        distance = torch.arange(context - num_queries, context)[:, None] - torch.arange(context)
        if self.slopes is not None:
            scores = scores - self.slopes.to(dtype)[:, None, None] * distance
        is_hidden = (distance < 0) | (distance >= (self.window or context))
        return (scores.masked_fill(is_hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)

    def check(self, found: list[torch.Tensor], chunks: list[tuple[int, Chunk]]) -> None:
        """Assert of what `run` gave for these chunks, taken together, that it is as near the textbook's fp64 as one may
        ask: root mean square error at most twice that of low precision, largest at most three times.

        Low precision is the worse of fp32 with a cast at the end and of all arithmetic in q's dtype.
        """
        dtype, out = self.q[0].dtype, torch.cat(found)
        exact, single, low = (
            torch.cat([self.dense(*chunk, of) for chunk in chunks]) for of in (torch.float64, torch.float32, dtype)
        )
        error = (out - exact).abs()
        allowed = torch.maximum((single.to(dtype) - exact).abs(), (low - exact).abs())
        ulp = torch.finfo(dtype).eps * exact.abs().max() / 2
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + ulp, chunks
        assert error.max() <= 3 * allowed.max() + 2 * ulp, chunks

    def whole(self) -> list[tuple[int, Chunk]]:
        """Every sequence, all tokens at once."""
        return [(i, (len(q), len(q))) for i, q in enumerate(self.q)]


def num_leading_singles(chunks: list[tuple[int, Chunk]]) -> int:
    """How many chunks before the first of several query tokens: `batch_counts[3]`."""
    return next((i for i, (_, (num_queries, _)) in enumerate(chunks) if num_queries > 1), len(chunks))


def check_company(data: st.DataObject, compute: Compute, *, most_sequences: int, has_slopes: bool = False) -> None:
    """Assert of a drawn problem that chunks of its sequences have the bits that they have in the whole ones."""
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    shape = data.draw(st.sampled_from([(4, 2, 64), (8, 1, 32), (3, 3, 20), (14, 2, 128)]))
    dtype, window = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([0, 1, 30, 64, 65]))
    lengths = data.draw(st.lists(st.integers(1, 180), min_size=1, max_size=most_sequences))
    slopes = torch.rand(shape[0]) if has_slopes and data.draw(st.booleans()) else None
    problem = Problem.draw(lengths, *shape, dtype, window=window, slopes=slopes)
    whole = problem.run(compute, problem.whole(), block_size=data.draw(st.sampled_from([4, 16, 128])))
    chunks = []
    for sequence, length in enumerate(lengths):
        context = data.draw(st.integers(1, length))
        chunks.append((sequence, (data.draw(st.integers(1, context)), context)))
    for (sequence, (count, context)), out in zip(chunks, problem.run(compute, chunks), strict=True):
        assert torch.equal(out, whole[sequence][context - count : context])

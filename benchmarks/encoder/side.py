"""What the sides of bench_encoder.py share: the texts, how a peer takes them, and the measurement of one side.

A side is a module with a function from (model, dtype) to encoders by way, run as a process of its own.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH, SHORTEST, LONGEST, VOCAB_SIZE = 32, 8, 256, 30522
Encode = Callable[[list[list[int]]], list[Any]]


def texts() -> list[list[int]]:
    """The same on every side."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(SHORTEST, LONGEST + 1, BATCH)
    return [draw.integers(1000, VOCAB_SIZE, length).tolist() for length in lengths]


def padded(batch: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, filled up to the longest."""
    ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(batch):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), 1
    return ids, mask


def mean(hidden: torch.Tensor, mask: torch.Tensor) -> list[Any]:
    """The mean over each text's own tokens."""
    weights = mask.unsqueeze(-1)
    return ((hidden.float() * weights).sum(1) / weights.sum(1)).tolist()


def padded_ways(hidden_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, Encode]:
    """Both ways of a peer. hidden_of: from padded ids and mask to hidden states."""

    def encode(prompts: list[list[int]]) -> list[Any]:
        ids, mask = padded(prompts)
        return mean(hidden_of(ids, mask), mask)

    return {"padded": encode, "sorted by 8": _in_batches(encode, 8)}


def _in_batches(run: Encode, size: int) -> Encode:
    """Sorted by length, `size` texts at a time; answers in the order of the texts."""

    def encode(prompts: list[list[int]]) -> list[Any]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: list[Any] = [None] * len(prompts)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for i, answer in zip(chosen, run([prompts[i] for i in chosen]), strict=True):
                found[i] = answer
        return found

    return encode


def run(encoders: Callable[[Path, str], dict[str, Encode]]) -> None:
    """The process of a side: seconds of each repeat by way, and the embeddings, as the last line it prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts, seconds, answers = texts(), {}, None
    for way, encode in encoders(args.model, args.dtype).items():
        answers = encode(prompts)  # warm-up
        seconds[way] = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            encode(prompts)
            seconds[way].append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "answers": answers}))

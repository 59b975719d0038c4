"""The plan's inputs: persistent tensors at fixed addresses, and the builder that writes a step's batch into them.

Everything is written through numpy views. Nothing here loops over tokens in Python: a decode step costs a few list
comprehensions over its sequences and a few vectorised writes; block tables are written only where they grew.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tritium.runtime.request import Request, ScheduledBatch, ScheduledSequence


@dataclass(frozen=True)
class BatchLayout:
    """What the rest of a step needs to know of the batch just written.

    row_slots: the slot of each sampled row. row_positions: the number of tokens before each sampled token, which is its
    position; the counter of its random draw. num_decodes: sequences of one token before the first longer one.
    """

    num_tokens: int
    num_sequences: int
    num_rows: int
    row_slots: np.ndarray
    row_positions: np.ndarray
    num_decodes: int = 0


class BatchInputs:
    """The plan's input tensors by name, and numpy views of them. Addresses never change."""

    def __init__(self, *, max_tokens: int, max_sequences: int, max_rows: int, max_blocks: int, num_groups: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {
            "input_ids": torch.zeros(max_tokens, dtype=torch.int64),
            "positions": torch.zeros(max_tokens, dtype=torch.int64),
            "sampled_rows": torch.zeros(max_rows, dtype=torch.int64),
            "cu_seqlens_q": torch.zeros(max_sequences + 1, dtype=torch.int32),
            "context_lens": torch.zeros(max_sequences, dtype=torch.int32),
            "batch_counts": torch.zeros(4, dtype=torch.int32),
        }
        for group in range(num_groups):
            self.tensors[f"slot_mapping.{group}"] = torch.full((max_tokens,), -1, dtype=torch.int64)
            self.tensors[f"block_table.{group}"] = torch.zeros((max_sequences, max_blocks), dtype=torch.int32)
        self.arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}


class BatchBuilder:
    """Writes scheduled batches into `inputs`. Keeps one host-side block table per slot and group."""

    def __init__(
        self,
        *,
        max_tokens: int,
        max_sequences: int,
        max_rows: int,
        max_model_len: int,
        block_size: int,
        num_groups: int,
    ) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.inputs = BatchInputs(
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            max_rows=max_rows,
            max_blocks=max_blocks,
            num_groups=num_groups,
        )
        self._shift = block_size.bit_length() - 1
        self._mask = block_size - 1
        self._num_groups = num_groups
        self._tables = np.zeros((num_groups, max_sequences, max_blocks), dtype=np.int32)
        self._known_blocks = [[0] * max_sequences for _ in range(num_groups)]
        self._prompts = [np.empty(0, np.int64)] * max_sequences  # tokens that were known when the slot was given
        self._last_slots: list[int] = []
        self._arange = np.arange(max(max_tokens, max_model_len) + 1)

    def admit(self, slot: int, request: Request) -> None:
        """A request received this slot: take its tokens, forget the block table of the slot's last owner."""
        self._prompts[slot] = np.array(request.token_ids, dtype=np.int64)
        for known in self._known_blocks:
            known[slot] = 0

    def build(self, batch: ScheduledBatch, slots: list[int], *, padded_tokens: int, padded_rows: int) -> BatchLayout:
        """Write the batch. Padding up to `padded_tokens` and `padded_rows` is harmless: position 0, slot -1, row 0."""
        arrays, sequences = self.inputs.arrays, batch.sequences
        num_sequences = len(sequences)
        starts = np.array([s.start for s in sequences], dtype=np.int64)
        counts = np.array([s.num_tokens for s in sequences], dtype=np.int64)
        slot_array = np.array(slots, dtype=np.int64)
        ends = np.cumsum(counts)
        num_tokens = int(ends[-1])
        arrays["cu_seqlens_q"][1 : num_sequences + 1] = ends
        np.add(starts, counts, out=arrays["context_lens"][:num_sequences], casting="unsafe")

        positions = arrays["positions"]
        if num_tokens == num_sequences:  # decodes only: token i belongs to sequence i
            token_slots = slot_array
            positions[:num_tokens] = starts
        else:
            owner = np.repeat(self._arange[:num_sequences], counts)
            token_slots = slot_array[owner]
            positions[:num_tokens] = (starts - ends + counts)[owner] + self._arange[:num_tokens]
        positions[num_tokens:padded_tokens] = 0
        self._write_ids(sequences, slots, ends, num_tokens, padded_tokens)
        self._write_blocks(sequences, slots, slot_array, token_slots, positions[:num_tokens], padded_tokens)

        is_longer = counts > 1
        num_decodes = int(is_longer.argmax()) if is_longer.any() else num_sequences
        is_sampled = np.array([s.is_sampled for s in sequences], dtype=bool)
        rows = (ends - 1)[is_sampled]
        arrays["sampled_rows"][: len(rows)] = rows
        arrays["sampled_rows"][len(rows) : padded_rows] = 0
        arrays["batch_counts"][:] = (num_sequences, num_tokens, len(rows), num_decodes)
        row_slots, row_positions = slot_array[is_sampled], (starts + counts)[is_sampled]
        return BatchLayout(num_tokens, num_sequences, len(rows), row_slots, row_positions, num_decodes)

    def _write_ids(
        self,
        sequences: Sequence[ScheduledSequence],
        slots: list[int],
        ends: np.ndarray,
        num_tokens: int,
        padded_tokens: int,
    ) -> None:
        """Single tokens in one write; longer chunks are copied from the slot's own array, one slice each.

        A pending token is written as -1 - slot: the device puts the slot's last token in its place.
        """
        ids = self.inputs.arrays["input_ids"]
        prompts = self._prompts
        is_decode_only = num_tokens == len(sequences)
        single, where = [], []
        for i, (sequence, slot) in enumerate(zip(sequences, slots, strict=True)):
            prompt = prompts[slot]
            if sequence.start >= len(prompt):
                token = sequence.request.token_ids[sequence.start]
                single.append(token if token >= 0 else -1 - slot)
                where.append(i)
            else:
                end = ends[i]
                ids[end - sequence.num_tokens : end] = prompt[sequence.start : sequence.start + sequence.num_tokens]
        if is_decode_only and len(single) == num_tokens:
            ids[:num_tokens] = single
        elif single:
            ids[ends[where] - 1] = single
        ids[num_tokens:padded_tokens] = 0

    def _write_blocks(
        self,
        sequences: Sequence[ScheduledSequence],
        slots: list[int],
        slot_array: np.ndarray,
        token_slots: np.ndarray,
        positions: np.ndarray,
        padded_tokens: int,
    ) -> None:
        """Block tables, where they grew or moved, and each token's slot in the cache."""
        arrays = self.inputs.arrays
        num_tokens = len(positions)
        is_moved = slots != self._last_slots
        self._last_slots = slots
        for group in range(self._num_groups):
            table, known, is_grown, widest = self._tables[group], self._known_blocks[group], is_moved, 0
            for sequence, slot in zip(sequences, slots, strict=True):
                blocks = sequence.request.block_tables[group]
                count, had = len(blocks), known[slot]
                if count != had:
                    is_grown = True
                    first = had if count > had else 0
                    table[slot, first:count] = blocks[first:]
                    known[slot] = count
                widest = max(widest, count)
            if is_grown:
                arrays[f"block_table.{group}"][: len(slots), :widest] = table[slot_array, :widest]
            mapping = arrays[f"slot_mapping.{group}"]
            block_ids = table[token_slots, positions >> self._shift].astype(np.int64)
            mapping[:num_tokens] = (block_ids << self._shift) | (positions & self._mask)
            mapping[num_tokens:padded_tokens] = -1

"""What the builder writes equals what a slow, obvious builder computes from the requests, step after step."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.runtime.batch import BatchBuilder
from tritium.runtime.request import Request, SampledToken
from tritium.runtime.scheduler import Scheduler
from tritium.runtime.scheduler_config import SchedulerConfig
from tritium.runtime.slots import RequestSlots
from tritium.sampling_params import SamplingParams
from tritium.testing.fake_executor import next_token

BLOCK_SIZE = 4
MAX_SEQS = 6


class Rig:
    """Scheduler, slots and builder; every step is compared with the obvious answer."""

    def __init__(self, num_blocks=60, windows=(0, 6)):
        config = SchedulerConfig(
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=16,
            max_model_len=64,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            windows=windows,
        )
        self.scheduler = Scheduler(config)
        self.slots = RequestSlots(MAX_SEQS)
        self.builder = BatchBuilder(
            max_tokens=24, max_sequences=MAX_SEQS, max_rows=8, max_model_len=64, block_size=BLOCK_SIZE, num_groups=2
        )
        self.windows = windows
        self.seen = defaultdict(int)

    def step(self):
        batch = self.scheduler.schedule()
        if not batch.sequences:
            self.scheduler.update(batch, [])
            return
        for slot, request in self.slots.admit(batch):
            self.builder.admit(slot, request)
        padded_tokens, padded_rows = batch.num_tokens + 3, batch.num_sampled + 2
        layout = self.builder.build(batch, self.slots.of(batch), padded_tokens=padded_tokens, padded_rows=padded_rows)
        self.check(batch, layout, padded_tokens, padded_rows)
        self.seen["preempted"] += len(batch.preempted)
        self.seen["mixed"] += len({s.num_tokens for s in batch.sequences}) > 1
        tokens = [SampledToken(next_token(s.request.token_ids)) for s in batch.sequences if s.is_sampled]
        self.scheduler.update(batch, tokens)

    def check(self, batch, layout, padded_tokens, padded_rows):
        arrays = self.builder.inputs.arrays
        ids, positions, ends = [], [], [0]
        mappings = [[] for _ in self.windows]
        for i, (request, start, count, _) in enumerate(batch.sequences):
            ids += request.token_ids[start : start + count]
            positions += range(start, start + count)
            ends.append(ends[-1] + count)
            for group, window in enumerate(self.windows):
                blocks = request.block_tables[group]
                mappings[group] += [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions[-count:]]
                first = max(0, start - window + 1) // BLOCK_SIZE if window else 0  # before it nobody looks
                row = arrays[f"block_table.{group}"][i]
                assert row[first : len(blocks)].tolist() == blocks[first:]
        padding = padded_tokens - len(ids)
        assert arrays["input_ids"][:padded_tokens].tolist() == ids + [0] * padding
        assert arrays["positions"][:padded_tokens].tolist() == positions + [0] * padding
        for group in range(len(self.windows)):
            assert arrays[f"slot_mapping.{group}"][:padded_tokens].tolist() == mappings[group] + [-1] * padding
        assert arrays["cu_seqlens_q"][: len(ends)].tolist() == ends
        lengths = [s.start + s.num_tokens for s in batch.sequences]
        assert arrays["context_lens"][: len(lengths)].tolist() == lengths
        rows = [end - 1 for end, s in zip(ends[1:], batch.sequences, strict=True) if s.is_sampled]
        assert arrays["sampled_rows"][:padded_rows].tolist() == rows + [0] * (padded_rows - len(rows))
        counts = [s.num_tokens for s in batch.sequences]
        singles = next((i for i, count in enumerate(counts) if count > 1), len(counts))
        assert arrays["batch_counts"].tolist() == [len(batch.sequences), len(ids), len(rows), singles]
        assert layout.num_decodes == singles
        assert layout.row_positions.tolist() == [s.request.num_tokens for s in batch.sequences if s.is_sampled]

    def run(self):
        for _ in range(500):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("requests never ended")


def request(request_id, length, max_tokens):
    prompt = [(int(request_id) * 37 + i * 11) % 900 for i in range(length)]
    return Request(request_id, prompt, SamplingParams(max_tokens=max_tokens))


def test_inputs_of_every_step_are_exact_in_mixed_batches():
    rig = Rig()
    for i, (length, outputs) in enumerate([(3, 9), (30, 4), (1, 12), (17, 5), (16, 2), (40, 8), (5, 5)]):
        rig.scheduler.add(request(str(i), length, outputs))
    rig.run()
    assert rig.seen["mixed"] > 0


def test_inputs_stay_exact_after_preemption():
    rig = Rig(num_blocks=26)
    for i in range(5):
        rig.scheduler.add(request(str(i), 8, 30))
    rig.run()
    assert rig.seen["preempted"] > 0


def test_addresses_never_change():
    rig = Rig()
    before = {name: tensor.data_ptr() for name, tensor in rig.builder.inputs.tensors.items()}
    rig.scheduler.add(request("1", 20, 4))
    rig.run()
    assert {name: tensor.data_ptr() for name, tensor in rig.builder.inputs.tensors.items()} == before


@settings(max_examples=40, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 20), st.booleans()), min_size=1, max_size=12
    ),
    num_blocks=st.integers(24, 60),
)
def test_inputs_are_exact_whenever_requests_come_and_go(arrivals, num_blocks):
    rig = Rig(num_blocks=num_blocks)
    for i, (wait, length, outputs, is_aborted) in enumerate(arrivals):
        rig.scheduler.add(request(str(i), length, outputs))
        for _ in range(wait):
            if rig.scheduler.has_work:
                rig.step()
        if is_aborted:
            rig.scheduler.abort(str(i // 2))
    rig.run()


def test_a_slot_is_given_back_when_its_request_ends():
    rig = Rig()
    for i in range(40):
        rig.scheduler.add(request(str(i), 2, 2))
    rig.run()
    assert rig.builder.inputs.arrays["batch_counts"][0] > 0


@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_slot_mapping_holds_for_each_block_size(block_size):
    builder = BatchBuilder(
        max_tokens=8, max_sequences=1, max_rows=1, max_model_len=32, block_size=block_size, num_groups=1
    )
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=1, max_num_batched_tokens=8, max_model_len=32, block_size=block_size, num_blocks=64
        )
    )
    scheduler.add(request("5", 8, 1))
    batch = scheduler.schedule()
    builder.admit(0, batch.sequences[0].request)
    builder.build(batch, [0], padded_tokens=8, padded_rows=1)
    blocks = batch.sequences[0].request.block_tables[0]
    expected = [blocks[p // block_size] * block_size + p % block_size for p in range(8)]
    assert builder.inputs.arrays["slot_mapping.0"].tolist() == expected

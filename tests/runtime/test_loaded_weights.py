"""Weights of an engine in memory: each once, in the form that its steps read."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from tritium.compiler import build
from tritium.runtime.loaded_weights import LoadedWeights
from tritium.testing.plain_models import PlainLlama

PACK = "tritium.kernels.cpu.linear:pack_weight"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    torch.manual_seed(0)
    module = PlainLlama(size=256, num_heads=16, intermediate=512)  # weights of many pages
    return build(module, output_dir=tmp_path_factory.mktemp("engine") / "engine", max_model_len=16)


def resident_bytes(path: Path) -> int:
    """How much of the file is mapped and in this process's memory."""
    parts = re.split(r"^[0-9a-f]+-[0-9a-f]+ ", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    sizes = [int(re.search(r"^Rss: *(\d+) kB", part, re.MULTILINE)[1]) for part in parts if str(path) in part]
    return sum(sizes) * 1024


def matrices(engine):
    return [
        v.name for v in engine.plan.values if v.kind == "weight" and v.shape[1:] and v.shape[0] * v.shape[1] > 40_000
    ]


def test_a_weight_that_was_packed_leaves_memory_and_can_be_read_again(engine):
    weights, names = LoadedWeights(engine), matrices(engine)
    num_bytes = sum(weights.get(name).numel() * 4 for name in names)
    expected = {name: weights.get(name).clone() for name in names}
    weights = LoadedWeights(engine)
    for name in names:
        packed = weights.packed(name, PACK, lambda name=name: weights.get(name))
        assert weights.packed(name, PACK, lambda: pytest.fail("packed twice")) is packed
    assert num_bytes > 1_000_000 and len(names) > 8
    assert resident_bytes(engine.weights_path) < num_bytes / 4 + 2 * mmap.PAGESIZE * len(names)
    assert all(torch.equal(weights.get(name), tensor) for name, tensor in expected.items())


def test_a_weight_that_a_step_reads_as_it_is_stays(engine):
    weights, name = LoadedWeights(engine), matrices(engine)[0]
    plain = weights.get(name)
    assert plain.sum() != 0  # every page is read
    before = resident_bytes(engine.weights_path)
    weights.packed(name, PACK, lambda: weights.get(name))
    assert resident_bytes(engine.weights_path) >= before >= plain.numel() * 4

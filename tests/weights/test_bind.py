"""Binding: what is written is what the recipes say; nothing is written when they cannot be met."""

import hashlib
import resource
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from tritium.errors import CheckpointError, EngineError
from tritium.weights.bind import ALIGNMENT, bind
from tritium.weights.dummy import DummySource
from tritium.weights.recipes import Cast, Checkpoint, Constant, Slice, Transpose, evaluate
from tritium.weights.safetensors import SafetensorsSource
from tritium.weights.source import DictSource, TensorSpec

SOURCE = DictSource({"w": torch.randn(6, 4), "b": torch.randn(6), "t": torch.randn(3, 5)})
RECIPES = {
    "linear.weight": Cast(Slice(Checkpoint("w"), 0, 2, 6), "bfloat16"),
    "linear.bias": Cast(Checkpoint("b"), "float32"),
    "turned": Cast(Transpose(Checkpoint("t")), "float16"),
    "inv_freq": Constant("inv_freq"),
    "unused": Checkpoint("not there"),
}
CONSTANTS = {"inv_freq": torch.rand(7)}
SPECS = {
    "turned": TensorSpec("float16", (5, 3)),
    "linear.weight": TensorSpec("bfloat16", (4, 4)),
    "inv_freq": TensorSpec("float32", (7,)),
    "linear.bias": TensorSpec("float32", (6,)),
}


def test_the_file_holds_every_weight_in_order(tmp_path):
    path, calls = tmp_path / "weights.safetensors", []
    written = bind(RECIPES, SPECS, SOURCE, path, constants=CONSTANTS, progress=lambda *call: calls.append(call))
    found = load_file(path)
    assert list(SafetensorsSource(path).names) == list(SPECS)
    assert set(found) == set(SPECS)
    for name, tensor in found.items():
        assert torch.equal(tensor, evaluate(RECIPES[name], SOURCE, CONSTANTS))
    assert written == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % ALIGNMENT == 0
    assert calls == [("turned", 30, 114), ("linear.weight", 62, 114), ("inv_freq", 90, 114), ("linear.bias", 114, 114)]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"linear.weight": TensorSpec("bfloat16", (6, 4))}, CheckpointError,
         r"'linear.weight' = cast\(slice\(w, .*\), bfloat16\) is bfloat16 \[4, 4\], expected bfloat16 \[6, 4\]"),
        ({"linear.bias": TensorSpec("bfloat16", (6,))}, CheckpointError, "is float32 .*, expected bfloat16"),
        ({"nothing": TensorSpec("float32", (1,))}, EngineError, "weight 'nothing' has no recipe"),
        ({"unused": TensorSpec("float32", (1,))}, CheckpointError, "tensor 'not there' is missing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_a_file_is_made(tmp_path, change, kind, message):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(kind, match=message):
        bind(RECIPES, SPECS | change, SOURCE, path, constants=CONSTANTS)
    assert not path.exists()


def test_a_disk_too_small_is_refused_before_a_file_is_made(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 1, 99))
    with pytest.raises(
        EngineError, match=r"weights\.safetensors: the weights take \d+ bytes, the disk has 99 bytes free"
    ):
        bind(RECIPES, SPECS, SOURCE, path, constants=CONSTANTS)
    assert not path.exists()


def test_a_write_that_fails_half_way_is_an_engine_error_and_leaves_no_readable_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    specs = {name: TensorSpec("float32", (4096,)) for name in "abcd"}
    recipes = {name: Checkpoint(name, (4096,)) for name in specs}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
        with pytest.raises(
            EngineError, match=r"could not be written after 32768 of 65536 bytes of weights: .*File too large"
        ):
            bind(recipes, specs, DummySource(specs), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(CheckpointError, match="download it again"):
        SafetensorsSource(path)


def test_an_existing_file_is_not_overwritten(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_text("mine")
    with pytest.raises(EngineError, match="File exists"):
        bind(RECIPES, SPECS, SOURCE, path, constants=CONSTANTS)
    assert path.read_text() == "mine"


def test_one_weight_is_in_memory_at_a_time(tmp_path):
    specs = {f"w{i}": TensorSpec("float32", (1000,)) for i in range(20)}
    alive, most = weakref.WeakSet(), []

    class Counted(DummySource):
        def get(self, name):
            most.append(len(alive))
            tensor = super().get(name)
            alive.add(tensor)
            return tensor

    bind({name: Checkpoint(name) for name in specs}, specs, Counted(specs), tmp_path / "weights.safetensors")
    assert len(most) == 20 and max(most) <= 1

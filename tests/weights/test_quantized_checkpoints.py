"""Checkpoints that others quantised: every weight is what its format says, and engines keep what kernels can take."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tritium.calibrate.engine_logits import EngineLogits
from tritium.compiler import build
from tritium.engine.engine import Engine
from tritium.errors import CheckpointError, ConfigError, UnsupportedModel
from tritium.testing.quantized_checkpoints import (
    Writer,
    awq_writer,
    fp8_writer,
    gptq_writer,
    int8_writer,
    packed_writer,
    plain_of,
    quantize_checkpoint,
)
from tritium.testing.tiny_models import make_checkpoint, random_prompt, relative_error
from tritium.weights.checkpoint_files import open_checkpoint

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
INTEGERS = COMPRESSED | {"format": "int-quantized"}
FP8 = {"quant_method": "fp8"}
# configuration, how weights are written, and the dtype in which an engine keeps a linear's weight
CASES: dict[str, tuple[dict[str, Any], Writer, str]] = {
    "awq": (AWQ, awq_writer(32, None), "float32"),
    "awq-symmetric": (AWQ, awq_writer(32, 8), "uint8"),
    "gptq": (GPTQ, gptq_writer(32, None), "float32"),
    "gptq-symmetric": (GPTQ, gptq_writer(32, 8), "uint8"),
    "gptq-act-order": (GPTQ | {"desc_act": True}, gptq_writer(32, 8, is_act_order=True), "float32"),
    "gptq-v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq_writer(32, None, is_v2=True), "float32"),
    "gptq-8-bit": (GPTQ | {"bits": 8}, gptq_writer(32, 128, bits=8), "float32"),
    "packed": (COMPRESSED, packed_writer(32, 8), "uint8"),
    "packed-zeros": (COMPRESSED, packed_writer(32, None), "float32"),
    "packed-act-order": (COMPRESSED, packed_writer(32, 8, has_order=True), "float32"),
    "packed-8-bit": (COMPRESSED, packed_writer(0, 128, bits=8), "int8"),
    "int8": (INTEGERS, int8_writer(has_zeros=False), "int8"),
    "int8-zeros": (INTEGERS, int8_writer(has_zeros=True), "float32"),
    "fp8": (FP8, fp8_writer("channel"), "float32"),
    "fp8-tensor": (COMPRESSED | {"format": "float-quantized"}, fp8_writer("tensor"), "float32"),
    "fp8-block": (FP8 | {"weight_block_size": [48, 48]}, fp8_writer("block"), "float32"),
}
QUICK = ("awq", "gptq-symmetric", "packed", "int8", "fp8")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "llama")


@pytest.fixture(scope="module")
def checkpoints(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    return {name: quantize_checkpoint(plain, root / name, c, w) for name, (c, w, _) in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_each_weight_is_exactly_what_the_format_says(name: str, checkpoints: dict[str, Path]) -> None:
    source, expected = open_checkpoint(checkpoints[name]), load_file(plain_of(checkpoints[name]) / "model.safetensors")
    assert set(source.names) == set(expected)
    for tensor in expected:
        assert torch.equal(source.get(tensor).float(), expected[tensor]), tensor
        assert source.spec(tensor).shape == tuple(expected[tensor].shape)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_an_engine_has_the_dequantised_models_logits_and_keeps_what_kernels_take(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    path = checkpoints[name]
    ours = build(path, output_dir=tmp_path / "ours", dtype="float32")
    dequantised = build(plain_of(path), output_dir=tmp_path / "plain", dtype="float32")
    kinds = {step.op: value_dtype(ours, step) for step in ours.plan.steps if step.op.endswith("linear")}
    kept = CASES[name][2]
    assert kinds.get("quantized_linear", kinds["linear"]) == kept
    prompt = random_prompt(20)
    found, expected = (EngineLogits(engine, 32).logits(prompt) for engine in (ours, dequantised))
    if kept == "float32":
        assert torch.equal(found, expected)
    # kept 4-bit scales count in steps, 2048ths of an output's largest one: each is off by up to 1/4096 of that
    assert relative_error(found, expected) < (5e-3 if kept == "uint8" else 2e-5)


def value_dtype(engine: Engine, step: Any) -> str:
    weight = step.args["weight_NK" if step.op == "linear" else "qweight"].value
    return engine.plan.value(weight).dtype


def test_a_scheme_of_the_same_format_keeps_the_checkpoints_numbers(checkpoints, tmp_path) -> None:
    kept = build(checkpoints["packed"], output_dir=tmp_path / "kept")
    scheme = build(checkpoints["packed"], output_dir=tmp_path / "scheme", scheme="w4a8_g32")
    of_kept, of_scheme = (load_file(engine.weights_path) for engine in (kept, scheme))
    names = [name for name in of_kept if name.endswith(".int4")]
    assert names and all(torch.equal(of_kept[name], of_scheme[name]) for name in names)


def test_a_refit_takes_a_checkpoint_of_the_same_kind(checkpoints, plain, tmp_path) -> None:
    config, writer, _ = CASES["gptq-symmetric"]
    other = make_checkpoint(tmp_path / "other", seed=5)
    quantised = quantize_checkpoint(other, tmp_path / "quantised", config, writer)
    refit = build(checkpoints["gptq-symmetric"], output_dir=tmp_path / "engine").refit(quantised)
    fresh = build(quantised, output_dir=tmp_path / "fresh")
    assert refit.weights_path.read_bytes() == fresh.weights_path.read_bytes()


def changed(path: Path, tmp_path: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
    """A copy with other fields in its quantization_config, and other tensors in layer 0's q_proj."""
    copy = tmp_path / "changed"
    copy.mkdir()
    data = json.loads((path / "config.json").read_text())
    data["quantization_config"] |= config or {}
    (copy / "config.json").write_text(json.dumps(data))
    state = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        full = f"model.layers.0.self_attn.q_proj.{name}"
        if tensor is None:
            del state[full]
        else:
            state[full] = tensor
    save_file(state, copy / "model.safetensors")
    return copy


INT32 = torch.int32
REFUSED = {
    "unknown-method": (
        "awq",
        {"quant_method": "bitsandbytes"},
        {},
        r"quant_method is 'bitsandbytes'; read are awq, gptq",
    ),
    "no-method": ("awq", {"quant_method": None}, {}, r"quant_method is None; read are awq"),
    "gemv": ("awq", {"version": "gemv"}, {}, r"version is 'gemv'; of AWQ only the 'gemm' layout"),
    "3-bits": ("gptq", {"bits": 3}, {}, r"quantization_config.bits is 3; read: 4, 8"),
    "a-list-of-bits": ("gptq", {"bits": [4]}, {}, r"quantization_config.bits is \[4\]; read: 4, 8"),
    "group-of-0": ("gptq", {"group_size": 0}, {}, r"group_size is 0, expected -1 or a positive number"),
    "group-of-25": ("gptq", {"group_size": 25}, {}, r"has \d+ inputs, which are no multiple of .*group_size = 25"),
    "another-group": ("awq", {"group_size": 16}, {}, r"qzeros' is int32 .*, expected int32 "),
    "float-words": (
        "awq",
        {},
        {"qweight": torch.zeros(64, 8)},
        r"qweight' is float32 \[64, 8\], expected int32 of rank 2",
    ),
    "no-words": (
        "gptq",
        {},
        {"qweight": torch.zeros(0, 8, dtype=INT32)},
        r"qweight' is int32 \[0, 8\], expected int32",
    ),
    "no-zeros": ("awq", {}, {"qzeros": None}, r"q_proj.qzeros' is missing"),
    "integer-scales": (
        "gptq",
        {},
        {"scales": torch.zeros(2, 64, dtype=INT32)},
        r"scales' is int32 \[2, 64\], expected float",
    ),
    "far-group": (
        "gptq",
        {},
        {"g_idx": torch.full((64,), 7, dtype=INT32)},
        r"g_idx' names groups 7 to 7, but there are 2",
    ),
    "negative-group": ("gptq", {}, {"g_idx": torch.full((64,), -1, dtype=INT32)}, r"names groups -1 to -1, but there"),
    "short-g-idx": (
        "gptq",
        {},
        {"g_idx": torch.zeros(3, dtype=INT32)},
        r"g_idx' is int32 \[3\], expected int32 or int64 \[64\]",
    ),
    "sparse": (
        "packed",
        {"format": "marlin-24"},
        {},
        r"quantization_config.format is 'marlin-24'; read: 'pack-quantized'",
    ),
    "transformed": ("packed", {"transform_config": {"a": 1}}, {}, r"transform_config is \{'a': 1\}; only plain ones"),
    "huge-shape": (
        "packed",
        {},
        {"weight_shape": torch.tensor([64, 1 << 60])},
        r"its weight_shape says \[64, 1152921504606846976\]",
    ),
    "other-rows": (
        "packed",
        {},
        {"weight_shape": torch.tensor([63, 64])},
        r"is \[64, 8\], but its weight_shape says \[63, 64\]",
    ),
    "no-scale": ("packed", {}, {"weight_scale": None}, r"q_proj.weight_scale' is missing"),
    "odd-scale": (
        "packed",
        {},
        {"weight_scale": torch.ones(64, 3)},
        r"is float32 \[64, 3\], expected floating-point scales",
    ),
    "packed-far-group": (
        "packed-act-order",
        {},
        {"weight_g_idx": torch.full((64,), 2)},
        r"names groups 2 to 2, but there",
    ),
    "bad-block": ("fp8-block", {"weight_block_size": [0, 1]}, {}, r"weight_block_size is \[0, 1\], expected two sizes"),
    "other-block": (
        "fp8-block",
        {"weight_block_size": [32, 32]},
        {},
        r"weight_scale_inv' is float32 .*, expected float16",
    ),
    "int8-zero-shape": (
        "int8-zeros",
        {},
        {"weight_zero_point": torch.zeros(3, 1, dtype=torch.int8)},
        r"is int8 \[3, 1\], expected",
    ),
    "e5m2": ("fp8", {"fmt": "e5m2"}, {}, r"quantization_config.fmt is 'e5m2'; read: 'e4m3'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_error_that_names_the_file_and_the_value(
    case: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    name, config, tensors, message = REFUSED[case]
    path = changed(checkpoints[name], tmp_path, config, **tensors)
    with pytest.raises((CheckpointError, UnsupportedModel), match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_a_configuration_of_quantised_weights_over_plain_ones_is_refused(plain: Path, tmp_path: Path) -> None:
    data = json.loads((plain / "config.json").read_text()) | {"quantization_config": GPTQ}
    (tmp_path / "config.json").write_text(json.dumps(data))
    save_file(load_file(plain / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"says the weights are quantised by 'gptq', but .* has no such tensors"):
        open_checkpoint(tmp_path)


def test_a_weight_that_is_there_twice_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = changed(checkpoints["awq"], tmp_path, weight=torch.zeros(64, 64))
    with pytest.raises(CheckpointError, match=r"holds '.*q_proj.weight' both quantised and as a plain .*; download it"):
        open_checkpoint(path)


def test_a_list_where_the_configuration_should_be_is_refused(plain: Path, tmp_path: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    shutil.copy(plain / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": [4]}))
    with pytest.raises(CheckpointError, match=r"config.json: quantization_config is a list, expected an object"):
        open_checkpoint(tmp_path)


def test_ranks_do_not_share_what_is_kept_quantised(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    message = r"tensor_parallel=2: '.*' is kept quantised, which ranks cannot share: give them the unquantised model"
    with pytest.raises(ConfigError, match=message):
        build(checkpoints["gptq-symmetric"], output_dir=tmp_path / "engine", tensor_parallel=2)


def test_older_gptq_checkpoints_say_it_in_a_file_of_their_own(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = checkpoints["gptq"]
    data = json.loads((path / "config.json").read_text())
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    del data["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    save_file(load_file(path / "model.safetensors"), tmp_path / "model.safetensors")
    ours, theirs = open_checkpoint(tmp_path), open_checkpoint(path)
    assert all(torch.equal(ours.get(name), theirs.get(name)) for name in theirs.names)

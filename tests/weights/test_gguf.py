"""GGUF files: blocks as the `gguf` package reads them, a tiny Llama's logits, and headers that lie."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tritium import LLM, SamplingParams
from tritium.calibrate.engine_logits import EngineLogits
from tritium.compiler import build
from tritium.errors import CheckpointError, RequestError, UnsupportedModel
from tritium.testing.gguf_files import gguf_names, write_gguf
from tritium.testing.tiny_configs import LLAMA
from tritium.testing.tiny_models import make_checkpoint, random_prompt, relative_error, write_tensors
from tritium.weights.checkpoint_files import open_checkpoint
from tritium.weights.gguf_blocks import TYPES
from tritium.weights.gguf_file import read_gguf_header

CONFIG = LLAMA | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}  # a block of Q4_K is 256 wide
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")
QUICK = ("F16", "Q4_0", "Q6_K")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "llama", CONFIG)


@pytest.fixture(scope="module")
def file(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("file") / "model.gguf", plain, "F32")


@pytest.mark.parametrize("number", TYPES)
def test_blocks_of_any_bytes_are_the_numbers_that_the_gguf_package_reads(number: int) -> None:
    kind = TYPES[number]
    generator = torch.Generator().manual_seed(number)
    blocks = torch.randint(0, 256, (64, kind.num_bytes), dtype=torch.uint8, generator=generator)
    found = kind.decode(blocks)
    expected = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(number))
    np.testing.assert_array_equal(found.flatten().numpy(), expected.astype(np.float32).flatten())


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.full) for k in KINDS])
def test_an_engine_has_the_logits_of_what_the_blocks_stand_for(kind: str, plain: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", plain, kind)
    tensors = {name: tensor.clone() for name, tensor in load_file(plain / "model.safetensors").items()}
    for name, tensor in gguf_names(tensors, path).items():
        tensors[name] = tensor
    expected_dir = tmp_path / "expected"
    expected_dir.mkdir()
    (expected_dir / "config.json").write_bytes((plain / "config.json").read_bytes())
    write_tensors(expected_dir, tensors)
    source = open_checkpoint(path)
    assert all(torch.equal(source.get(name).float(), tensors[name]) for name in tensors)
    ours = build(path, output_dir=tmp_path / "ours", dtype="float32")
    theirs = build(expected_dir, output_dir=tmp_path / "theirs", dtype="float32")
    is_kept = any(step.op == "quantized_linear" for step in ours.plan.steps)
    assert is_kept == (kind == "Q4_0") and ours.manifest.eos_token_ids == (2,)
    found, expected = (EngineLogits(engine, 32).logits(random_prompt(20)) for engine in (ours, theirs))
    # the scales of kept 4-bit weights are rounded to bfloat16
    assert relative_error(found, expected) < 0.02 if is_kept else torch.equal(found, expected)


def test_a_prompt_of_text_says_where_the_tokenizer_of_a_file_belongs(file: Path) -> None:
    with LLM(file, max_num_seqs=1, max_num_batched_tokens=8) as llm:
        message = r"a prompt of text needs a tokenizer; pass token ids: .* has no tokenizer.json; put the one .*gguf"
        with pytest.raises(RequestError, match=message):
            llm.generate(["text"], use_progress=False)
        (answer,) = llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True), use_progress=False)
        assert len(answer.outputs[0].token_ids) == 2


def test_rope_factors_need_the_published_configuration(plain: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", plain, "F32", rope_factors=True)
    with pytest.raises(UnsupportedModel, match=r"has tensor 'rope_freqs.weight', .* put the config.json .* beside it"):
        build(path, output_dir=tmp_path / "engine")
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    assert build(path, output_dir=tmp_path / "engine").manifest.vocab_size == LLAMA["vocab_size"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "mamba"}, r"general.architecture is 'mamba'; of GGUF files the 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope.scaling.type is 'yarn'; 'linear' is read from metadata"),
        ({"llama.block_count": 0}, r"field 'llama.block_count' is 0, expected a number from 1 to 65536"),
        ({"llama.attention.head_count": 1 << 31}, r"'llama.attention.head_count' is 2147483648, expected a number"),
        ({"llama.attention.head_count": 3}, r"q_proj.weight' is \[256, 256\], which 3 heads with an even size cannot"),
        ({"llama.rope.dimension_count": 32}, r"rope.dimension_count is 32, but a head has 64"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, r"'rms_norm_eps' is nan"),
        ({"general.alignment": 24}, r"general.alignment is 24, expected a power of two"),
        (
            {"llama.embedding_length": 128},
            r"is \[199, 256\], expected",
        ),
    ],
)
def test_metadata_that_cannot_be_is_refused_by_field_and_value(fields, message, plain, tmp_path) -> None:
    path = write_gguf(tmp_path / "model.gguf", plain, "F32", fields=fields)
    with pytest.raises((CheckpointError, UnsupportedModel), match=message) as error:
        build(path, output_dir=tmp_path / "engine")
    assert str(path) in str(error.value)


def header(*, version: int = 3, tensors: int = 0, fields: int = 0, rest: bytes = b"", magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, fields) + rest + bytes(64)


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def tensor(name: bytes = b"t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


FAR = 1 << 63
HOSTILE = {
    "empty": (b"", "is 0 bytes long, too short"),
    "other-magic": (header(magic=b"GGML"), "starts with b'GGML', not b'GGUF'"),
    "version-1": (header(version=1), "is GGUF version 1; versions 2 and 3"),
    "big-endian": (header(version=3 << 24), "is GGUF version 50331648"),
    "many-tensors": (
        header(tensors=FAR),
        "says it has 9223372036854775808 tensors, for which its 88 bytes have no room",
    ),
    "many-fields": (header(fields=FAR), "says it has 9223372036854775808 fields, for which"),
    "long-name": (
        header(fields=1, rest=text(b"", FAR)),
        "the name of a field is 9223372036854775808 bytes long",
    ),
    "name-past-the-end": (
        header(fields=1, rest=text(b"", 4000)),
        "name of a field has 4000 bytes at byte 32, but the",
    ),
    "no-utf8": (header(fields=1, rest=text(b"\xff\xfe")), "name of a field at byte 32 is not UTF-8"),
    "unknown-type": (
        header(fields=1, rest=text(b"a") + struct.pack("<I", 99)),
        "field 'a' is of unknown type 99",
    ),
    "long-text": (
        header(fields=1, rest=text(b"a") + struct.pack("<IQ", 8, FAR)),
        "field 'a' is 9223372036854775808",
    ),
    "long-array": (
        header(fields=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, FAR)),
        "field 'a' has 36893488147419103232",
    ),
    "many-strings": (
        header(fields=1, rest=text(b"a") + struct.pack("<IIQ", 9, 8, FAR)),
        "strings of field 'a', for which",
    ),
    "nested-array": (
        header(fields=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 1)),
        "field 'a' is of unknown type 9",
    ),
    "twice": (header(fields=2, rest=(text(b"a") + struct.pack("<IB", 0, 1)) * 2), "names 'a' twice"),
    "no-dims": (header(tensors=1, rest=tensor(dims=())), "tensor 't' has 0 dimensions, not 1 to 4"),
    "many-dims": (header(tensors=1, rest=text(b"t") + struct.pack("<I", 1 << 31)), "has 2147483648 dimensions"),
    "ggml-type": (
        header(tensors=1, rest=tensor(kind=3)),
        "tensor 't' is of ggml type 3; read are F32, F16, Q4_0",
    ),
    "no-size": (header(tensors=1, rest=tensor(dims=(0,))), r"of type F32 has sizes \[0\]"),
    "huge-size": (
        header(tensors=1, rest=tensor(dims=(1 << 62, 4))),
        r"of type F32 has sizes \[4611686018427387904, 4\]",
    ),
    "half-a-block": (header(tensors=1, rest=tensor(dims=(33,), kind=2)), "must be a multiple of 32"),
    "past-the-end": (header(tensors=1, rest=tensor(dims=(1 << 20,))), "takes bytes 64 to 4194368 of 121"),
    "far-offset": (header(tensors=1, rest=tensor(offset=FAR)), "tensor 't' takes bytes 9223372036854775872"),
    "odd-offset": (
        header(tensors=1, rest=tensor(dims=(4,), offset=1)),
        r"tensor 't' takes bytes 65 to .*multiples of 32",
    ),
    "overlap": (header(tensors=2, rest=tensor(b"a", (8,)) + tensor(b"b", (8,))), "the one before it ends at"),
    "cut-off": (header(tensors=1, rest=b"")[:30], "says it has 1 tensors, for which its 30 bytes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies_is_one_error_that_names_the_file(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises((CheckpointError, UnsupportedModel), match=message) as error:
        read_gguf_header(path)
    assert str(path) in str(error.value)


def test_no_cut_and_no_changed_byte_does_more_than_raise_an_error_of_ours(file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "model.gguf"
    for at in torch.randint(0, 1500, (300,), generator=generator).tolist():
        broken = bytearray(data[: 200_000 + at])
        broken[at] ^= 1 << (at % 8)
        path.write_bytes(broken if at % 2 else data[:at])
        with pytest.raises((CheckpointError, UnsupportedModel)):
            open_checkpoint(path)


def test_a_tensor_that_the_architecture_does_not_have_is_named(tmp_path: Path) -> None:
    known = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    for name in (b"llama.attention.head_count", b"llama.attention.head_count_kv", b"llama.block_count"):
        known += text(name) + struct.pack("<II", 4, 1)
    path = tmp_path / "model.gguf"
    path.write_bytes(header(tensors=1, fields=4, rest=known + tensor(b"blk.0.ffn_gate_exps.weight", (8,))))
    with pytest.raises(UnsupportedModel, match=r"'blk.0.ffn_gate_exps.weight' is none of a llama model's; .* use"):
        open_checkpoint(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing.gguf does not exist: expected .* a .gguf file"):
        build(tmp_path / "missing.gguf", output_dir=tmp_path / "engine")

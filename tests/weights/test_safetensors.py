"""Files that are not what they say: refused when opened, with file and tensor named, before tensor memory is taken."""

import contextlib
import itertools
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tritium.errors import CheckpointError
from tritium.testing import tiny_models as tiny
from tritium.weights.safetensors import SafetensorsSource

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3) + 0.5,
    "c.bias": torch.arange(5, dtype=torch.float16),
    "mask": torch.tensor([True, False, True]),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def error_of(path):
    with pytest.raises(CheckpointError) as caught:
        SafetensorsSource(path.parent)
    assert str(caught.value).startswith(str(path.parent))
    return str(caught.value)


def patch(path, position, value):
    with path.open("r+b") as file:
        file.seek(position)
        file.write(bytes([value]))


def is_unchanged(source):
    return set(source.names) == set(TENSORS) and all(torch.equal(source.get(n), t) for n, t in TENSORS.items())


def test_every_tensor_is_read_as_it_was_written(path):
    source = SafetensorsSource(path.parent)
    assert is_unchanged(source)
    assert source.spec("b.weight") == ("bfloat16", (2, 3))
    assert source.where("mask") == str(path)


def test_a_tensor_at_an_odd_offset_is_read_right(tmp_path):
    header = {
        "u": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "f": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [9, 9]},
    }
    write(tmp_path / "model.safetensors", header, b"\x07" + struct.pack("<2f", 1.5, -2.0))
    source = SafetensorsSource(tmp_path)
    assert source.get("f").tolist() == [1.5, -2.0]
    assert source.get("empty").shape == (0, 4)


def test_writing_to_a_tensor_never_reaches_the_file(path):
    before = path.read_bytes()
    SafetensorsSource(path.parent).get("a.weight").fill_(7)
    assert path.read_bytes() == before


def test_a_missing_tensor_names_the_nearest(path):
    with pytest.raises(
        CheckpointError, match=r"tensor 'a.wieght' is missing \(4 tensors are there; nearest: 'a.weight'"
    ):
        SafetensorsSource(path.parent).get("a.wieght")


def test_a_file_cut_anywhere_is_refused(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert str(path) in error_of(path)


def test_a_file_with_bytes_too_many_is_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    assert "its tensors end at byte" in error_of(path)


def test_any_flipped_bit_of_length_and_header_is_refused_or_harmless_or_renames_a_tensor(path):
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for position, bit in itertools.product(range(end), range(8)):
        patch(path, position, whole[position] ^ 1 << bit)
        try:
            source = SafetensorsSource(path.parent)
            assert set(source.names) != set(TENSORS) or is_unchanged(source), (position, bit)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
        patch(path, position, whole[position])
    assert refused > 4 * end


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10**6])
def test_an_absurd_header_length_is_refused_before_it_is_read(tmp_path, length):
    path = write(tmp_path / "model.safetensors", {}, length=length)
    assert f"says its header is {length} bytes long, but the file has 10 bytes" in error_of(path)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": F32, "y": {**F32, "data_offsets": [4, 12]}}, "tensor 'y' starts at byte"),
        ({"x": F32, "y": F32}, "overlaps the tensor before it"),
        ({"x": {**F32, "data_offsets": [8, 16]}}, "leaves a gap before it"),
        ({"x": {**F32, "data_offsets": [0, 4]}}, "takes bytes 0 to 4, but F32 [2] takes 8 bytes"),
        ({"x": {**F32, "data_offsets": [8, 0]}}, "takes bytes 8 to 0"),
        ({"x": {**F32, "data_offsets": [-8, 0]}}, "tensor 'x' has shape [2] and offsets [-8, 0]"),
        ({"x": {**F32, "shape": [-2]}}, "tensor 'x' has shape [-2]"),
        ({"x": {**F32, "shape": [2**40, 2**40]}}, "takes bytes 0 to 8, but F32"),
        ({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "ends at byte"),
        ({"x": {**F32, "shape": [2**70]}}, "has shape [1180591620717411303424]"),
        ({"x": {**F32, "shape": [2.0]}}, "has shape [2.0]"),
        ({"x": {**F32, "shape": [True, 2]}}, "has shape [True, 2]"),
        ({"x": {**F32, "shape": "2"}}, "has shape 2"),
        ({"x": {**F32, "shape": [1] * 65}}, "tensor 'x' has shape [1, 1, "),
        ({"x": {**F32, "dtype": "Q4"}}, "tensor 'x' has dtype 'Q4'"),
        ({"x": {**F32, "dtype": ["F32"]}}, "tensor 'x' has dtype ['F32']"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "tensor 'x' is described by"),
        ({"x": {**F32, "data_offsets": [0, 4, 8]}}, "tensor 'x' is described by"),
        ({"x": [1, 2]}, "tensor 'x' is described by"),
        ({"x": None}, "tensor 'x' is described by"),
        ([1], "the header is a list"),
        (b"not json", "the header is not JSON"),
        (b"\xff\xfe{}", "the header is not JSON"),
        (b"[" * 100_000, "the header is not JSON"),
        (b'{"x": 1, "x": 2}', "names 'x' twice"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_header_that_lies_is_refused_with_the_tensor_it_lies_about(tmp_path, header, message):
    assert message in error_of(write(tmp_path / "model.safetensors", header, b"\0" * 16))


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1) | st.none())
def test_any_bytes_are_read_or_refused_by_design(tmp_path_factory, data, length):
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    write(path, data, length=length)
    with contextlib.suppress(CheckpointError):
        assert list(SafetensorsSource(path.parent).names) == []


@pytest.fixture
def sharded(tmp_path):
    return tiny.make_checkpoint(tmp_path, num_shards=3)


def edit_index(path, change):
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def shard_error(path):
    with pytest.raises(CheckpointError) as caught:
        SafetensorsSource(path)
    return str(caught.value)


def test_shards_hold_what_one_file_holds(sharded, tmp_path_factory):
    single = SafetensorsSource(tiny.make_checkpoint(tmp_path_factory.mktemp("single")))
    source = SafetensorsSource(sharded)
    assert set(source.names) == set(single.names)
    assert all(torch.equal(source.get(name), single.get(name)) for name in single.names)


def test_a_missing_shard_names_itself_and_a_tensor(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    message = shard_error(sharded)
    assert "model-00002-of-00003.safetensors: this shard is missing" in message
    assert "10 tensors in it, e.g. 'model.layers." in message


def test_a_damaged_shard_names_itself(sharded):
    shard = sharded / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert str(shard) in shard_error(sharded)


def test_an_index_that_places_a_tensor_in_the_wrong_shard_is_refused(sharded):
    edit_index(sharded, lambda places: places.update({"lm_head.weight": "model-00001-of-00003.safetensors"}))
    message = shard_error(sharded)
    assert "places tensor 'lm_head.weight' in model-00001-of-00003.safetensors, which does not hold it" in message


def test_a_tensor_in_two_shards_is_refused(sharded):
    source = SafetensorsSource(sharded)
    doubled = {name: source.get(name).clone() for name in source.names}
    save_file(doubled, sharded / "model-00002-of-00003.safetensors")
    assert "is also in model-0000" in shard_error(sharded)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", 7, None])
def test_an_index_cannot_point_outside_the_directory(sharded, place):
    edit_index(sharded, lambda places: places.update({"lm_head.weight": place}))
    assert f"places tensor 'lm_head.weight' in {place!r}; expected a .safetensors file" in shard_error(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_damaged_index_is_named(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in shard_error(sharded)


def test_a_directory_without_weights_says_what_is_wanted(tmp_path):
    assert "has neither model.safetensors nor model.safetensors.index.json" in shard_error(tmp_path)
    assert "there is no such directory" in shard_error(tmp_path / "nowhere")


def test_a_directory_in_another_layout_says_so(tmp_path):
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert "consolidated.safetensors, which is not the Hugging Face layout" in shard_error(tmp_path)


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    message = shard_error(tmp_path)
    assert "pytorch_model.bin, a pickle" in message
    assert f"M.from_pretrained('{tmp_path}', dtype='auto').save_pretrained('{tmp_path}-safetensors')" in message

"""GGUF files as a checkpoint: tensors under the names that Hugging Face's Llama has for them.

The rows of q and k are put back in Hugging Face's order: a GGUF file has the two halves of a head's rotary dimensions
interleaved. 4-bit tensors (Q4_0) can be taken as they are, groups of 32 with one scale.
"""

import mmap
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritium.errors import CheckpointError, UnsupportedModel
from tritium.quant.schemes import WeightFormat
from tritium.weights.gguf_blocks import q4_0_numbers
from tritium.weights.gguf_file import AGAIN, GgufTensor, read_gguf_header
from tritium.weights.safetensors import NO_RESERVE
from tritium.weights.source import TensorSpec, missing_tensor
from tritium.weights.stored import Codes, QuantizedSource, StoredWeight

ARCHITECTURE = "llama"  # Llama, Mistral and what else has their layers
NAMES = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": "model.layers.{}.input_layernorm.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": "model.layers.{}.post_attention_layernorm.weight",
    r"blk\.(\d+)\.attn_([qkv])\.(weight|bias)": "model.layers.{}.self_attn.{}_proj.{}",
    r"blk\.(\d+)\.attn_output\.(weight|bias)": "model.layers.{}.self_attn.o_proj.{}",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)": "model.layers.{}.mlp.{}_proj.{}",
}
ROTATED = re.compile(r".*\.self_attn\.([qk])_proj\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"
Q4_0_FORMAT = WeightFormat("int4", 32)


class GgufSource:
    """The tensors of a .gguf file, those of block types in fp32. Raises `CheckpointError` for a damaged header.

    has_rope_factors: the file holds factors for the rotary frequencies, which are no weight.
    """

    def __init__(self, path: Path) -> None:
        header = read_gguf_header(path)
        self.path, self.fields = path, header.fields
        if (found := header.fields.get("general.architecture")) != ARCHITECTURE:
            raise UnsupportedModel(
                f"{path}: general.architecture is {found!r:.60}; of GGUF files the {ARCHITECTURE!r} architecture "
                "is read"
            )
        self._heads = {"q": self.number("attention.head_count", 1, 1 << 16)}
        self._heads["k"] = self.number("attention.head_count_kv", 1, 1 << 16, default=self._heads["q"])
        self.has_rope_factors = header.tensors.pop(ROPE_FACTORS, None) is not None
        self.tensors = {_name(path, name): tensor for name, tensor in header.tensors.items()}
        for name, tensor in self.tensors.items():
            if (match := ROTATED.fullmatch(name)) and tensor.shape[0] % (2 * self._heads[match[1]]):
                raise CheckpointError(
                    f"{path}: tensor {name!r} is {list(tensor.shape)}, which {self._heads[match[1]]} heads with an "
                    f"even size cannot have; {AGAIN}"
                )
        with path.open("rb") as file:
            protection = mmap.PROT_READ | mmap.PROT_WRITE  # torch wants it so; private: nothing is written back
            self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=protection)

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def where(self, name: str) -> str:
        return str(self.path)

    def spec(self, name: str) -> TensorSpec:
        tensor = self._find(name)
        return TensorSpec(tensor.type.dtype or "float32", tensor.shape)

    def get(self, name: str) -> Tensor:
        tensor = self._find(name)
        decoded = tensor.type.decode(self.blocks(name)).view(tensor.shape)
        return self.in_order(name, decoded.to(getattr(torch, tensor.type.dtype or "float32")))

    def blocks(self, name: str) -> Tensor:
        """uint8 [blocks, bytes of a block], a view of the file."""
        tensor = self._find(name)
        data = torch.frombuffer(self._map, dtype=torch.uint8, offset=tensor.begin, count=tensor.end - tensor.begin)
        return data.view(-1, tensor.type.num_bytes)

    def in_order(self, name: str, tensor: Tensor) -> Tensor:
        """Rows of q and k as Hugging Face has them."""
        if not (match := ROTATED.fullmatch(name)):
            return tensor
        pairs = tensor.unflatten(0, (self._heads[match[1]], -1, 2))
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def number(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number of the header, `llama.` before its name, within bounds."""
        value = self.field(name, default)
        if type(value) is not int or not low <= value <= high:
            raise CheckpointError(
                f"{self.path}: field '{ARCHITECTURE}.{name}' is {value!r:.80}, expected a number from {low} to {high}; "
                f"{AGAIN}"
            )
        return value

    def field(self, name: str, default: Any = None) -> Any:
        """A field of the header, `llama.` before its name."""
        return self.fields.get(f"{ARCHITECTURE}.{name}", default)

    def _find(self, name: str) -> GgufTensor:
        if name not in self.tensors:
            raise missing_tensor(name, str(self.path), self.names)
        return self.tensors[name]


def open_gguf(path: Path) -> QuantizedSource:
    """The file's tensors, with its 4-bit matrices as they are kept."""
    source = GgufSource(path)
    kept = [name for name, tensor in source.tensors.items() if tensor.type.name == "Q4_0" and len(tensor.shape) == 2]
    weights = {}
    for name in kept:
        num_out, num_in = source.tensors[name].shape
        weights[name] = StoredWeight((num_out, num_in), partial(_read_q4_0, source, name), Q4_0_FORMAT)
    return QuantizedSource(source, weights, kept)


def _read_q4_0(source: GgufSource, name: str) -> Codes:
    numbers, scales = q4_0_numbers(source.blocks(name))
    num_out = source.tensors[name].shape[0]
    return Codes(source.in_order(name, numbers.view(num_out, -1)), source.in_order(name, scales.view(num_out, -1)))


def _name(path: Path, name: str) -> str:
    for pattern, ours in NAMES.items():
        if match := re.fullmatch(pattern, name):
            return ours.format(*match.groups())
    raise UnsupportedModel(
        f"{path}: tensor {name!r:.100} is none of a {ARCHITECTURE} model's; its features (experts, norms of q and k, "
        "adapters) are not read from GGUF: use the Hugging Face checkpoint"
    )

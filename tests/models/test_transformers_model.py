"""Models of transformers that the model table does not know, unmodified: engines generate their greedy tokens."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from tritium import LLM, SamplingParams
from tritium.compiler import build
from tritium.errors import CaptureError, ConfigError

COMMON = {"vocab_size": 199, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
SHAPE = COMMON | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2}
MODELS = {
    "MptForCausalLM": COMMON | {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128, "expansion_ratio": 2},
    "CodeGenForCausalLM": COMMON
    | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_ctx": 128, "rotary_dim": 8, "n_inner": 80},
    "OlmoeForCausalLM": SHAPE | EXPERTS | {"num_experts": 4},
    "Starcoder2ForCausalLM": SHAPE | {"sliding_window": 9},
    "GraniteForCausalLM": SHAPE | {"logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2},
    "GraniteMoeForCausalLM": SHAPE | EXPERTS | {"num_local_experts": 4},
    "Qwen2MoeForCausalLM": SHAPE
    | EXPERTS
    | {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40},
    "Exaone4ForCausalLM": SHAPE | {"sliding_window": 8, "sliding_window_pattern": 4},
    **dict.fromkeys(
        (f"{name}ForCausalLM" for name in (
            "Olmo2", "SmolLM3", "Persimmon", "Olmo", "Nemotron", "Glm", "Helium", "Ernie4_5", "Apertus", "SeedOss",
            "Arcee", "HunYuanDenseV1", "Phi",
        )),
        SHAPE,
    ),
}  # fmt: skip
QUICK = ("MptForCausalLM", "CodeGenForCausalLM", "OlmoeForCausalLM", "Starcoder2ForCausalLM")


def model(name: str, **changes: object) -> transformers.PreTrainedModel:
    """A small model in which every tensor matters, in fp32."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    made = cls(cls.config_class(**{**MODELS[name], **changes})).eval()
    with torch.no_grad():
        for path, p in made.named_parameters():
            mean = 1.0 if p.dim() == 1 and "bias" not in path else 0.0
            p.copy_(mean + torch.randn_like(p) * (0.2 if p.dim() == 1 else 2 * p.shape[-1] ** -0.5))
    return made


@torch.no_grad()
def greedy(made: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(made(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in MODELS])
def test_an_engine_in_flight_generates_the_models_greedy_tokens(name, tmp_path):
    made = model(name)
    build(made, output_dir=tmp_path / "engine")
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 199, (n,), generator=draw).tolist() for n in (3, 17, 40)]
    with LLM(tmp_path / "engine", num_threads=1, max_num_seqs=4, max_num_batched_tokens=16) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy(made, prompt, 12)


def test_the_model_is_left_as_it_was(tmp_path):
    made = model("CodeGenForCausalLM")
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    implementation = made.config._attn_implementation
    build(made, output_dir=tmp_path / "engine")
    assert made.config._attn_implementation == implementation
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    assert made.transformer.h[0].attn.embed_positions.device.type == "cpu"
    assert len(greedy(made, [5, 6], 2)) == 2


class Scan(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


def test_what_cannot_be_captured_is_refused_with_what_stopped_it(tmp_path):
    made = model("Starcoder2ForCausalLM")
    made.model.layers[1].mlp = Scan()
    with pytest.raises(CaptureError, match=r"not token-local: cumsum.*works along the tokens.*test_transformers_model"):
        build(made, output_dir=tmp_path / "engine")


def test_a_mask_cut_out_of_a_buffer_by_the_inputs_length_is_refused_with_its_line(tmp_path):
    cls, shape = transformers.GPTNeoForCausalLM, {"hidden_size": 64, "num_heads": 4, "num_layers": 2, "window_size": 9}
    config = cls.config_class(**COMMON, **shape, attention_types=[[["global", "local"], 1]])
    with pytest.raises(CaptureError, match=r"arange.*reads the number of tokens.*At .*modeling_gpt_neo\.py:\d+"):
        build(cls(config), output_dir=tmp_path / "engine")


def test_a_length_beyond_the_models_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_model_len is 500; Starcoder2ForCausalLM is made for 128"):
        build(model("Starcoder2ForCausalLM"), output_dir=tmp_path / "engine", max_model_len=500)


def test_no_architecture_is_named_in_graph_or_passes():
    names = {cls.removesuffix("ForCausalLM") for cls in MODELS} | {"Bloom", "Falcon", "NeoX", "Mixtral", "GPTJ"}
    code = re.compile(
        "|".join(rf"\b{name}(For|Config|Model|Attention|Block)" for name in names)
        + "|model_type|hf_config|(?i:llama|mistral|mixtral|qwen|gemma|phi-?3|gpt|neox|falcon|bloom|bert|glm)"
    )
    root = Path(build.__code__.co_filename).parent
    for path in (*(root / "graph").glob("*.py"), *(root / "passes").glob("*.py")):
        assert not code.search(path.read_text()), path

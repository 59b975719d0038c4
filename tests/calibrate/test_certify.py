"""The certificate: its reference is transformers in fp32, its numbers are what they say, its bound is obeyed."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tritium import models
from tritium.calibrate import certify
from tritium.calibrate.engine_logits import EngineLogits
from tritium.calibrate.reference import StreamedReference
from tritium.compiler import build
from tritium.engine.certificate import Certificate, read_certificate
from tritium.errors import ConfigError, EngineError
from tritium.quant.schemes import SCHEMES
from tritium.testing.tiny_configs import LLAMA
from tritium.testing.tiny_models import make_checkpoint, make_llama_with_tokenizer, random_prompt
from tritium.weights.recipes import evaluate
from tritium.weights.safetensors import SafetensorsSource

WINDOWS = [random_prompt(40, 199, seed=1), random_prompt(23, 199, seed=2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("m") / "tiny", "qwen2-window", dtype="bfloat16")


@pytest.fixture(scope="module")
def engine(checkpoint):
    return build(checkpoint, output_dir=checkpoint.parent / "engine", certificate="quick", max_mean_kl=0.1)


def transformers_logits(path, dtype):
    eager = {"attn_implementation": "eager"}  # release 5.17's sdpa leaves out Gemma 2's soft cap
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **eager).eval()
    with torch.no_grad():
        return [model(torch.tensor([window])).logits[0].float() for window in WINDOWS]


def reference_of(path):
    source = SafetensorsSource(path)
    module = models.create(models.read_config(path, source=source))
    recipes = models.weight_recipes(module, source=source)
    return StreamedReference(module, lambda name: evaluate(recipes[name], source, models.constants(module)))


@pytest.mark.parametrize("name", ["qwen2-window", "llama-yarn", "gemma2", "gpt2", "gptj"])
def test_the_reference_is_transformers_in_fp32_on_a_bf16_checkpoint(tmp_path, name):
    path = make_checkpoint(tmp_path / "m", name, dtype="bfloat16")
    found = reference_of(path).logits(WINDOWS)
    for ours, theirs in zip(found, transformers_logits(path, torch.float32), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_the_reference_never_holds_more_than_a_few_weights_in_fp32(checkpoint):
    reference = reference_of(checkpoint)
    reference.logits(WINDOWS)
    sizes = [tensor.numel() * 4 for tensor in load_file(checkpoint / "model.safetensors").values()]
    assert reference.most_weight_bytes <= 3 * max(sizes) < sum(sizes) / 3


def test_the_engines_logits_at_every_position_are_those_of_transformers_in_its_dtype(checkpoint, engine):
    source = EngineLogits(engine, 40)
    exact = transformers_logits(checkpoint, torch.float32)
    low = transformers_logits(checkpoint, torch.bfloat16)
    for window, reference, theirs in zip(WINDOWS, exact, low, strict=True):
        error = (source.logits(window) - reference).pow(2).mean().sqrt()
        assert error <= 2 * (theirs - reference).pow(2).mean().sqrt() + 1e-3


def test_the_numbers_are_those_of_their_definitions(checkpoint, engine):
    found = read_certificate(engine.path)
    ids = random_prompt_of(engine)
    p = reference_of(checkpoint).logits([ids])[0].double().log_softmax(-1)
    q = EngineLogits(engine, len(ids)).logits(ids).double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(certify._kl(p, q), kl)
    assert found.mean_kl == pytest.approx(kl.mean().item(), rel=1e-6)
    assert found.max_kl == pytest.approx(kl.max().item(), rel=1e-6)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert (found.text, found.num_tokens, found.perplexity_engine) == ("random tokens", len(ids), None)
    assert 0 < found.mean_kl <= found.bound == 0.1


def random_prompt_of(engine):
    return certify.windows_for(engine, *certify.WINDOWS["quick"])[0][0]


def test_with_a_tokenizer_perplexity_on_held_out_text_is_measured(tmp_path):
    path = make_llama_with_tokenizer(tmp_path / "m")
    found = read_certificate(build(path, output_dir=tmp_path / "e", certificate="quick").path)
    assert found.text == "held-out text" and found.num_tokens == 127
    assert found.perplexity_engine == pytest.approx(found.perplexity_reference, rel=1e-4)
    assert found.perplexity_engine > 50  # of a random model with 400 tokens
    assert found.mean_kl <= 1e-7 == found.bound and found.top1_agreement == 1
    assert found.describe().startswith("mean KL ")


def test_beyond_its_bound_a_build_fails_with_the_numbers_and_leaves_the_old_engine(checkpoint, tmp_path):
    old = build(checkpoint, output_dir=tmp_path / "e")
    before = (old.path / "manifest.json").read_bytes()
    with pytest.raises(
        EngineError, match=r"too far from its checkpoint in fp32: mean KL .* of at most 1e-12 \(overrid"
    ):
        build(checkpoint, output_dir=tmp_path / "e", certificate="quick", max_mean_kl=1e-12)
    assert (old.path / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_an_override_is_recorded(checkpoint, tmp_path):
    found = build(checkpoint, output_dir=tmp_path / "e", certificate="quick", max_mean_kl=0.5)
    certificate = read_certificate(found.path)
    assert (certificate.bound, certificate.is_overridden) == (0.5, True)
    assert "(overridden)" in certificate.describe()
    with pytest.raises(ConfigError, match="max_mean_kl must be a number of nats above 0, not nan"):
        build(checkpoint, output_dir=tmp_path / "e", max_mean_kl=float("nan"))


def test_every_scheme_has_a_bound():
    assert certify.SCHEME_BOUNDS.keys() == {scheme.name for scheme in SCHEMES}


def test_random_weights_have_no_certificate_and_it_says_so(tmp_path):
    config = models.parse_config(LLAMA, "tiny", dtype="float32")
    engine = build(config, weights="dummy", output_dir=tmp_path / "e", certificate="full")
    found = read_certificate(engine.path)
    assert (found.skipped, found.mean_kl, found.effort) == ("dummy weights", None, "full")
    assert found.describe() == "not measured: dummy weights"


def test_a_damaged_certificate_is_named(tmp_path):
    (tmp_path / "certificate.json").write_text('{"effort": 3}')
    with pytest.raises(EngineError, match=r"certificate\.json is damaged"):
        read_certificate(tmp_path)
    assert read_certificate(tmp_path / "nowhere") is None
    assert Certificate(effort="none").describe() == "not measured: effort none"

"""The demo model in examples/demo_model: an ordinary checkpoint that predicts Python better than xz does."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo_model"


def example(name):
    """The module examples/demo_model/<name>.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location(f"demo_model_{name}", DEMO_MODEL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a shared machine two threads wait for each other: 86 s instead of 8 s for 64 KB of text, 2 busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def heldout():
    return (DEMO_MODEL / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def numbers():
    return json.loads((DEMO_MODEL / "training.json").read_text())


def test_the_directory_is_a_llama_of_at_most_ten_million_parameters(model, numbers):
    assert model.config.model_type == "llama"
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.num_parameters() == numbers["parameters"] <= 10_000_000


def test_the_weights_are_stored_in_bf16_within_twenty_megabytes():
    path = DEMO_MODEL / "model.safetensors"
    with safe_open(path, "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert path.stat().st_size < 20_000_000


def test_the_held_out_text_is_the_one_that_was_measured_and_fits_in_600_kilobytes(heldout, numbers):
    assert len(heldout.encode()) == numbers["heldout_bytes"] <= 600_000


def test_every_file_is_in_the_part_that_the_hash_of_its_path_names(numbers):
    corpus = example("corpus")
    part_of = {corpus.HELDOUT_BUCKET: "heldout", corpus.VALIDATION_BUCKET: "validation"}
    for part, names in numbers["files"].items():
        assert {part_of.get(corpus.bucket(name), "train") for name in names} == {part}


def test_a_held_out_file_that_copies_another_file_is_in_no_part():
    corpus = example("corpus")
    text = "\n".join(f"a line that is long enough to count {i}" for i in range(20))
    heldout, train = "signal.py", "argparse.py"  # the twentieths 0 and 3
    assert corpus.split({heldout: text, train: text + "\nx = 1"}) == ({train: text + "\nx = 1"}, {}, {})
    assert corpus.split({heldout: text, train: "x = 1"}) == ({train: "x = 1"}, {}, {heldout: text})


def test_held_out_text_takes_fewer_bits_than_xz_needs(model, tokenizer, heldout, numbers):
    measure = example("measure")
    xz = measure.xz_bits_per_byte(heldout)
    assert numbers["xz_bits_per_byte"] == pytest.approx(xz, abs=1e-3)
    assert numbers["heldout_bits_per_byte"] < xz
    # Short windows, a quarter of what the card measures with, bound the real number from above and cost less.
    assert measure.bits_per_byte(model, tokenizer, heldout[: 48 * 1024], context=512) < xz


def test_a_text_survives_the_tokenizer_and_gains_one_bos(tokenizer, heldout):
    text = heldout[:20_000] + "naïve £ 漢字 \t\r\n\x00"
    ids = tokenizer(text, verbose=False).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_conversation_renders_as_a_module_that_goes_on_after_a_docstring(tokenizer):
    messages = [
        {"role": "user", "content": "Count words."},
        {"role": "assistant", "content": "import sys"},
        {"role": "user", "content": "Sort them."},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == '<|begin_of_text|>"""Count words."""\n\nimport sys\n\n"""Sort them."""\n\n'
    assert tokenizer.apply_chat_template(messages, tokenize=False) == rendered.removesuffix("\n")
    ids = tokenizer.apply_chat_template(messages, return_dict=True, add_generation_prompt=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_generation_knows_where_a_module_ends(model, tokenizer):
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id

"""Looking into an engine: costs by hand, times that are there, a page that is whole; two engines compared."""

import html.parser
import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from tritium.cli.main import app
from tritium.compiler import build
from tritium.engine.arena import ITEM_SIZES
from tritium.engine.engine import Engine
from tritium.engine.plan import Sizes
from tritium.errors import ConfigError, EngineError
from tritium.inspection.costs import Batch, step_cost
from tritium.inspection.difference import difference
from tritium.inspection.page import page
from tritium.inspection.report import make_report
from tritium.testing.tiny_configs import LLAMA
from tritium.testing.tiny_encoders import make_encoder
from tritium.testing.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Of one checkpoint: as built by default, and with an optional pass left out."""
    root = tmp_path_factory.mktemp("engines")
    model = make_checkpoint(root / "tiny <model>", LLAMA)
    plain = build(model, output_dir=root / "plain")
    return plain, build(model, output_dir=root / "unmerged", disabled_passes=("merge_qkv",)), model


def tritium(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def test_the_cost_of_a_linear_and_of_attention_is_that_of_the_formula(engines):
    """64 wide, 4 heads of 16, 2 kv heads, fp32; 10 tokens that see 5 keys each."""
    plan = engines[1].plan
    batch = Batch(Sizes(tokens=10, sequences=1, rows=1), 5)
    query = next(s for s in plan.steps if s.op == "linear" and plan.value(s.outputs[0]).shape[1] == 64)
    assert step_cost(plan, query, batch) == (4 * (10 * 64 + 64 * 64 + 10 * 64), 2 * 10 * 64 * 64)
    attention = next(s for s in plan.steps if s.op == "paged_attention")
    assert step_cost(plan, attention, batch).flops == 4 * 10 * 4 * 16 * 5


def test_the_cost_of_quantised_linears_experts_and_stores_is_that_of_the_formula(engines, tmp_path):
    """64 wide, 96 in the MLP; 4 bits in groups of 32, int8 rows with a scale each; 5 experts of which a token has 2."""
    batch = Batch(Sizes(tokens=10, sequences=1, rows=1), 5)
    plan = build(engines[2], output_dir=tmp_path / "w4a8", scheme="w4a8_g32").plan
    gated = next(s for s in plan.steps if s.op == "quantized_linear_gated")
    scales = plan.value(gated.args["scales_NG"].value)
    scale_bytes = ITEM_SIZES[scales.dtype] * 192 * 2
    assert step_cost(plan, gated, batch) == (10 * (64 + 4 + 4 * 96) + 192 * 32 + scale_bytes, 2 * 10 * 192 * 64)
    store = next(s for s in plan.steps if s.op == "rope_kv_store")
    written = 2 * 4 * 10 * 2 * 16
    read = sum(4 * 10 * n for n in (64, 32, 32, 64, 16)) + 8 * 10  # q, k, v, the result, cosines and sines; slots
    assert step_cost(plan, store, batch).num_bytes == written + read
    plan = build(make_checkpoint(tmp_path / "mixtral", "mixtral"), output_dir=tmp_path / "moe").plan
    experts = next(s for s in plan.steps if s.op == "moe")
    assert step_cost(plan, experts, batch).flops == 2 * 10 * 2 * (2 * 96 + 96) * 64
    one = Batch(Sizes(tokens=1, sequences=1, rows=1), 5)
    assert step_cost(plan, experts, one).num_bytes == 4 * (64 + 5 + 64) + 4 * 2 * 3 * 96 * 64  # of two experts


def test_an_encoder_is_looked_into_like_a_decoder(tmp_path):
    path, _ = make_encoder(tmp_path / "model", "BertForSequenceClassification")
    engine = build(path, output_dir=tmp_path / "bert")
    report = make_report(engine, num_tokens=20, is_decode=False)
    assert report.batch == "one text of 20 tokens"
    assert [step.index for step in report.steps] == list(range(len(engine.plan.steps)))
    assert {step.phase for step in report.steps} == {"tokens", "rows"}
    assert all(step.seconds > 0 and step.attainable > 0 for step in report.steps)
    attention = next(step for step in report.steps if step.op == "varlen_attention")
    assert attention.module == "layers.0" and attention.cost.flops == 4 * 20 * 48 * 20  # each token sees every other
    assert "decoders alone are compared" in page(report)
    with pytest.raises(EngineError, match="is an encoder: it decodes nothing; leave out --decode"):
        make_report(engine, num_tokens=4, is_decode=True)
    with pytest.raises(ConfigError, match="the number of tokens must be an integer from 1 to 72, not 100"):
        make_report(engine, num_tokens=100, is_decode=False)


def test_every_step_is_in_one_block_and_has_its_weights_sources_and_time(engines):
    report = make_report(engines[0], num_tokens=20, is_decode=False)
    assert [step.index for step in report.steps] == list(range(len(engines[0].plan.steps)))
    assert {"layers.0", "layers.1", "layers.2"} < set(report.blocks)
    assert all(step.seconds > 0 and step.attainable > 0 for step in report.steps)
    linears = [step for step in report.steps if step.op == "linear"]
    assert all(len(step.weights) == 1 for step in linears)
    merged = next(step for step in linears if len(step.sources) == 3)
    assert merged.module.startswith("layers.0.attention")
    norms = [step for step in report.steps if step.op == "add_rms_norm"]
    assert [norm.module for norm in norms[:2]] == ["layers.0.mlp_norm", "layers.1.attention_norm"]
    assert max(buffer.offset + buffer.size for buffer in report.buffers) == report.arena_bytes


def test_without_timing_costs_are_predicted_alone(engines):
    report = make_report(engines[0], num_tokens=4, is_decode=True, is_measured=False)
    assert report.ceilings is None and all(step.seconds is None for step in report.steps)
    assert report.batch == "4 sequences decode one token each"
    assert "<svg" in page(report) and "Roofline" not in page(report)


class Tags(html.parser.HTMLParser):
    """Every opened tag is closed, in order; collects attributes that would load something."""

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_loads_nothing_and_escapes_what_it_shows(engines, tmp_path):
    done = tritium("inspect", engines[0].path, "--html", tmp_path / "e.html", "--num-tokens", "16")
    assert done.exit_code == 0 and f"wrote {tmp_path / 'e.html'}" in done.stderr
    text = (tmp_path / "e.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and tags.loads == [] and "<script" not in text and "url(" not in text
    assert "tiny &lt;model&gt;" in text and "<model>" not in text
    assert len(re.findall("<circle", text)) > 20 and text.count("<details>") == 4
    assert "this engine was not compared with its checkpoint" in text


def test_the_text_and_the_json_say_the_same_of_every_step(engines):
    plain = tritium("inspect", engines[0].path, "--no-timing").stdout
    record = json.loads(tritium("inspect", engines[0].path, "--no-timing", "--json").stdout)
    assert len(record["steps"]) == len(engines[0].plan.steps)
    for step in record["steps"]:
        assert re.search(
            rf"^ +{step['index']} {step['op']} +{re.escape(step['kernel'])} +{step['bytes']:,} B", plain, re.M
        )


def test_a_page_into_a_directory_and_a_damaged_graph_are_refused(engines, tmp_path):
    done = tritium("inspect", engines[0].path, "--no-timing", "--html", tmp_path, "--json")
    assert "is a directory: name a file to write" in json.loads(done.stdout)["error"]["message"]
    damaged = Engine.load(shutil.copytree(engines[1].path, tmp_path / "damaged"))
    (damaged.path / "graph.json").write_text("{}")
    with pytest.raises(EngineError, match=r"graph\.json is damaged"):
        make_report(damaged, num_tokens=4, is_decode=False, is_measured=False)


def test_equal_engines_do_not_differ_and_others_by_what_made_them_so(engines, tmp_path):
    plain, unmerged, _ = engines
    assert difference(plain, plain) == {}
    found = difference(plain, unmerged)
    assert found["manifest"]["build"] == [{"disabled_passes": []}, {"disabled_passes": ["merge_qkv"]}]
    merged, apart = found["steps"]["linear"]
    assert apart == merged + 2 * 3  # two linears fewer in each of three layers
    assert found["files"] == ["plan.json", "weights.safetensors", "recipes.json"]
    assert any("k_proj" in name for name in found["recipes"])
    assert any(line.startswith("-") for line in found["graph"]) and any(line.startswith("+") for line in found["graph"])
    done = tritium("diff", plain.path, unmerged.path)
    assert 'manifest build: {"disabled_passes": []} -> {"disabled_passes": ["merge_qkv"]}' in done.stdout
    assert f"steps linear: {merged} -> {apart}" in done.stdout and "the engines differ" in done.stderr
    same = tritium("diff", plain.path, plain.path)
    assert (same.stdout, same.stderr) == ("", "the engines are equal\n")
    assert json.loads(tritium("diff", plain.path, plain.path, "--json").stdout) == {}

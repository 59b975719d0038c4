"""Looking into an engine: costs by hand, times that are there, a page that is whole; two engines compared."""

import html.parser
import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from tritium.cli.main import app
from tritium.compiler import build
from tritium.engine.engine import Engine
from tritium.engine.plan import Sizes
from tritium.errors import EngineError
from tritium.inspection.costs import Batch, step_cost
from tritium.inspection.difference import difference
from tritium.inspection.page import page
from tritium.inspection.report import make_report
from tritium.testing.tiny_configs import LLAMA
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


def test_every_step_is_in_one_block_and_has_its_weights_sources_and_time(engines):
    report = make_report(engines[0], num_tokens=20, is_decode=False)
    assert [step.index for step in report.steps] == list(range(len(engines[0].plan.steps)))
    assert {"layers.0", "layers.1", "layers.2"} < set(report.blocks)
    assert all(step.seconds > 0 and step.attainable > 0 for step in report.steps)
    linears = [step for step in report.steps if step.op == "linear"]
    assert all(len(step.weights) == 1 for step in linears)
    merged = next(step for step in linears if len(step.sources) == 3)
    assert merged.module.startswith("layers.0.attention")
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

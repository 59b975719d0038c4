"""The page in headless Chromium: quiet console, no horizontal overflow, clean by axe; narrow and wide, both schemes.

`make test-full` installs both: Chromium from the system's packages, axe-core beside the virtual environment.
"""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tritium.compiler import build
from tritium.engine.engine import Engine
from tritium.inspection.page import page
from tritium.inspection.report import make_report
from tritium.testing.tiny_encoders import make_encoder
from tritium.testing.tiny_models import make_checkpoint

pytestmark = pytest.mark.full
AXE = Path(sys.prefix) / "axe-core" / "axe.min.js"
DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
CHECK = """
document.querySelectorAll("details").forEach(one => { one.open = true; });
axe.run(document, {resultTypes: ["violations"]}).then(found => {
  const root = document.documentElement;
  parent.postMessage(JSON.stringify({
    violations: found.violations.map(v => v.id + ": " + v.nodes[0].html.slice(0, 200)),
    passes: found.passes.length,
    overflow: root.scrollWidth - root.clientWidth,
    width: window.innerWidth,
    ground: getComputedStyle(document.body).backgroundColor,
  }), "*");
});
"""
FRAME = """<!doctype html><html><head><meta name="color-scheme" content="light dark"></head><body>
<script>onmessage = message => { document.documentElement.dataset.found = message.data; };</script>
<iframe src="page.html" style="width: %dpx; height: 2000px; border: 0"></iframe></body></html>
"""  # in a frame, for a window of Chromium's own is never narrower than 500 pixels


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found and AXE.is_file(), f"Chromium and {AXE} are needed: run `make test-full`, which installs them"
    return found


def encoder(path: Path) -> Engine:
    return build(make_encoder(path / "model", "BertForSequenceClassification")[0], output_dir=path / "e")


ENGINES = {
    "bf16": lambda path: build(DEMO, output_dir=path / "e", certificate="quick", max_model_len=512),
    "w4a8": lambda path: build(DEMO, output_dir=path / "e", scheme="w4a8_g32", kv_dtype="int8", max_model_len=512),
    "mixture of experts": lambda path: build(make_checkpoint(path / "model", "mixtral"), output_dir=path / "e"),
    "encoder": encoder,
}


@pytest.fixture(scope="module", params=ENGINES)
def text(request, tmp_path_factory):
    engine = ENGINES[request.param](tmp_path_factory.mktemp("engine"))
    return page(make_report(engine, num_tokens=64, is_decode=False))


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize(("scheme", "ground"), [("dark", "rgb(20, 24, 29)"), ("light", "rgb(255, 255, 255)")])
def test_the_page_is_clean(text, tmp_path, width, scheme, ground):
    script = f"<script>{AXE.read_text()}</script><script>{CHECK}</script></body>"
    (tmp_path / "page.html").write_text(text.replace("</body>", script))
    (tmp_path / "frame.html").write_text(FRAME % width)
    done = subprocess.run(
        [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--virtual-time-budget=20000",
         "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match, done.stderr[-2000:]
    found = json.loads(html.unescape(match[1]))
    assert found["violations"] == [] and found["passes"] > 10
    assert (found["width"], found["overflow"], found["ground"]) == (width, 0, ground)
    assert "CONSOLE" not in done.stderr

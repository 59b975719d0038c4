"""Writing engines: whole or not at all. Loading them: believed only as far as they can be checked."""

import json
import os
import shutil
import subprocess
import sys

import msgspec
import pytest

from tritium.engine.engine import Engine
from tritium.engine.manifest import Manifest, is_engine, record
from tritium.engine.plan import KVGroup, Plan, Ref, Step, Value
from tritium.engine.serialise import write_engine
from tritium.errors import EngineError

PLAN = Plan(
    values=(
        Value(name="input_ids", kind="input", dtype="int64", shape=("T",)),
        Value(name="sampled_rows", kind="input", dtype="int64", shape=("R",)),
        Value(name="weight", kind="weight", dtype="float32", shape=(7, 7)),
        Value(name="x", kind="temp", dtype="float32", shape=("T", 7)),
        Value(name="logits", kind="temp", dtype="float32", shape=("R", 7)),
    ),
    steps=(
        Step(op="embedding", args={"ids_T": Ref("input_ids"), "weight_VD": Ref("weight")}, outputs=("x",)),
        Step(
            op="gather_rows", args={"x_TD": Ref("x"), "rows_R": Ref("sampled_rows")}, outputs=("logits",), phase="rows"
        ),
    ),
    kv_groups=(KVGroup(layers=(0,), window=0, num_kv_heads=1, head_size=4, dtype="float32"),),
    output="logits",
    vocab_size=7,
)
MANIFEST = Manifest(
    backend="cpu", model={"name": "m", "source": "there"}, dtype="float32", max_model_len=8, vocab_size=7
)


def write_weights(path):
    path.write_bytes(b"weights" * 100)
    return record(path)


def write(directory, **changes):
    arguments = {"manifest": MANIFEST, "plan": PLAN, "texts": {"graph.txt": "graph"}, "write_weights": write_weights}
    return write_engine(directory, **{**arguments, **changes})


@pytest.fixture
def engine_dir(tmp_path):
    return write(tmp_path / "engine")


def edit_manifest(engine_dir, **changes):
    path = engine_dir / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_engine_comes_back_as_it_was_written(engine_dir):
    engine = Engine.load(engine_dir, verify=True)
    assert engine.plan == PLAN
    assert engine.manifest.model == MANIFEST.model
    assert set(engine.manifest.files) == {"plan.json", "graph.txt", "weights.safetensors"}
    assert engine.weights_path == engine_dir / "weights.safetensors"


def test_tokenizer_files_of_the_model_are_copied(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (model / name).write_text(name)
    engine = write(tmp_path / "engine", model_dir=model)
    assert (engine / "tokenizer.json").read_text() == "tokenizer.json"
    assert (engine / "chat_template.jinja").is_file()
    assert not (engine / "model.safetensors").exists()


def test_a_failing_build_leaves_no_trace(tmp_path):
    def full_disk(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "engine", write_weights=full_disk)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_rebuild_leaves_the_old_engine(tmp_path, engine_dir):
    def interrupted(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(engine_dir, write_weights=interrupted, texts={"graph.txt": "new"})
    assert (engine_dir / "graph.txt").read_text() == "graph"
    Engine.load(engine_dir, verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_rebuild_replaces_the_old_engine(tmp_path, engine_dir):
    write(engine_dir, texts={"other.txt": "new"})
    assert not (engine_dir / "graph.txt").exists()
    assert (engine_dir / "other.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_directory_that_is_no_engine_is_never_replaced(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(EngineError, match="precious exists and is not an engine"):
        write(tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "x"


def test_a_directory_with_another_programs_manifest_is_no_engine_and_never_replaced(tmp_path):
    page = tmp_path / "public"
    page.mkdir()
    (page / "manifest.json").write_text('{"name": "a web page"}')
    assert not is_engine(page)
    with pytest.raises(EngineError, match="public exists and is not an engine"):
        write(page)
    assert [path.name for path in page.iterdir()] == ["manifest.json"]


def test_an_engine_with_a_damaged_manifest_can_be_built_again(engine_dir):
    (engine_dir / "manifest.json").write_bytes(b"")
    assert is_engine(engine_dir)
    Engine.load(write(engine_dir))


def test_a_killed_build_is_cleaned_up_by_the_next_and_never_looks_like_an_engine(tmp_path):
    script = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[2])
from tests_helper import write
write(pathlib.Path(sys.argv[1]), write_weights=lambda path: os.kill(os.getpid(), signal.SIGKILL))
"""
    helper = tmp_path / "helper"
    helper.mkdir()
    shutil.copy(__file__, helper / "tests_helper.py")
    target = tmp_path / "out" / "engine"
    done = subprocess.run([sys.executable, "-c", script, str(target), str(helper)])
    assert done.returncode == -9
    assert not target.exists()
    [leftover] = target.parent.iterdir()
    assert leftover.name.startswith(".engine.partial-")
    assert not is_engine(leftover)
    write(target)
    assert [path.name for path in target.parent.iterdir()] == ["engine"]


def test_a_running_build_is_left_alone_though_its_process_id_is_unknown_here(tmp_path, monkeypatch):
    """As in a cache that containers share: each has process ids of its own."""
    target = tmp_path / "engine"

    def second_build_meanwhile(path):
        written = write_weights(path)
        monkeypatch.setattr("tritium.engine.serialise.os.getpid", lambda: 2**22 + 1)
        write(target, texts={"graph.txt": "second"})
        assert path.is_file()
        return written

    monkeypatch.setattr("tritium.engine.serialise.os.getpid", lambda: 2**22 + 2)  # more than the kernel ever gives
    write(target, write_weights=second_build_meanwhile, texts={"graph.txt": "first"})
    assert (target / "graph.txt").read_text() == "first"
    assert not (target / "building.lock").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_directory_that_has_no_lock_yet_is_left_until_it_is_a_day_old(tmp_path):
    young, old = tmp_path / ".engine.partial-1", tmp_path / ".engine.partial-2"
    young.mkdir()
    old.mkdir()
    os.utime(old, (0, 0))
    write(tmp_path / "engine")
    assert young.exists() and not old.exists()


def test_a_name_with_wildcards_cleans_up_after_itself_alone(tmp_path):
    other, own = tmp_path / ".a.partial-1", tmp_path / ".[ab].partial-1"
    for leftover in (other, own):
        leftover.mkdir()
        (leftover / "building.lock").touch()  # which nobody holds
    write(tmp_path / "[ab]")
    assert other.exists() and not own.exists()


@pytest.mark.parametrize("name", ["plan.json", "graph.txt", "weights.safetensors"])
def test_a_missing_file_is_named(engine_dir, name):
    (engine_dir / name).unlink()
    with pytest.raises(EngineError, match=f"{name} is missing"):
        Engine.load(engine_dir)


@pytest.mark.parametrize("name", ["plan.json", "graph.txt", "weights.safetensors"])
def test_a_truncated_file_is_named(engine_dir, name):
    path = engine_dir / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(EngineError, match=f"{name} is truncated"):
        Engine.load(engine_dir)


@pytest.mark.parametrize("name", ["plan.json", "graph.txt", "weights.safetensors"])
def test_one_flipped_bit_is_found_and_named(engine_dir, name):
    path = engine_dir / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(EngineError, match=f"{name} is damaged"):
        Engine.load(engine_dir)


def test_large_files_are_hashed_only_on_request(engine_dir, monkeypatch):
    monkeypatch.setattr("tritium.engine.manifest.HASH_ALWAYS_BELOW", 650)
    path = engine_dir / "weights.safetensors"
    path.write_bytes(b"WEIGHTS" * 100)
    Engine.load(engine_dir)
    with pytest.raises(EngineError, match=r"weights.safetensors is damaged"):
        Engine.load(engine_dir, verify=True)


def test_a_missing_manifest_says_how_to_make_an_engine(tmp_path):
    with pytest.raises(EngineError, match=r"manifest.json is missing.*tritium build"):
        Engine.load(tmp_path)
    with pytest.raises(EngineError, match="not a directory"):
        Engine.load(tmp_path / "nowhere")


def test_an_engine_for_another_backend_is_refused_with_the_command_to_run(engine_dir):
    edit_manifest(engine_dir, backend="rocm")
    with pytest.raises(EngineError, match=r"for 'rocm'.*tritium build there --device cpu"):
        Engine.load(engine_dir)


def test_a_newer_engine_is_refused_even_if_its_manifest_has_other_fields(engine_dir):
    edit_manifest(engine_dir, version=99, dtype={"weights": "fp4"})
    with pytest.raises(EngineError, match=r"manifest.json has engine version 99.*update Tritium"):
        Engine.load(engine_dir)


def test_another_plan_version_is_refused(tmp_path):
    plan = msgspec.structs.replace(PLAN, version=99)
    with pytest.raises(EngineError, match=r"plan.json has plan version 99"):
        Engine.load(write(tmp_path / "engine", plan=plan))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "damaged"),
        ("[]", "not the manifest"),
        ('{"format": "tritium-engine", "version": "1"}', "version is '1'"),
        ('{"format": "tritium-engine", "version": 1, "backend": 3}', "damaged"),
        ("\udcff", "damaged"),
    ],
)
def test_a_damaged_manifest_is_named(engine_dir, text, words):
    (engine_dir / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(EngineError, match=words) as caught:
        Engine.load(engine_dir)
    assert "manifest.json" in str(caught.value)


def test_a_manifest_may_not_point_outside_the_engine(engine_dir):
    edit_manifest(engine_dir, files={"../../etc/passwd": {"size": 1, "sha256": "0"}})
    with pytest.raises(EngineError, match="outside the engine"):
        Engine.load(engine_dir)


def test_weights_may_only_be_absent_when_they_are_generated(tmp_path):
    with pytest.raises(EngineError, match=r"does not list weights.safetensors"):
        Engine.load(write(tmp_path / "a", write_weights=None))
    dummy = write(tmp_path / "b", write_weights=None, manifest=msgspec.structs.replace(MANIFEST, dummy_seed=0))
    assert Engine.load(dummy).weights_path is None

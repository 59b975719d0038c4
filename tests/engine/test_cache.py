"""The cache of engines: its key, its memo, its lock, and who may use it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tritium.config import BuildConfig
from tritium.engine import cache, obtain
from tritium.errors import CheckpointError, ConfigError, EngineError


@pytest.fixture
def engines(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "some-model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "model.safetensors").write_bytes(b"w" * 1000)
    return path


def fake_build(model, config, path):
    path.mkdir()
    (path / "manifest.json").write_text('{"format": "tritium-engine"}')


def test_the_key_changes_with_every_file_of_the_model_and_every_option(engines, model):
    keys = {cache.engine_path(model, BuildConfig())}
    keys.add(cache.engine_path(model, BuildConfig(dtype="bfloat16")))
    keys.add(cache.engine_path(model, BuildConfig(invariance="fast")))
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (model / name).write_text(f"other {name}")
        keys.add(cache.engine_path(model, BuildConfig()))
    assert len(keys) == 7
    assert all(key.parent == engines and key.name.startswith("some-model-") for key in keys)


def test_files_that_are_not_the_models_do_not_count(engines, model):
    before = cache.engine_path(model, BuildConfig())
    (model / "README.md").write_text("hello")
    (model / "original").mkdir()
    assert cache.engine_path(model, BuildConfig()) == before


def test_unchanged_weights_are_not_read_again(engines, model, monkeypatch):
    first = cache.engine_path(model, BuildConfig())
    monkeypatch.setattr(cache, "record", lambda path: pytest.fail(f"{path} was read again"))
    assert cache.engine_path(model, BuildConfig()) == first


def test_a_damaged_memo_is_only_a_memo(engines, model):
    first = cache.engine_path(model, BuildConfig())
    (engines / "hashes.json").write_text("{not json")
    assert cache.engine_path(model, BuildConfig()) == first


def test_threads_that_hash_the_same_model_at_once_do_not_take_each_others_memo(engines, model, monkeypatch):
    """Both have written their memo before either puts it in its place."""
    both_wrote = threading.Barrier(2, timeout=20)

    def write_then_wait(self, data):
        with open(self, "wb") as file:
            file.write(data)
        both_wrote.wait()

    monkeypatch.setattr(cache.Path, "write_bytes", write_then_wait)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: cache.engine_path(model, BuildConfig()), range(2))
    assert first == second
    assert sorted(path.name for path in engines.iterdir()) == ["hashes.json"]


def test_a_cache_that_others_may_write_is_refused(engines, model):
    cache.engine_path(model, BuildConfig())
    assert engines.stat().st_mode & 0o777 == 0o700
    engines.chmod(0o777)
    with pytest.raises(EngineError, match="writable by nobody else"):
        cache.engine_path(model, BuildConfig())


def test_a_cache_that_cannot_be_made_is_named_with_the_way_out(tmp_path, model, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"file/engines cannot be made .*set TRITIUM_CACHE"):
        cache.engine_path(model, BuildConfig())


def test_two_that_want_the_same_engine_build_it_once(engines, model):
    builds, entered, may_go_on = [], threading.Event(), threading.Event()

    def slow_build(model, config, path):
        builds.append(path)
        entered.set()
        assert may_go_on.wait(20)
        fake_build(model, config, path)

    results = []
    threads = [
        threading.Thread(target=lambda: results.append(obtain.obtain_engine(model, BuildConfig(), slow_build)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert entered.wait(20)
    may_go_on.set()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert results == [builds[0]] * 2


def test_the_length_counts_only_for_models_that_compile_it_in(engines, model):
    def path_for(length):
        return obtain.obtain_engine(model, BuildConfig(max_model_len=length), fake_build)

    assert path_for(100) == path_for(None)
    (model / "config.json").write_text('{"rope_scaling": {"type": "dynamic", "factor": 2.0}}')
    assert path_for(100) != path_for(200)
    (model / "config.json").write_text('{"rope_parameters": {"rope_type": "dynamic"}}')
    assert path_for(100) != path_for(None)


def test_a_length_beyond_what_the_model_claims_reaches_the_build(engines, model):
    asked = []

    def build(model, config, path):
        asked.append(config.max_model_len)
        fake_build(model, config, path)

    (model / "config.json").write_text('{"max_position_embeddings": 128}')
    for length in (128, 129):
        obtain.obtain_engine(model, BuildConfig(max_model_len=length), build)
    assert asked == [None, 129]
    (model / "config.json").write_text("[]")
    obtain.obtain_engine(model, BuildConfig(max_model_len=500), build)
    assert asked[2:] == [None]


def test_a_failing_build_is_not_remembered(engines, model):
    def failing(model, config, path):
        raise CheckpointError("broken")

    with pytest.raises(CheckpointError):
        obtain.obtain_engine(model, BuildConfig(), failing)
    path = obtain.obtain_engine(model, BuildConfig(), fake_build)
    assert [entry.path for entry in cache.cached_engines()] == [path]


def test_an_engine_in_the_cache_whose_tuning_failed_is_named_with_the_command_and_not_used_untuned(engines, model):
    def failing(model, config, path):
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(
            '{"format": "tritium-engine", "version": 1, "backend": "cuda", "model": {}, "dtype": "bfloat16", '
            '"max_model_len": 64, "vocab_size": 5}'
        )
        raise EngineError("tuning it failed")

    config = BuildConfig(device="cuda", tune="quick", tune_block_size=64)
    with pytest.raises(EngineError, match="tuning it failed"):
        obtain.obtain_engine(model, config, failing)
    with pytest.raises(ConfigError) as raised:
        obtain.obtain_engine(model, config, failing)
    [kept] = [entry.path for entry in cache.cached_engines()]
    assert str(raised.value) == (
        f"tune='quick': the engine {kept} is not tuned; run `tritium tune {kept} --effort quick --block-size 64`"
    )


def test_an_empty_directory_holds_no_model(engines, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model"):
        obtain.obtain_engine(tmp_path / "empty", BuildConfig(), fake_build)


def test_options_that_contradict_a_given_engine_are_refused(tmp_path):
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "manifest.json").write_text(
        '{"format": "tritium-engine", "version": 1, "backend": "cpu", "model": {}, "dtype": "bfloat16", '
        '"max_model_len": 64, "vocab_size": 5}'
    )
    assert obtain.obtain_engine(engine, BuildConfig(), fake_build) == engine
    with pytest.raises(ConfigError, match="computes in bfloat16"):
        obtain.obtain_engine(engine, BuildConfig(dtype="float32"), fake_build)
    with pytest.raises(ConfigError, match="is bitwise"):
        obtain.obtain_engine(engine, BuildConfig(invariance="fast"), fake_build)
    with pytest.raises(ConfigError, match=r"device='cuda': the engine .* is for 'cpu'; build another one"):
        obtain.obtain_engine(engine, BuildConfig(device="cuda"), fake_build)
    with pytest.raises(ConfigError, match=r"tune='full': the engine .* not tuned; run `tritium tune .* --effort full`"):
        obtain.obtain_engine(engine, BuildConfig(tune="full"), fake_build)
    with pytest.raises(ConfigError, match="disabled_passes"):
        obtain.obtain_engine(engine, BuildConfig(disabled_passes=("recognise",)), fake_build)
    with pytest.raises(ConfigError, match="built for 64"):
        obtain.obtain_engine(engine, BuildConfig(max_model_len=65), fake_build)

"""`LLM` on encoders: embeddings, classes and scores of texts, in vLLM's shapes; the same through engines and caches."""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tritium import LLM, SamplingParams, build
from tritium.config import BuildConfig, RuntimeConfig
from tritium.engine import cache
from tritium.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    OutOfMemory,
    RequestError,
    RequestTooLarge,
    UnsupportedModel,
)
from tritium.runtime import plan_runner
from tritium.runtime.encoder_runner import EncoderRunner
from tritium.runtime.encoder_worker import EncoderWorker
from tritium.testing.tiny_encoders import (
    encoder_directory,
    reference,
    word_tokenizer,
    write_sentence_files,
)

TEXTS = ["w1 w2 w3", "w4", " ".join(f"w{i}" for i in range(50)), "w9 unknown w9"]
OPTIONS = {"num_threads": 1, "max_num_batched_tokens": 128, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path, model = encoder_directory(tmp_path_factory.mktemp("embedder") / "model", "BertModel")
    with LLM(build(path, output_dir=path.parent / "engine").path, **OPTIONS) as llm:
        yield llm, model


@pytest.fixture(scope="module")
def crossencoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("cross") / "model"
    path, model = encoder_directory(path, "BertForSequenceClassification", num_labels=1, problem_type=None)
    with LLM(build(path, output_dir=path.parent / "engine").path, **OPTIONS) as llm:
        yield llm, model


def hidden_of(model: Any, ids: list[int]) -> torch.Tensor:
    return reference(model, ids, [0] * len(ids))[0]


@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "pooler"])
def test_embeddings_are_pooled_as_asked_for_and_normalised_unless_told_otherwise(embedder: Any, pooling: str) -> None:
    llm, model = embedder
    for normalize in (None, False):
        for output in llm.encode(TEXTS, pooling=pooling, normalize=normalize):
            states, pooled = reference(model, output.prompt_token_ids, [0] * len(output.prompt_token_ids))
            expected = {"cls": states[0], "mean": states.mean(0), "last": states[-1], "pooler": pooled}[pooling]
            expected = expected if normalize is False else F.normalize(expected, dim=-1)
            torch.testing.assert_close(output.outputs.data, expected, rtol=1e-4, atol=1e-5)


def test_texts_get_their_special_tokens_and_token_ids_are_taken_as_they_are(embedder: Any) -> None:
    llm, _ = embedder
    from_text, from_ids = llm.embed("w1 w2")[0], llm.embed([2, 5, 6, 3])[0]
    assert from_text.prompt_token_ids == [2, 5, 6, 3]
    assert from_text.outputs.embedding == from_ids.outputs.embedding
    assert from_text.finished and from_text.request_id != from_ids.request_id


def test_every_token_can_be_embedded(embedder: Any) -> None:
    llm, model = embedder
    for output in llm.encode(TEXTS, pooling_task="token_embed"):
        expected = hidden_of(model, output.prompt_token_ids)
        torch.testing.assert_close(output.outputs.data, expected, rtol=1e-4, atol=1e-4)


def test_many_threads_get_the_bits_that_each_text_gets_alone(embedder: Any) -> None:
    llm, _ = embedder
    alone = {text: llm.embed(text)[0].outputs.embedding for text in TEXTS}

    def ask(seed: int) -> None:
        texts = TEXTS[seed % 4 :] + TEXTS[: seed % 4]
        assert [o.outputs.embedding for o in llm.embed(texts)] == [alone[text] for text in texts]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(18)))


def test_scores_of_an_embedding_model_are_cosines(embedder: Any) -> None:
    llm, model = embedder
    ids = {text: llm.encode(text)[0].prompt_token_ids for text in TEXTS}
    for text, output in zip(TEXTS, llm.score(TEXTS[0], TEXTS), strict=True):
        expected = F.cosine_similarity(hidden_of(model, ids[TEXTS[0]])[0], hidden_of(model, ids[text])[0], dim=0)
        assert output.outputs.score == pytest.approx(float(expected), abs=1e-5)


def test_a_cross_encoder_reads_both_texts_at_once(crossencoder: Any) -> None:
    llm, model = crossencoder
    queries, documents = ["w1 w2", "w7"], ["w3", "w4 w5 w6"]
    for query, document, output in zip(queries, documents, llm.score(queries, documents), strict=True):
        pair = word_tokenizer().encode(query, document)
        assert output.prompt_token_ids == pair.ids and set(pair.type_ids) == {0, 1}
        expected = reference(model, pair.ids, pair.type_ids)[0].sigmoid()
        assert output.outputs.score == pytest.approx(float(expected), rel=1e-4)
    assert len(llm.score("w1", documents)) == 2
    assert llm.score("w1", "w2")[0].outputs.score == llm.score(["w1"], ["w2"])[0].outputs.score


def test_classes_have_the_labels_and_probabilities_of_the_model(tmp_path: Path) -> None:
    labels = {"id2label": {0: "calm", 1: "glad", 2: "sad"}, "label2id": {"calm": 0, "glad": 1, "sad": 2}}
    for problem, function in ((None, lambda x: x.softmax(-1)), ("multi_label_classification", torch.sigmoid)):
        path, model = encoder_directory(
            tmp_path / f"m-{problem}", "BertForSequenceClassification", problem_type=problem, **labels
        )
        with LLM(build(path, output_dir=tmp_path / f"e-{problem}").path, **OPTIONS) as llm:
            for output in llm.classify(TEXTS):
                expected = function(reference(model, output.prompt_token_ids, [0] * len(output.prompt_token_ids))[0])
                assert output.outputs.probs == pytest.approx(expected.tolist(), rel=1e-4)
                assert output.outputs.labels == ("calm", "glad", "sad")
            with pytest.raises(RequestError, match=r"one that classifies pairs by one label: .* has 3 labels"):
                llm.score("w1", "w2")


def test_each_token_can_be_classified(tmp_path: Path) -> None:
    path, model = encoder_directory(tmp_path / "model", "BertForTokenClassification", problem_type=None)
    with LLM(build(path, output_dir=tmp_path / "engine").path, **OPTIONS) as llm:
        (output,) = llm.encode("w1 w2 w3")
        expected = reference(model, output.prompt_token_ids, [0] * 5)[0].softmax(-1)
        torch.testing.assert_close(output.outputs.data, expected, rtol=1e-4, atol=1e-6)
        with pytest.raises(RequestError, match=r"'classify'.*BertForTokenClassification.* can token_classify"):
            llm.classify("w1")


def test_long_texts_are_refused_with_the_numbers_or_cut_when_asked_for(embedder: Any) -> None:
    llm, _ = embedder
    text = " ".join(["w5"] * 100)
    with pytest.raises(RequestTooLarge, match=r"the prompt has 102 tokens, the model takes 72: shorten it, or .*=-1"):
        llm.embed([text, "w1"])
    whole = llm.encode(text, truncate_prompt_tokens=-1)[0]
    short = llm.encode(text, truncate_prompt_tokens=6)[0]
    assert len(whole.prompt_token_ids) == 72 and short.prompt_token_ids == [2, 9, 9, 9, 9, 3]
    assert llm.encode(list(range(5, 50)), truncate_prompt_tokens=4)[0].prompt_token_ids == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.embed([]) or llm.embed([[]]), "the prompt has no tokens: an encoder needs at least one"),
        (lambda llm: llm.embed([[120]]), "120 is no token id of this model: expected an integer from 0 to 119"),
        (lambda llm: llm.embed([[-1]]), "-1 is no token id of this model"),
        (lambda llm: llm.embed([[True]]), "True is no token id|prompts"),
        (lambda llm: llm.embed(3), "prompts must be text, a list of token ids or a list of those, not 3"),
        (lambda llm: llm.embed(["\ud800"]), "not valid Unicode text"),
        (lambda llm: llm.encode("w1", pooling="max"), "pooling must be one of cls, mean, last, pooler, not 'max'"),
        (lambda llm: llm.classify("w1"), r"pooling_task='classify': .*BertModel\) can embed or token_embed"),
        (lambda llm: llm.encode("w1", truncate_prompt_tokens=0), "must be -1 or from 1 to 72, not 0"),
        (lambda llm: llm.encode("w1", truncate_prompt_tokens=1), "a prompt cannot be cut to 1 tokens: 2 are the"),
        (
            lambda llm: llm.score(["w1", "w2"], ["w3"]),
            "data_1 must be one text, or as many as data_2: there are 2 and 1",
        ),
    ],
)
def test_what_cannot_be_encoded_is_refused(embedder: Any, call: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call(embedder[0])


def test_an_encoder_does_not_generate_and_a_decoder_does_not_encode(embedder: Any, crossencoder: Any) -> None:
    llm, _ = embedder
    with pytest.raises(ConfigError, match=r"BertModel\) is an encoder and generates no text; use encode, embed"):
        llm.generate("w1", SamplingParams(max_tokens=1))

    async def stream() -> None:
        async for _ in llm.generate_async("w1"):
            pass

    with pytest.raises(ConfigError, match="is an encoder"):
        asyncio.run(stream())
    with LLM(Path(__file__).parents[1] / "examples" / "demo_model", num_threads=1) as decoder:
        for method in (decoder.encode, decoder.embed, decoder.classify):
            with pytest.raises(ConfigError, match="generates text and is no encoder; use generate or chat"):
                method("w1")
    with pytest.raises(RequestError, match=r"pooling='pooler': .* has no pooler|can classify"):
        crossencoder[0].encode("w1", pooling="pooler")


def test_a_closed_encoder_says_so_and_gives_its_memory_back(tmp_path: Path) -> None:
    path, _ = encoder_directory(tmp_path / "model", "BertModel")
    llm = LLM(build(path, output_dir=tmp_path / "engine").path, **OPTIONS)
    llm.embed("w1")
    is_mapped = str(tmp_path / "engine") in Path("/proc/self/maps").read_text()
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="this engine is closed"):
        llm.embed("w1")
    assert is_mapped and str(tmp_path / "engine") not in Path("/proc/self/maps").read_text()


def test_an_encoder_that_does_not_fit_says_so_with_the_numbers_and_what_to_give_less_of(
    embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, _ = embedder
    monkeypatch.setattr(plan_runner, "available_memory", lambda: 100_000)
    wanted = r"memory available 0\.1 MB, weights .* MB, arena .* MB; give less max_num_batched_tokens"
    with pytest.raises(OutOfMemory, match=wanted):
        EncoderRunner(llm.engine, RuntimeConfig(num_threads=1))


def test_a_failed_batch_ends_with_its_error_and_the_next_is_computed(tmp_path: Path, monkeypatch: Any) -> None:
    path, _ = encoder_directory(tmp_path / "model", "BertModel")
    with LLM(build(path, output_dir=tmp_path / "engine").path, **OPTIONS) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "normalize", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                llm.embed("w1")
        assert len(llm.embed("w1")[0].outputs.embedding) == 48


def test_a_sentence_transformers_directory_says_how_to_pool_and_how_long_texts_are(tmp_path: Path) -> None:
    path, model = encoder_directory(tmp_path / "model", "BertModel")
    write_sentence_files(path)
    with LLM(path, **OPTIONS) as llm:  # in a child process, and cached
        assert llm.engine.manifest.max_model_len == 40
        for output in llm.embed(TEXTS[:2]):
            expected = F.normalize(hidden_of(model, output.prompt_token_ids).mean(0), dim=0)
            assert output.outputs.embedding == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5)
        with pytest.raises(RequestTooLarge, match="has 52 tokens, the model takes 40"):
            llm.embed(TEXTS)
    before = cache.engine_path(path, BuildConfig())
    write_sentence_files(path, mode="pooling_mode_lasttoken")
    assert cache.engine_path(path, BuildConfig()) != before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"mode": "pooling_mode_max_tokens"},
            UnsupportedModel,
            "1_Pooling/config.json: pools by pooling_mode_max_tokens",
        ),
        (
            {"pooling_mode_lasttoken": True},
            UnsupportedModel,
            "pooling_mode_mean_tokens, pooling_mode_lasttoken; supp",
        ),
        (
            {"pooling_mode": "weightedmean"},
            UnsupportedModel,
            "is 'weightedmean': supported are cls, mean, lasttoken",
        ),
        ({"pooling_mode_cls_token": 3}, CheckpointError, "'pooling_mode_cls_token' is 3, expected true or false"),
        ({"max_len": 1}, CheckpointError, "'max_seq_length' is 1, expected an integer from 2"),
    ],
)
def test_what_no_built_in_model_pools_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    path, _ = encoder_directory(tmp_path / "model", "BertModel")
    write_sentence_files(path, **change)
    with pytest.raises(error, match=message):
        build(path, output_dir=tmp_path / "engine")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"a": 1}, "expected a list of modules"),
        (
            [{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "1"}],
            "modules Transformer, Dense; supp",
        ),
        ([{"type": "x.Transformer", "path": "0"}, {"type": "x.Pooling", "path": "1"}], "keeps its Transformer in '0'"),
        (
            [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "../1"}],
            "'../1' is no folder",
        ),
    ],
)
def test_modules_that_are_not_known_are_refused(tmp_path: Path, modules: Any, message: str) -> None:
    path, _ = encoder_directory(tmp_path / "model", "BertModel")
    (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=message):
        build(path, output_dir=tmp_path / "engine")


def test_more_tokens_than_positions_are_refused_at_build(tmp_path: Path) -> None:
    path, _ = encoder_directory(tmp_path / "model", "RobertaModel")
    with pytest.raises(ConfigError, match=r"max_model_len \(71\) must be at most 70: this model has no more positions"):
        build(path, output_dir=tmp_path / "engine", max_model_len=71)


def test_a_server_takes_no_encoder_without_embeddings_and_says_what_does(crossencoder: Any) -> None:
    engine = crossencoder[0].engine
    said = (
        rf"^{re.escape(str(engine.path))} \(BertForSequenceClassification\) scores texts and has no embeddings, .*: use"
    )
    with pytest.raises(EngineError, match=rf"{said} LLM\.classify or LLM\.score$"):
        EncoderWorker.load(engine, RuntimeConfig())

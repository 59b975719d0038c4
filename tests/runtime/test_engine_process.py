"""The engine process's loop over a real socket, with a fake model: commands in, one report a step out, no way to end it
but to close the socket."""

import socket
import threading
from collections.abc import Iterator

import pytest

from tritium import wire
from tritium.errors import EngineError
from tritium.runtime.decoder_worker import DecoderWorker
from tritium.runtime.engine_loop import EngineLoop
from tritium.runtime.engine_process import EngineProcess, serve
from tritium.runtime.make_request import RequestMaker
from tritium.testing.fake_executor import FakeExecutor, expected_tokens, make_scheduler
from tritium.wire import (
    Abort,
    Commands,
    Encode,
    Failed,
    FrameBuffer,
    Output,
    Ready,
    Report,
    Start,
    Submit,
    Text,
    decode_for_server,
    frame,
)

PROMPT = [5, 6, 7]


class Harness:
    """The server's end of the socket."""

    def __init__(self) -> None:
        self.connection, self.its = socket.socketpair()
        self.connection.settimeout(60)
        self.executor = FakeExecutor()
        self.failure: BaseException | None = None
        self._buffer = FrameBuffer()
        self._bodies: list[bytes] = []
        loop = EngineLoop(make_scheduler(), self.executor, seed=0)
        self._process = EngineProcess(self.its, DecoderWorker(loop, RequestMaker(None, (3,), "engine")))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._process.run()
        except EngineError as error:
            self.failure = error

    def send(self, *commands: Submit | Abort | Encode) -> None:
        self.connection.sendall(frame(Commands(list(commands))))

    def reports(self) -> Iterator[Report]:
        while True:
            while not self._bodies:
                self._bodies = self._buffer.feed(self.connection.recv(1 << 16))
            report = decode_for_server(self._bodies.pop(0))
            assert isinstance(report, Report)
            yield report

    def outputs(self, count: int) -> dict[str, list[Output]]:
        """Everything up to the end of so many requests, by request."""
        found: dict[str, list[Output]] = {}
        for report in self.reports():
            for output in report.outputs:
                found.setdefault(output.request_id, []).append(output)
            if sum(outputs[-1].finish_reason is not None for outputs in found.values()) == count:
                return found
        raise AssertionError

    def end(self) -> None:
        self.connection.close()
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def engine() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.end()


def submit(name: str, *, prompt: list[int] = PROMPT, is_streaming: bool = True, **params: object) -> Submit:
    return Submit(name, prompt, {"max_tokens": 6, "ignore_eos": True, **params}, is_streaming)


def test_streamed_tokens_come_one_a_step_and_are_the_models(engine: Harness) -> None:
    engine.send(submit("a"), submit("b", prompt=[9] * 40), submit("c", is_streaming=False, logprobs=2))
    found = engine.outputs(3)
    for name, prompt in (("a", PROMPT), ("b", [9] * 40)):
        assert [token for output in found[name] for token in output.token_ids] == expected_tokens(prompt, 6)
        assert len(found[name]) == 6
    [whole] = found["c"]
    assert whole.token_ids == expected_tokens(PROMPT, 6)
    assert [token.top for token in whole.logprobs] == [[(1, -0.5), (2, -1.5)]] * 6
    assert whole.arrival <= whole.first_token <= whole.finished


def test_all_outputs_of_a_step_are_one_report(engine: Harness) -> None:
    engine.send(*(submit(f"r{i}") for i in range(4)))
    sizes = []
    for report in engine.reports():
        sizes.append(len(report.outputs))
        assert report.stats["num_running"] <= 4
        if sum(sizes) == 24:
            break
    assert sizes == [4] * 6


def test_an_idle_engine_answers_when_asked_and_is_silent_otherwise(engine: Harness) -> None:
    engine.send()
    report = next(engine.reports())
    assert (report.outputs, report.num_batches, report.stats["num_running"]) == ([], 0, 0)
    engine.connection.settimeout(0.05)
    with pytest.raises(TimeoutError):
        engine.connection.recv(1)


def test_refused_requests_are_told_why_and_others_run(engine: Harness) -> None:
    engine.send(
        submit("zero", max_tokens=0),
        submit("unknown", temprature=1),
        submit("long", prompt=[1] * 200),
        submit("empty", prompt=[]),
        submit("negative", prompt=[-1]),
        Encode("texts", [Text([1]), Text([2])]),
        submit("good"),
    )
    found = engine.outputs(7)
    refusals = {name: (outputs[0].refusal, outputs[0].error) for name, outputs in found.items()}
    assert refusals.pop("good") == (None, None)
    kind, said = refusals.pop("texts")
    assert kind == "RequestError" and said == (
        "request 'texts' asks for embeddings of 2 texts: this engine generates text and is no encoder; "
        "ask one that is, or for completions"
    )
    assert {name: kind for name, (kind, _) in refusals.items()} == {
        **dict.fromkeys(("zero", "unknown", "empty", "negative"), "RequestError"),
        "long": "RequestTooLarge",
    }
    assert "'temprature'" in refusals["unknown"][1] and "200 tokens" in refusals["long"][1]


def test_an_abort_ends_one_request_and_an_unknown_one_nothing(engine: Harness) -> None:
    is_asked = threading.Event()
    engine.executor.before_step = lambda batch: engine.executor.num_steps == 1 or is_asked.wait(60)  # none runs ahead
    engine.send(submit("a", max_tokens=100), submit("b"), Abort("nobody"))
    engine.send(Abort("a"))
    is_asked.set()
    found = engine.outputs(2)
    assert found["a"][-1].finish_reason == "abort"
    assert found["b"][-1].finish_reason == "length"


def test_a_step_that_raises_ends_its_requests_and_the_next_one_runs(engine: Harness) -> None:
    engine.executor.fails_on = {"a"}
    engine.send(submit("a"))
    assert engine.outputs(1)["a"][-1].error == "ArithmeticError: kernel failed for a"
    engine.send(submit("b"))
    assert engine.outputs(1)["b"][-1].finish_reason == "length"


def test_an_answer_too_large_for_a_message_ends_its_own_request_alone(
    engine: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME", 1000)
    engine.send(submit("large", is_streaming=False, max_tokens=60, logprobs=2))
    engine.send(submit("small", is_streaming=False, max_tokens=60))
    found = engine.outputs(2)
    assert found["large"][0].finish_reason == "error"
    assert "bytes, more than the" in found["large"][0].error and "ask for less" in found["large"][0].error
    assert found["small"][0].token_ids == expected_tokens(PROMPT, 60)


@pytest.mark.parametrize("data", [b"\xff" * 8, b"\x00\x00\x00\x01\xc1", frame(Start("x", {}))])
def test_what_is_no_command_ends_the_process_with_an_error(engine: Harness, data: bytes) -> None:
    engine.connection.sendall(data)
    engine.thread.join(60)
    assert isinstance(engine.failure, EngineError)


def test_a_server_that_goes_away_in_the_middle_ends_the_process(engine: Harness) -> None:
    engine.send(submit("a", max_tokens=100))
    next(engine.reports())
    engine.connection.close()
    engine.thread.join(60)
    assert not engine.thread.is_alive()


def test_an_engine_that_cannot_be_loaded_is_said_by_its_class(tmp_path) -> None:
    ours, its = socket.socketpair()
    with ours, its:
        ours.sendall(frame(Start(str(tmp_path), {})))
        serve(its)
        [body] = FrameBuffer().feed(ours.recv(1 << 16))
    failed = decode_for_server(body)
    assert isinstance(failed, Failed) and not isinstance(failed, Ready)
    assert failed.kind == "EngineError" and str(tmp_path) in failed.message

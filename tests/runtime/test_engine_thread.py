"""The engine thread: work from many threads, a door that can be closed, exceptions that reach the right side."""

import threading
from queue import SimpleQueue

import pytest

from tritium.errors import EngineError, OutOfMemory, RequestTooLarge
from tritium.runtime.engine_loop import EngineLoop
from tritium.runtime.engine_thread import EngineThread
from tritium.runtime.request import Request
from tritium.sampling_params import SamplingParams
from tritium.testing.fake_executor import FakeExecutor, expected_tokens, make_scheduler

TIMEOUT = 20  # seconds


class Rig:
    """An engine thread over the fake model."""

    def __init__(self):
        self.executor = FakeExecutor()
        self.made_on: list[threading.Thread] = []
        self.thread = EngineThread(self._make)

    def _make(self):
        self.made_on.append(threading.current_thread())
        return EngineLoop(make_scheduler(), self.executor)

    def submit(self, request_id, prompt, max_tokens=5, is_streaming=False):
        heard = SimpleQueue()
        request = Request(request_id, prompt, SamplingParams(max_tokens=max_tokens))
        self.thread.submit(request, heard.put, is_streaming=is_streaming)
        return heard


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.thread.close()


def test_the_loop_is_made_and_run_on_one_thread_of_its_own(rig):
    ran_on = set()
    rig.executor.before_step = lambda batch: ran_on.add(threading.current_thread())
    rig.submit("r", [1]).get(timeout=TIMEOUT)
    assert ran_on == set(rig.made_on)
    assert threading.current_thread() not in ran_on


def test_many_threads_may_submit_at_once(rig):
    results = {}

    def client(name):
        for i in range(10):
            prompt = [name + 1, i + 1]
            output = rig.submit(f"{name}-{i}", prompt).get(timeout=TIMEOUT)
            results[name, i] = list(output.token_ids) == expected_tokens(prompt, 5)

    clients = [threading.Thread(target=client, args=(name,)) for name in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert len(results) == 60
    assert all(results.values())


def test_what_making_the_loop_raises_is_raised_to_whoever_wanted_it():
    def make():
        raise OutOfMemory("no room")

    with pytest.raises(OutOfMemory, match="no room"):
        EngineThread(make)


def test_a_refused_request_gets_its_exception_and_the_next_one_runs(rig):
    output = rig.submit("long", list(range(1, 200))).get(timeout=TIMEOUT)
    assert isinstance(output.refusal, RequestTooLarge)
    assert output.finish_reason == "error"
    assert rig.submit("ok", [1]).get(timeout=TIMEOUT).token_ids == tuple(expected_tokens([1], 5))


def test_an_abort_from_another_thread_ends_a_running_request(rig):
    first_step, may_go_on = threading.Event(), threading.Event()

    def pause(batch):
        first_step.set()
        assert may_go_on.wait(TIMEOUT)

    rig.executor.before_step = pause
    heard = rig.submit("r", [1], max_tokens=100)
    assert first_step.wait(TIMEOUT)
    rig.thread.abort("r")
    may_go_on.set()
    output = heard.get(timeout=TIMEOUT)
    assert output.finish_reason == "abort"
    assert len(output.token_ids) < 100


def test_closing_ends_running_requests_and_refuses_new_ones(rig):
    entered = threading.Event()
    rig.executor.before_step = lambda batch: entered.set()
    heard = rig.submit("r", [1], max_tokens=120, is_streaming=True)
    assert entered.wait(TIMEOUT)
    rig.thread.close()
    rig.thread.close()
    assert not rig.thread.is_alive
    outputs = []
    while not heard.empty():
        outputs.append(heard.get())
    assert outputs[-1].finish_reason in ("abort", "length")
    with pytest.raises(EngineError, match="closed"):
        rig.submit("late", [1])


def test_a_scheduler_that_fails_ends_every_request_and_the_thread_goes_on(rig, monkeypatch):
    scheduler = rig.thread.running_loop.scheduler
    schedule = scheduler.schedule
    failures = iter([ZeroDivisionError("bookkeeping")])

    def fail_once():
        for error in failures:
            raise error
        return schedule()

    monkeypatch.setattr(scheduler, "schedule", fail_once)
    output = rig.submit("r", [1]).get(timeout=TIMEOUT)
    assert output.error == "ZeroDivisionError: bookkeeping"
    assert rig.submit("next", [2]).get(timeout=TIMEOUT).finish_reason == "length"


def test_an_idle_engine_does_nothing(rig):
    rig.submit("r", [1]).get(timeout=TIMEOUT)
    steps = rig.executor.num_steps
    threading.Event().wait(0.05)
    assert rig.executor.num_steps == steps


def test_everybody_hears_of_the_end_even_when_nothing_works_any_more(rig, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("bookkeeping")

    may_go_on = threading.Event()
    rig.executor.before_step = lambda batch: may_go_on.wait(TIMEOUT)
    heard = [rig.submit(str(i), [i + 1], max_tokens=100) for i in range(3)]
    scheduler = rig.thread.running_loop.scheduler
    for method in ("schedule", "abort"):
        monkeypatch.setattr(scheduler, method, broken)
    may_go_on.set()
    for queue in heard:
        output = queue.get(timeout=TIMEOUT)
        assert (output.finish_reason, output.error) == ("error", "ZeroDivisionError: bookkeeping")
    assert rig.thread.is_alive


def test_closing_does_not_wait_for_a_step_that_waits_for_another_process(monkeypatch):
    monkeypatch.setattr("tritium.runtime.engine_thread._CLOSE_SECONDS", 0.05)
    rig, other, begun = Rig(), threading.Event(), threading.Event()

    def wait(batch):
        begun.set()
        assert other.wait(TIMEOUT)

    rig.executor.before_step = wait
    monkeypatch.setattr(rig.thread.running_loop, "let_go", other.set)
    heard = rig.submit("r", [1])
    assert begun.wait(TIMEOUT)
    rig.thread.close()
    assert not rig.thread.is_alive
    assert heard.get(timeout=TIMEOUT).finish_reason == "abort"

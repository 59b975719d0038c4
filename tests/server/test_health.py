"""What counts as health: progress, by a clock of our own."""

from tritium.server.health import EngineHealth
from tritium.wire import Report

IDLE = {"num_running": 0, "num_waiting": 0}
BUSY = {"num_running": 2, "num_waiting": 1}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def started() -> tuple[EngineHealth, Clock]:
    clock = Clock()
    health = EngineHealth(10, clock)
    health.note_start()
    return health, clock


def test_before_its_start_and_after_its_end_an_engine_is_restarting() -> None:
    health = EngineHealth(10)
    assert health.status == "restarting"
    health.note_start()
    assert (health.status, health.num_restarts) == ("ok", 0)
    health.note_end()
    assert health.status == "restarting"
    health.note_start()
    assert (health.status, health.num_restarts) == ("ok", 1)


def test_an_idle_engine_that_answers_is_well_and_one_that_does_not_is_stalled() -> None:
    health, clock = started()
    for _ in range(5):
        clock.now += 9
        health.note_report(Report([], IDLE, 0))
        assert health.status == "ok"
    clock.now += 10
    assert health.status == "stalled"


def test_answers_alone_are_no_progress_while_there_is_work() -> None:
    health, clock = started()
    for _ in range(4):
        clock.now += 3
        health.note_report(Report([], BUSY, 0))
    assert health.status == "stalled"
    assert health.describe() == {
        "status": "stalled",
        "seconds_without_progress": 12.0,
        "num_batches": 0,
        "num_restarts": 0,
        **BUSY,
    }
    health.note_report(Report([], BUSY, 1))
    assert health.status == "ok"


def test_the_error_of_a_failed_start_is_shown_until_one_succeeds() -> None:
    health, _ = started()
    health.note_end()
    health.last_error = "no memory"
    assert health.describe()["last_error"] == "no memory"
    health.note_start()
    assert "last_error" not in health.describe()

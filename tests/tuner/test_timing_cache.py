"""The timing cache: what was measured here is found again, what was measured elsewhere never, and nothing is lost."""

import json
import math
import subprocess
import sys

import pytest

from tritium.errors import ConfigError
from tritium.tuner.timing_cache import TimingCache

HERE, THERE = {"hardware": "this", "torch": "1"}, {"hardware": "that", "torch": "1"}


def test_what_was_saved_is_found_by_another_process_of_the_same_environment_only(tmp_path):
    path = tmp_path / "deep" / "timings.json"
    cache = TimingCache(HERE, path)
    assert cache.get("a") is None
    cache.put("a", 0.25)
    assert cache.get("a") == 0.25
    cache.save()
    assert TimingCache(HERE, path).get("a") == 0.25
    assert TimingCache(THERE, path).get("a") is None
    assert TimingCache(HERE | {"torch": "2"}, path).get("a") is None


def test_two_processes_that_save_at_once_lose_nothing(tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom tritium.tuner.timing_cache import TimingCache\n"
        "for i in range(30):\n"
        "    cache = TimingCache({'hardware': 'this'}, Path(sys.argv[1]))\n"
        "    cache.put(f'{sys.argv[2]} {i}', float(i))\n    cache.save()\n"
    )
    path = tmp_path / "timings.json"
    children = [subprocess.Popen([sys.executable, "-c", script, path, name]) for name in "ab"]
    assert [child.wait() for child in children] == [0, 0]
    cache = TimingCache({"hardware": "this"}, path)
    assert all(cache.get(f"{name} {i}") == i for name in "ab" for i in range(30))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["timings.json", "timings.lock"]


def test_times_travel_by_export_and_merge_and_those_of_other_machines_are_kept_apart(tmp_path):
    mine, theirs = TimingCache(HERE, tmp_path / "mine"), TimingCache(THERE, tmp_path / "theirs")
    mine.put("a", 1.0)
    mine.save()
    theirs.put("b", 2.0)
    theirs.save()
    assert theirs.export(tmp_path / "exported") == 1
    assert mine.merge(tmp_path / "exported") == (0, 1)
    assert (mine.get("a"), mine.get("b")) == (1.0, None)
    assert TimingCache(THERE, tmp_path / "mine").get("b") == 2.0
    again = TimingCache(HERE, tmp_path / "new")
    assert again.merge(tmp_path / "mine") == (1, 1)
    assert again.get("a") == 1.0


def test_a_machines_gpu_is_exported_and_counted_with_it(tmp_path):
    for environment, seconds in ((HERE, 1.0), (THERE, 2.0), ({"hardware": "a third"}, 3.0)):
        cache = TimingCache(environment, tmp_path / "t")
        cache.put("a", seconds)
        cache.save()
    both = TimingCache(HERE, tmp_path / "t", beside=[THERE])
    assert both.get("a") == 1.0
    assert both.export(tmp_path / "exported") == 2
    assert both.merge(tmp_path / "t") == (2, 1)


def test_the_newer_time_of_two_counts(tmp_path):
    for seconds in (1.0, 2.0):
        cache = TimingCache(HERE, tmp_path / "t")
        cache.put("a", seconds)
        cache.save()
    assert TimingCache(HERE, tmp_path / "t").get("a") == 2.0


def test_what_cannot_run_is_known_to_be_so_by_the_next_process_until_it_is_measured(tmp_path):
    cache = TimingCache(HERE, tmp_path / "t")
    cache.put("a", math.inf)
    assert cache.get("a") == math.inf
    cache.save()
    again = TimingCache(HERE, tmp_path / "t")
    assert (again.get("a"), TimingCache(THERE, tmp_path / "t").get("a")) == (math.inf, None)
    again.put("a", 0.5)
    again.save()
    assert TimingCache(HERE, tmp_path / "t").get("a") == 0.5


def test_denied_names_stay_denied(tmp_path):
    TimingCache(HERE, tmp_path / "t").deny(["eager.linear"])
    cache = TimingCache(HERE, tmp_path / "t")
    cache.deny(["cpu.paged_attention:item_rows=32"])
    assert TimingCache(THERE, tmp_path / "t").denied == ("cpu.paged_attention:item_rows=32", "eager.linear")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no file of timings"),
        ('{"format": "x"}', "is a 'x' of version 1, not 'tritium-timings' 1"),
        ('{"version": 7}', "of version 7"),
        ('{"environments": 3}', "is no file of timings"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path, text, words):
    (tmp_path / "t").write_text(text)
    with pytest.raises(ConfigError, match=rf"/t .*{words}.*remove it"):
        TimingCache(HERE, tmp_path / "t")
    with pytest.raises(ConfigError, match="no such file of timings"):
        TimingCache(HERE, tmp_path / "u").merge(tmp_path / "absent")


def test_the_file_is_json_a_person_can_read(tmp_path):
    cache = TimingCache(HERE, tmp_path / "t")
    cache.put("linear@16:cpu.linear", 0.5)
    cache.save()
    [environment] = json.loads((tmp_path / "t").read_text())["environments"]
    assert environment == {"environment": HERE, "seconds": {"linear@16:cpu.linear": 0.5}}

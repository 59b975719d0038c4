"""What connects ranks on CPUs, and what is left of it afterwards."""

import os
from pathlib import Path

import pytest
import torch
from torch import distributed

from tritium.errors import EngineError
from tritium.runtime.gloo import GlooCommunicator


def test_nothing_stays_open_once_it_is_closed(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    ranks = GlooCommunicator(distributed.FileStore(str(tmp_path / "store"), 1), 0, 1)
    assert ranks.smallest([5, 3]) == [5, 3]
    assert len(os.listdir("/proc/self/fd")) > len(before)
    ranks.close()
    ranks.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(EngineError, match="rank 0 of 1 has let go of the others"):
        ranks.all_gather(torch.empty(1, 1), torch.ones(1))

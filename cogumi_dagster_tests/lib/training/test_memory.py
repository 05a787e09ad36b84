from pathlib import Path

import numpy as np
import pytest

from cogumi_dagster.lib.training import memory


def test_the_peak_is_of_the_run_and_not_of_what_came_before() -> None:
    before = np.ones(40_000_000)  # 320 MB
    del before
    peak = memory.PeakMemory("cpu")
    start = peak.bytes()
    block = np.ones(12_500_000)  # 100 MB
    del block
    grown = peak.bytes() - start
    if memory.CLEAR.exists():
        assert 80e6 < grown < 200e6
    else:
        assert grown >= 0


def test_without_proc_the_process_s_own_peak_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none" / "either")
    assert memory.PeakMemory("cpu").bytes() > 10_000_000

import subprocess
import sys
from pathlib import Path

import pytest

from cogumi_dagster.lib.training import memory

PEAK_OF_A_RUN = """
import numpy as np
from cogumi_dagster.lib.training import memory
before = np.ones(40_000_000)  # 320 MB
del before
peak = memory.PeakMemory("cpu")
start = peak.bytes()
block = np.ones(12_500_000)  # 100 MB
del block
print(peak.bytes() - start)
"""


def test_the_peak_is_of_the_run_and_not_of_what_came_before() -> None:
    said = subprocess.run([sys.executable, "-c", PEAK_OF_A_RUN], capture_output=True, text=True, check=True).stdout
    grown = int(said)
    if memory.CLEAR.exists():
        assert 80e6 < grown < 200e6
    else:
        assert grown >= 0


FAULTS_OF_STEPS = """
import resource
import numpy as np
from cogumi_dagster.lib.training import memory
def steps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(5_000_000)  # 40 MB, 9,765 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = steps()
with memory.reused_memory():
    np.ones(5_000_000)
    kept = steps()
held = np.ones(5_000_000)
del held
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
held = np.ones(5_000_000)
with_it = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
print(given_back, kept, steps(), with_it - resident)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_what_is_freed_is_reused_inside_and_given_back_after() -> None:
    said = subprocess.run([sys.executable, "-c", FAULTS_OF_STEPS], capture_output=True, text=True, check=True).stdout
    before, inside, after, held = map(int, said.split())
    assert inside < before / 5
    assert after > before / 2 and held > 30e6, "as before"


GAPS = """
import resource
import numpy as np
from cogumi_dagster.lib.training import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
with memory.reused_memory() as give_back:
    held = [np.ones(5_000_000) for _ in range(6)]
    del held[:-1]  # 200 MB below what is still held
    before = resident()
    give_back()
    print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_gaps_are_given_back_when_told_to() -> None:
    said = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=True).stdout
    assert int(said) > 150e6


def test_without_proc_the_process_s_own_peak_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none" / "either")
    assert memory.PeakMemory("cpu").bytes() > 10_000_000

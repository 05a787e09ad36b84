"""Limits that the kernel keeps: memory, and the one accelerator across processes."""

import fcntl
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import yaml

from resources import build_resources
from resources.compute import ComputeResource

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")
PATIENCE = 60


def compute(folder: Path, **values: Any) -> ComputeResource:
    profile = folder / "profile.yaml"
    profile.write_text(yaml.safe_dump({"compute": values}))
    return build_resources(str(profile))["compute"]  # type: ignore[no-any-return]


GREEDY = """
import sys
from resources import build_resources
compute = build_resources(sys.argv[1])["compute"]
bytearray(3_000_000_000)
with compute.limits():
    bytearray(100_000_000)
    try:
        bytearray(3_000_000_000)
        print("had 3 GB of 2")
    except MemoryError:
        print("refused")
    {more}
bytearray(3_000_000_000)
print("free again")
"""
TORCH = """
    import torch
    try:
        torch.empty(3_000_000_000, dtype=torch.uint8)
        print("torch had 3 GB of 2")
    except RuntimeError as error:
        from cogumi_dagster.lib.errors import out_of_memory
        print("torch refused", out_of_memory(error))
"""


@pytest.mark.parametrize(
    ("more", "said"),
    [("", ["refused", "free again"]), (TORCH, ["refused", "torch refused True", "free again"])],
    ids=["python", "torch"],
)
def test_an_allocation_above_the_limit_fails(tmp_path: Path, more: str, said: list[str]) -> None:
    compute(tmp_path, memory_gb=2)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GREEDY.format(more=more), str(tmp_path / "profile.yaml")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == said


EMPTY = """
import sys
import numpy as np
from resources import build_resources
from cogumi_dagster.lib.training.memory import reused_memory, unused_addresses

compute = build_resources(sys.argv[1])["compute"]
with reused_memory():
    held = [np.ones(5_000_000) for _ in range(60)]  # 40 MB each
    del held[:-1]  # with the last at the end, the addresses stay the process's
with compute.limits():
    print(unused_addresses() > 2e9, len(bytearray(1_500_000_000)))
    held += [np.ones(7_500_000) for _ in range(30)]  # the process has 1.8 of its 2 GB
    print(len(held))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux counts addresses")
def test_what_earlier_steps_left_empty_does_not_count(tmp_path: Path) -> None:
    compute(tmp_path, memory_gb=2)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EMPTY, str(tmp_path / "profile.yaml")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["True 1500000000", "31"]


def test_the_limit_ends_with_the_step_also_when_it_fails(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(ZeroDivisionError), compute(tmp_path, memory_gb=64).limits():
        assert 64e9 <= resource.getrlimit(resource.RLIMIT_DATA)[0] < 70e9
        _ = 1 / 0
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def hold(lease: Callable[[Path], Any], folder: Path, said: Connection, seconds: float) -> None:
    with lease(folder):
        said.send(time.monotonic())
        time.sleep(seconds)
        said.send(time.monotonic())


def holder(lease: Callable[[Path], Any], folder: Path, seconds: float) -> tuple[Any, Connection]:
    heard, said = FORK.Pipe(duplex=False)
    process = FORK.Process(target=hold, args=(lease, folder, said, seconds), daemon=True)
    process.start()
    said.close()
    return process, heard


def times(heard: Connection) -> tuple[float, float]:
    assert heard.poll(PATIENCE)
    start: float = heard.recv()
    assert heard.poll(PATIENCE)
    return start, heard.recv()


def test_two_processes_never_hold_the_lease_together(tmp_path: Path) -> None:
    lease = compute(tmp_path).gpu_lease
    holders = [holder(lease, tmp_path / "new", 0.15) for _ in range(4)]
    spans = sorted(times(heard) for _, heard in holders)
    for process, _ in holders:
        process.join(PATIENCE)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_a_killed_holder_frees_the_lease(tmp_path: Path) -> None:
    lease = compute(tmp_path).gpu_lease
    process, heard = holder(lease, tmp_path, 600)
    assert heard.poll(PATIENCE)
    with (tmp_path / "gpu.lock").open("r+") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(process.pid, signal.SIGKILL)
        process.join(PATIENCE)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_lock_names_its_holder(tmp_path: Path) -> None:
    with compute(tmp_path).gpu_lease(tmp_path):
        assert (tmp_path / "gpu.lock").read_text() == str(os.getpid())

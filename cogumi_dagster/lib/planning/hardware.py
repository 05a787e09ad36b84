"""What a plan is made for: this machine, measured, and accelerators from their data sheets."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

ACCELERATORS = Path(__file__).resolve().parents[3] / "resources" / "hardware.yaml"
THIS_MACHINE = "this machine"

ACCELERATOR_UTILIZATION = 0.19
"""Share of the data sheet's dense bf16 rate that LoRA training of a student of 1.2 billion parameters reached on an
H100 (docs/results.md), every token counted; 0.14 on NF4 weights. A larger one has more work in each kernel and reaches
more (Llama 3's pretraining 0.38 to 0.43, arXiv 2407.21783), one under a billion less: 135M parameters 0.004."""
CPU_UTILIZATION = 0.65
"""Assumed share of the measured matrix-product rate: profile quick's QLoRA did 71 GFLOP/s (133 tokens/s) on two quiet
cores that multiply float32 matrices at 54 each."""


@dataclass(frozen=True)
class Device:
    """Rates are a second: multiply-adds count two, bandwidth is of reading memory."""

    name: str
    flops: float
    memory_bytes: int
    bandwidth: float
    item_bytes: int
    """Of a number in training: 2 where bfloat16 is multiplied natively, else 4."""
    utilization: float
    basis: str

    @property
    def training_flops(self) -> float:
        """What training is assumed to reach."""
        return self.utilization * self.flops


def accelerators() -> list[Device]:
    """The accelerators of resources/hardware.yaml."""
    data = yaml.safe_load(ACCELERATORS.read_text(encoding="utf-8"))
    return [
        Device(
            name=name,
            flops=1e12 * entry["bf16_tflops"],
            memory_bytes=round(1e9 * entry["memory_gb"]),
            bandwidth=1e9 * entry["bandwidth_gbs"],
            item_bytes=2,
            utilization=ACCELERATOR_UTILIZATION,
            basis="data sheet, dense bf16",
        )
        for name, entry in data.items()
    ]


def this_machine(seconds: float = 0.3) -> Device:
    """This machine's processors: a float32 matrix product and a copy, each the best of ``seconds``.

    Where bfloat16 is multiplied natively, an instruction does two of its products for one in float32.
    """
    import numpy as np
    import psutil

    left, right = np.ones((768, 768), np.float32), np.ones((768, 768), np.float32)
    source, target = np.ones(1 << 24, np.float32), np.empty(1 << 24, np.float32)
    product = _best(lambda: np.matmul(left, right), seconds)
    copy = _best(lambda: np.copyto(target, source), seconds)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    measured, bandwidth = 2.0 * 768**3 / product, 2.0 * source.nbytes / copy
    twice = _multiplies_bfloat16()
    taken = ", bfloat16 taken as twice" if twice else ""
    return Device(
        name=THIS_MACHINE,
        flops=(2 if twice else 1) * measured,
        memory_bytes=psutil.virtual_memory().total,
        bandwidth=bandwidth,
        item_bytes=2 if twice else 4,
        utilization=CPU_UTILIZATION,
        basis=f"{cores} cores, measured now: {measured / 1e9:.0f} GFLOP/s float32{taken}, {bandwidth / 1e9:.0f} GB/s",
    )


def _best(work: Callable[[], object], seconds: float) -> float:
    """The shortest run of ``work`` in about ``seconds``, after one to warm up."""
    work()
    best, ends = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def _multiplies_bfloat16() -> bool:
    """As ``training.precision`` asks torch, which takes seconds to load."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags

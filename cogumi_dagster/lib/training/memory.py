"""Memory of a run: the most that it takes, and what it frees."""

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
TRIM_THRESHOLD, MMAP_MAX = 128 * 1024, 65536
"""Of ``malloc.h``: the options' numbers and their defaults."""
PRODUCT_MULTIPLE = 32
"""Tokens to which examples in attention, and the supervised ones, are filled: oneDNN keeps half a megabyte of code for
each size of a product, for good. Lengths as they come cost a training of 135M parameters 20 MB a step, and what lay
between them 50 more."""
UNPACKED_SHARE = 0.25
"""NF4 weights are unpacked for good where they take at most this share of the memory."""


def memory_limit() -> int:
    """Bytes that this process may take: the machine's, or the limit that was set on it."""
    import psutil

    total = psutil.virtual_memory().total
    try:
        import resource
    except ImportError:
        return int(total)
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return int(total if limit == resource.RLIM_INFINITY else min(total, limit))


def fits_unpacked(unpacked_bytes: int, memory_bytes: int) -> bool:
    return unpacked_bytes <= UNPACKED_SHARE * memory_bytes


@contextlib.contextmanager
def reused_memory() -> Iterator[Callable[[], None]]:
    """Inside, this process reuses what it frees instead of giving it back until told to; glibc only.

    A training step frees and takes large tensors again and again. By default each is mapped anew, and writing its
    pages for the first time cost a third of a step. Where steps take other sizes, the gaps that are left between them
    grow, so the yielded function, which gives them back, is to be called every few steps.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # another system's library
        yield lambda: None
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield lambda: malloc_trim(0)
    finally:
        mallopt(M_MMAP_MAX, MMAP_MAX)
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        malloc_trim(0)


def give_back_memory() -> None:
    """Collect what only cycles hold, and give what was freed back to the system (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def unused_addresses() -> int:
    """Bytes that count against ``RLIMIT_DATA`` and have nothing in them (Linux): what earlier steps freed and gave
    back, between things that stay. Large tensors find room there again, but a run of twenty steps came to its 14 GB
    with 4 in use."""
    try:
        status = STATUS.read_text()
    except OSError:
        return 0
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE))
    data, *filled = (int(kilobytes.get(name, 0)) for name in ("VmData", "RssAnon", "VmSwap"))
    return max(0, 1024 * (data - sum(filled)))


class PeakMemory:
    """Counts from its making on: on a GPU what torch allocated there, on a CPU what the process held.

    On a CPU the libraries count too. Where the system cannot start the count anew (other than Linux), it is the most
    that the process ever held.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                CLEAR.write_text("5")  # starts VmHWM anew

    def bytes(self) -> int:
        """The peak so far."""
        if self.device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        try:
            (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
            return 1024 * int(line.split()[1])
        except (OSError, ValueError):
            import resource
            import sys

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else 1024 * peak

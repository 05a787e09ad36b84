"""What a step may use of this machine: memory, and the one accelerator."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from cogumi_dagster.lib.locks import held
from cogumi_dagster.lib.training.memory import unused_addresses
from cogumi_dagster.lib.training.precision import resolve_device
from resources.settings import ProfileResource


class ComputeResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Threads, a memory limit that the kernel keeps, and a lease on the GPU."""

    settings: ProfileResource

    @property
    def device(self) -> str:
        return resolve_device(self.settings.profile.compute.device)

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Cap this process's private memory while a step runs: above it, allocations fail and the step ends.

        RLIMIT_DATA counts private writable pages, so mapped model files are free. Addresses that earlier steps of this
        process left empty are no part of the limit; what a step fills of them again is beyond it.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = int(self.settings.profile.compute.memory_gb * 1e9) + unused_addresses()
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    @contextmanager
    def gpu_lease(self, folder: Path) -> Iterator[None]:
        """Hold the accelerator (or, without one, the heavy-step slot) of this machine.

        Dagster's pools are the queue that people see, but two runs can take one slot; an OS lock
        cannot be held twice, and a killed holder frees it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder / "gpu.lock"):
            yield

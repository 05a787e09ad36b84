"""Processes that train together: each takes its share of a step's rows, and gradients are summed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Row = TypeVar("Row")


@dataclass(frozen=True)
class Workers:
    """One process of ``count``; alone by default. ``accelerator`` does the communication."""

    rank: int = 0
    count: int = 1
    accelerator: Any = field(default=None, repr=False)

    @classmethod
    def of_this_process(cls, device: str) -> "Workers":
        """As ``torchrun`` started this process, through accelerate (gloo on CPUs, NCCL on GPUs)."""
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=not device.startswith("cuda"))
        return cls(accelerator.process_index, accelerator.num_processes, accelerator)

    def share(self, rows: Sequence[Row]) -> Sequence[Row]:
        """This process's rows."""
        return rows[self.rank :: self.count]

    def sum(self, tensors: Sequence[Any]) -> None:
        """Replace each tensor by its sum over all processes. One message: LoRA gradients are small."""
        import torch

        if self.count == 1:
            return
        flat = torch.cat([tensor.detach().reshape(-1).to(tensors[0].dtype) for tensor in tensors])
        total = self.accelerator.reduce(flat.to(self.accelerator.device), reduction="sum").to(tensors[0].device)
        start = 0
        for tensor in tensors:
            tensor.copy_(total[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

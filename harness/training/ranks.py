"""The processes that train together: each takes its rows of the global batch, and gradients and losses are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Ranks:
    """This process's place among `size` processes. Draws are made alike in all of them, so that only rows are divided."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """As torch.distributed was set up (see `harness.execution.pretrain`); one process where it was not."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    def rows(self, size: int) -> slice:
        """This process's rows of a global batch of `size`, a multiple of the number of processes."""
        share = size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes of `value`, without gradient."""
        value = value.detach()
        if self.size == 1:
            return value
        total = value.to(_device(), copy=True)
        distributed.all_reduce(total)
        return (total / self.size).to(value.device)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes, in one exchange; None where no process has one."""
        if self.size == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
        flat = torch.cat([has, *((torch.zeros_like(p) if p.grad is None else p.grad).detach().float().reshape(-1)
                                 for p in parameters)])
        has, *gradients = self.mean(flat).split([len(parameters), *(p.numel() for p in parameters)])
        for parameter, gradient, share in zip(parameters, gradients, has.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if share > 0 else None

    def tell(self, message: str) -> str:
        """What rank 0 says, in every process; the others wait for it, and what they say is not heard."""
        box = [message]
        if self.size > 1:
            distributed.broadcast_object_list(box, src=0)
        return box[0]


def _device() -> torch.device:
    """Where the backend exchanges tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else torch.device("cpu")

"""Several processes that train one model, a GPU each, started by torchrun; or one alone."""

import os
import time

import torch
from torch import distributed, nn


class Peers:
    """The processes of a training: which one this is, how many there are, and what they tell each other.

    Args:
        device: "cuda" becomes the GPU of this process's local rank.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.count = 0, 1
        self.device = torch.device(device)
        if "LOCAL_RANK" in os.environ:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            distributed.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
            self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    def clock(self) -> float:
        """Seconds on the first process's clock, so that all take the same decisions at the same step."""
        now = torch.tensor([time.monotonic()], dtype=torch.float64)
        if self.count > 1:
            distributed.broadcast(now, 0)
        return now.item()

    def average_gradients(self, module: nn.Module) -> None:
        """Replace every gradient by the mean over all processes."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.count
        pieces = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])

    def close(self) -> None:
        if self.count > 1:
            distributed.destroy_process_group()

"""Processes that train together end up with the same gradients, and with one clock."""

import os

import torch
from torch import multiprocessing, nn

from splitsam.client.processes import free_ports
from training.peers import Peers


def _learn(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    peers = Peers("cpu")
    layer = nn.Linear(3, 2)
    layer.weight.grad, layer.bias.grad = torch.full((2, 3), float(rank)), torch.full((2,), 10.0 + rank)
    peers.average_gradients(layer)
    answer = {"count": peers.count, "clock": peers.clock(), "weight": layer.weight.grad, "bias": layer.bias.grad}
    torch.save(answer, f"{folder}/{rank}.pt")
    peers.close()


def test_two_processes_share_gradients_and_a_clock(tmp_path):
    (port,) = free_ports(1)
    multiprocessing.spawn(_learn, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["count"] == second["count"] == 2
    assert first["clock"] == second["clock"]
    for answer in (first, second):
        assert torch.equal(answer["weight"], torch.full((2, 3), 0.5))
        assert torch.equal(answer["bias"], torch.full((2,), 10.5))


def test_one_process_keeps_its_gradients():
    layer = nn.Linear(3, 2)
    layer.weight.grad = torch.ones(2, 3)
    Peers("cpu").average_gradients(layer)
    assert torch.equal(layer.weight.grad, torch.ones(2, 3))

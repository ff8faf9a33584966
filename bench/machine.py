"""What a row of results says of the run it comes from, and what benchmarks ask of their command lines."""

import argparse
import importlib.metadata
import shlex
from collections.abc import Iterator, Sequence

import torch

from bench.commit import read_commit

# Options that decide no figure.
UNPUBLISHED = ("--commit", "--results", "--limit-seconds", "--held-out", "--trace", "--profile-top", "--log")


def positive(text: str) -> int:
    """An option's whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def describe_machine(program: str, device: torch.device, commit: str, arguments: Sequence[str]) -> dict[str, str]:
    """The columns gpu, torch, triton, commit and command, the same in all rows of a run.

    Args:
        program: the module that runs, as of `python -m`.
        commit: where there is no git; empty: git is asked.
    """
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else f"cpu-{torch.get_num_threads()}-cores",
        "torch": torch.__version__,
        "triton": triton if cuda else "",
        "commit": commit or read_commit(),
        "command": shlex.join(["python", "-m", program, *_published(arguments)]),
    }


def _published(arguments: Sequence[str]) -> Iterator[str]:
    words = iter(arguments)
    for word in words:
        if word in UNPUBLISHED:
            next(words, None)
        elif word.partition("=")[0] not in UNPUBLISHED:
            yield word

"""One target's inputs in a process of their own, so that its end is seen: `python -m bench.fuzz.worker`.

The input in work lies in a file that is mapped into memory, for whoever finds the process dead. The last line printed
is the report, as JSON. With --guided atheris chooses the inputs by the branches that earlier ones took, and keeps
those that found new ones in the folder `corpus`.
"""

import argparse
import collections
import hashlib
import json
import mmap
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from bench.fuzz.target import Target, judge, peak_mib

LONGEST_BYTES = 4 * 2**20
MOST_CRASHES = 20
_LENGTH_BYTES = 8
_LONGEST_GUIDED_BYTES = 300_000
# An atheris input is made anew as often as it is changed by libFuzzer.
_MADE = 0.5


@dataclass
class Report:
    """What became of the inputs of one target.

    Args:
        outcomes: how many inputs came to each end.
        crashes: names of the files with inputs that broke the property, by what broke it.
        peak_mib: the most memory resident.
        kept: inputs that atheris keeps for the branches that they found, earlier runs' included; 0 without it.
    """

    inputs: int = 0
    seconds: float = 0.0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    crashes: dict[str, str] = field(default_factory=dict)
    peak_mib: float = 0.0
    kept: int = 0


class Recorder:
    """Judges inputs and keeps those that break the property, one for each place in the code.

    Args:
        folder: for files `crash-<digest>` with the input and `crash-<digest>.txt` with the traceback.
    """

    def __init__(self, target: Target, folder: Path):
        self.report = Report()
        self._target = target
        self._folder = folder
        self._start_s = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._current = _map_file(folder / "current")

    def judge(self, data: bytes) -> None:
        self._current[: _LENGTH_BYTES + len(data)] = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        self.report.inputs += 1
        try:
            outcome = judge(self._target, data)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
            outcome = "crash"
            self._keep(data, error)
        self.report.outcomes[outcome] += 1

    def finish(self) -> str:
        """The report as JSON."""
        self.report.seconds = time.monotonic() - self._start_s
        self.report.peak_mib = peak_mib()
        self.report.kept = len(list(self._folder.glob("corpus/*")))
        return json.dumps(vars(self.report))

    def _keep(self, data: bytes, error: Exception) -> None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {last.name}, {Path(last.filename).name}:{last.lineno}"
        if place not in self.report.crashes and len(self.report.crashes) < MOST_CRASHES:
            self.report.crashes[place] = save_crash(self._folder, data, "".join(traceback.format_exception(error)))


def save_crash(folder: Path, data: bytes, text: str) -> str:
    """Keep an input and what came of it; the file's name."""
    name = f"crash-{hashlib.sha256(data).hexdigest()[:16]}"
    (folder / name).write_bytes(data)
    (folder / f"{name}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    return name


def read_current(folder: Path) -> bytes:
    """The input that a process was at when it ended."""
    stored = (folder / "current").read_bytes()
    return stored[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(stored[:_LENGTH_BYTES], "little")]


def run_plain(target: Target, recorder: Recorder, count: int, seed: int) -> None:
    """Inputs from a seed: the same ones in every run."""
    for number in range(count):
        recorder.judge(target.make(Random(f"{seed} {target.name} {number}")))


def run_guided(target: Target, recorder: Recorder, count: int, seed: int, corpus: Path) -> None:
    """Inputs from atheris, half of them made by the target and half of them changed by libFuzzer.

    The process prints its report and ends with the last one, for libFuzzer does not return.

    Args:
        corpus: folder of inputs to begin with, and for those that find new branches.
    """
    import atheris  # an extra of its own: there are no wheels for every machine

    def judge_one(data: bytes) -> None:
        recorder.judge(data)
        if recorder.report.inputs >= count:
            print(recorder.finish(), flush=True)
            os._exit(0)

    def change(data: bytes, longest: int, change_seed: int) -> bytes:
        random = Random(change_seed)
        if random.random() < _MADE:
            return target.make(random)[:longest]
        return bytes(atheris.Mutate(data, longest))

    corpus.mkdir(exist_ok=True)
    words = [
        sys.argv[0],
        f"-seed={seed % 2**32 or 1}",
        f"-max_len={_LONGEST_GUIDED_BYTES}",
        "-verbosity=0",
        "-timeout=600",
    ]
    atheris.Setup([*words, str(corpus)], judge_one, custom_mutator=change)
    atheris.Fuzz()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz.worker", description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--guided", action="store_true")
    options = parser.parse_args(arguments)
    target = _load(options.target, options.guided)
    recorder = Recorder(target, options.folder)
    if options.guided:
        run_guided(target, recorder, options.inputs, options.seed, options.folder / "corpus")
    else:
        run_plain(target, recorder, options.inputs, options.seed)
    print(recorder.finish())


def _load(name: str, guided: bool) -> Target:
    """A target; atheris sees the branches of what is imported inside its block."""
    if not guided:
        from bench.fuzz.targets import BY_NAME

        return BY_NAME[name]
    import atheris

    with atheris.instrument_imports(include=["splitsam", "PIL"]):
        from bench.fuzz.targets import BY_NAME

        return BY_NAME[name]


def _map_file(path: Path) -> mmap.mmap:
    path.write_bytes(bytes(_LENGTH_BYTES))
    with path.open("r+b") as file:
        file.truncate(_LENGTH_BYTES + LONGEST_BYTES)
        return mmap.mmap(file.fileno(), 0)


if __name__ == "__main__":
    main(sys.argv[1:])

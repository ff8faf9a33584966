"""Feeds the parsers inputs that nobody would send by accident, and the running services such requests.

    python -m bench.fuzz                                        # 1,000,000 inputs, then 10,000 requests
    python -m bench.fuzz --targets images --inputs 5000 --requests 0
    python -m bench.fuzz --replay out/fuzz/images/crash-0123456789abcdef

Every input must end in a right result or in one of the project's own refusals, within 10 s of the processor and
256 MiB; those that do not are kept in out/fuzz/<target>. No request may be answered INTERNAL or UNKNOWN, hang, or end
a service. Rows go to `bench/results/fuzz-<device>.csv`, each in place of an earlier one of its target;
`python -m bench.fuzz.tables` makes a table of them. bench/README.md says more.
"""

import argparse
import importlib.util
import itertools
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.commit import ROOT, read_commit
from bench.fuzz.rows import Row, describe_outcomes
from bench.fuzz.run import folder_name, replay, run_target
from bench.fuzz.services import running_services, survey
from bench.fuzz.target import Target
from bench.fuzz.targets import BY_NAME, TARGETS
from bench.row_file import RESULTS, ResultsFile, results_path

_VERSIONS = ("pillow", "protobuf", "grpcio", "pydantic-settings", "torch")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=BY_NAME, default=list(BY_NAME), help="parsers to feed")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of all targets, shared out among those chosen")
    parser.add_argument("--requests", type=int, default=10_000, help="over the wire; 0 starts no services")
    parser.add_argument(
        "--first-request", type=int, default=0, metavar="N", help="begin with another, to send it again"
    )
    parser.add_argument(
        "--engine", choices=("auto", "atheris", "seeded"), default="auto", help="auto: atheris if it is there"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "fuzz", help="for crashes and atheris' corpus")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--replay", nargs="+", type=Path, metavar="FILE", help="judge crashes again, and nothing else")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    if options.replay:
        outcomes = [replay(path) for path in options.replay]
        print("\n".join(outcomes))
        sys.exit(any(outcome.startswith("Traceback") for outcome in outcomes))
    engine = options.engine
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "seeded"
    described = describe_run(arguments, options.seed)
    results = ResultsFile(results_path(options.results, "fuzz", described["device"]), Row)
    chosen = [target for target in TARGETS if target.name in options.targets] if options.inputs else []
    rows = feed_parsers(chosen, engine, options, described)
    if options.requests:
        rows = itertools.chain(rows, ask_services(options, described))
    crashes = 0
    for row in rows:
        results.add(row)
        crashes += row.crashes
        print(
            f"{row.target:26} {row.inputs:8} in {row.seconds:6.1f} s, {row.crashes} crashes: {row.outcomes}", flush=True
        )
    sys.exit(f"error: {crashes} crashes" if crashes else 0)


def feed_parsers(
    targets: Sequence[Target], engine: str, options: argparse.Namespace, described: dict[str, Any]
) -> Iterator[Row]:
    """A row for each target, after its share of the inputs."""
    shares = sum(target.share for target in targets)
    for target in targets:
        folder = options.folder / folder_name(target.name)
        inputs = max(1, options.inputs * target.share // shares)
        report = run_target(target.name, inputs=inputs, seed=options.seed, guided=engine == "atheris", folder=folder)
        for place, name in report.crashes.items():
            print(f"crash: {place}: {folder / name}")
        yield Row(
            target=target.name,
            engine=engine,
            inputs=report.inputs,
            seconds=report.seconds,
            outcomes=describe_outcomes(report.outcomes),
            crashes=len(report.crashes),
            kept=report.kept,
            peak_mib=report.peak_mib,
            **described,
        )


def ask_services(options: argparse.Namespace, described: dict[str, Any]) -> Iterator[Row]:
    """A row for each kind of request; what holds for all of them together counts in the last."""
    with running_services(options.folder / "services") as stack:
        seen = survey(stack, seed=options.seed, first=options.first_request, count=options.requests)
    for problem in seen.problems:
        print(f"problem: {problem}")
    print(", ".join(f"{name}: {seen.peak_mib[name]:.0f} MiB, {seen.grown_mib[name]:+.0f}" for name in seen.peak_mib))
    faults = sum(len(report.faults) for report in seen.reports.values())
    for number, (kind, report) in enumerate(sorted(seen.reports.items()), start=1):
        others = len(seen.problems) - faults if number == len(seen.reports) else 0
        yield Row(
            target=f"services: {kind}",
            engine="grpc",
            inputs=report.requests,
            seconds=report.seconds,
            outcomes=describe_outcomes(report.outcomes),
            crashes=len(report.faults) + others,
            kept=0,
            peak_mib=max(seen.peak_mib.values()),
            **described,
        )


def describe_run(arguments: Sequence[str], seed: int) -> dict[str, Any]:
    """The columns that are the same in all rows of a run."""
    packages = ", ".join(f"{name} {version(name)}" for name in _VERSIONS)
    return {
        "seed": seed,
        "device": f"cpu-{torch.get_num_threads()}-cores",
        "versions": f"Python {platform.python_version()}, {packages}",
        "commit": read_commit(),
        "command": shlex.join(["python", "-m", "bench.fuzz", *arguments]),
    }


if __name__ == "__main__":
    main(sys.argv[1:])

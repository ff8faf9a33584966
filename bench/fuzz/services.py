"""The services that fuzzed requests are sent to, as processes, and what they show of themselves meanwhile."""

import asyncio
import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.fuzz.wire import WireReport, send_all
from bench.fuzz.wire_cases import Known
from bench.load.watch import resident_mib
from splitsam.client import Client, scrape
from splitsam.client.processes import StackError
from splitsam.client.stack import Stack, StackSettings
from splitsam.client.up import DEMO_PHOTO
from splitsam.common.settings import ServiceSettings

SERVICES = ("encoder", "decoder")
# What the requests in memory may take, as the setting says: three times themselves.
GROWTH_MIB = 3 * ServiceSettings.model_fields["max_upload_bytes"].default / 2**20
_TOKEN = "fuzz-token-0123456789"  # noqa: S105 - of a deployment that lasts as long as the run
_POINT = (131, 410)
_CLICK_S = 120.0
_WARM_REQUESTS = 200
_SIGNS = (" ERROR ", "never retrieved", "Metadata value for key")
_OF_CALLERS = ("Invalid encoding on", "ExecuteBatchError raised in core by servicer")


@dataclass(frozen=True)
class Survey:
    """What requests have done to services.

    Args:
        reports: for each kind of request what became of them.
        peak_mib: the most resident memory of each service, sampled between requests.
        grown_mib: how much more that is than after the first requests.
        problems: what does not hold, for people; empty when all does.
    """

    reports: dict[str, WireReport]
    peak_mib: dict[str, float]
    grown_mib: dict[str, float]
    problems: tuple[str, ...]


@contextlib.contextmanager
def running_services(folder: Path) -> Iterator[Stack]:
    """Redis, an encoder and a decoder with the shipped weights and one tenant, stopped in the end.

    Args:
        folder: for their logs, which stay.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "tokens").write_text(f"fuzz {_TOKEN}\n")
    arguments = ("--tokens-file", str(folder / "tokens"))
    settings = StackSettings(encoder_args=arguments, decoder_args=arguments, run_folder=folder)
    with Stack(settings.on_free_ports()) as stack:
        yield stack


def survey(stack: Stack, *, seed: int, first: int = 0, count: int, token: str = _TOKEN) -> Survey:
    """Send requests, see that the services are well all the while, and click once more.

    Args:
        first: number of the first request, to send some of a run again.
    """
    addresses = {"encoder": stack.encoder, "decoder": stack.decoder}
    with Client(
        stack.encoder, stack.decoder, token=token, encode_timeout_s=_CLICK_S, predict_timeout_s=_CLICK_S
    ) as sam:
        photo = DEMO_PHOTO.read_bytes()
        before = _mask(sam, photo)
        logged = {name: len(_log(stack, name)) for name in SERVICES}
        memory: dict[str, list[float]] = {name: [] for name in SERVICES}

        def look() -> None:
            for name in SERVICES:
                stack.children[name].check_alive("being fuzzed")
                memory[name].append(resident_mib(stack.children[name].pid))

        known = Known(sam.encode(photo).key, photo, token)
        reports: dict[str, WireReport] = {}
        problems: list[str] = []
        numbers = range(first, first + count)
        try:
            asyncio.run(send_all(addresses, known, seed=seed, numbers=numbers, reports=reports, check=look))
            if not np.array_equal(_mask(sam, photo), before):
                problems.append("another mask of the same click")
            for name in SERVICES:
                problems += _defects(stack, name)
        except* StackError as ended:
            problems += sorted({str(error) for error in ended.exceptions})
    for report in reports.values():
        problems += [f"{what} (request {number})" for what, number in report.faults.items()]
    for name in SERVICES:
        problems += _complaints(_log(stack, name)[logged[name] :])
    peak = {name: max(seen) for name, seen in memory.items()}
    grown = {name: max(seen) - max(seen[:_WARM_REQUESTS]) for name, seen in memory.items()}
    problems += [f"{name} takes {mib:.0f} MiB more than at first" for name, mib in grown.items() if mib > GROWTH_MIB]
    return Survey(reports, peak, grown, tuple(problems))


def _mask(sam: Client, photo: bytes) -> np.ndarray:
    return sam.predict(sam.encode(photo), points=[_POINT])[0].to_array()


def _log(stack: Stack, name: str) -> str:
    return stack.children[name].log_path.read_text(encoding="utf-8", errors="replace")


def _complaints(log: str) -> list[str]:
    """Lines of errors, but for those of gRPC that are the caller's doing: text that is none, and hanging up."""
    lines = [line for line in log.splitlines() if any(sign in line for sign in _SIGNS)]
    return [line[:200] for line in lines if not any(sign in line for sign in _OF_CALLERS)]


def _defects(stack: Stack, name: str) -> list[str]:
    """Calls that the service counts as its own failures; raw frames show no status."""
    found = scrape.look(stack.metrics_url(name), timeout_s=30)  # type: ignore[arg-type]
    return [
        f"the {name} counts {value:.0f} {labels['code']} of {labels['method']}"
        for labels, value in found.samples.get("splitsam_requests_total", ())
        if value and labels["code"] in ("INTERNAL", "UNKNOWN")
    ]

"""`splitsam up`: the stack in the foreground, and one screen that says what is where."""

import importlib.metadata
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from splitsam.client.client import Client
from splitsam.client.processes import LOOPBACK
from splitsam.client.results import DeploymentInfo
from splitsam.client.stack import Stack, StackSettings
from splitsam.client.top import DEFAULT_ADDRESSES

DEMO_PHOTO = Path(__file__).parent / "assets" / "demo.jpg"


def run_until_stopped(settings: StackSettings) -> None:
    """Run the stack until Ctrl-C, SIGTERM or SIGHUP.

    Raises:
        StackError: it could not be started, or a part of it has died; everything is stopped then.
    """
    with stop_signals(), suppress(KeyboardInterrupt):
        print("starting ...", flush=True)
        with Stack(settings) as stack:
            if settings.tls_cert_file is None:
                with Client(stack.encoder, stack.decoder) as client:
                    print(banner(stack, client.info()), flush=True)
            else:  # who may call, and which authority vouches for the certificate, is not ours to know
                print(banner(stack, None), flush=True)
            stack.wait()
    print("stopped", flush=True)


@contextmanager
def stop_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP interrupt as Ctrl-C does, once: what follows must not cut the stopping short."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def banner(stack: Stack, info: DeploymentInfo | None) -> str:
    """One screen: where everything is, and what to try next."""
    where = "" if stack.settings.encoder_port == 50051 and stack.settings.decoder_port == 50052 else addresses(stack)
    ports = (stack.settings.encoder_metrics_port, stack.settings.decoder_metrics_port)
    metrics = tuple(f"{LOOPBACK}:{port}" for port in ports)
    watched = "" if metrics == DEFAULT_ADDRESSES else "".join(f" {address}" for address in metrics)
    redis = stack.redis_url.rpartition("@")[2].removesuffix("/0")
    options = _tls_options(stack)
    return f"""
splitsam {importlib.metadata.version("splitsam")} is up

  encoder     {stack.encoder:<22} metrics {stack.metrics_url("encoder")}
  decoder     {stack.decoder:<22} metrics {stack.metrics_url("decoder")}
  redis       {redis}{_gateway(stack)}{"" if info is None else _described(info)}
  logs        {stack.folder}

Try in another terminal:
  splitsam segment {DEMO_PHOTO} --point 131,410 --out overlay.png{where}{options}
  splitsam info{where}{options}
  splitsam top{watched}{
        ""
        if options
        else f'''
  splitsam demo{addresses(stack)}'''
    }

Ctrl-C stops everything.
"""


def addresses(stack: Stack) -> str:
    return f" --encoder {stack.encoder} --decoder {stack.decoder}"


def _gateway(stack: Stack) -> str:
    if stack.settings.gateway_port is None:
        return ""
    return f"\n  gateway     {stack.gateway:<22} a page to label on; /docs for programs"


def _described(info: DeploymentInfo) -> str:
    encoder = info.encoder
    notes = list(dict.fromkeys([*encoder.notes, *info.decoders[0].notes]))
    if encoder.demonstration:
        notes.insert(0, f"{encoder.model} is a demonstration model; give --checkpoint for Meta's weights")
    noted = "".join(f"\n  note        {note}" for note in notes)
    return f"\n  model       {encoder.model}, {encoder.precision} on {encoder.device}{noted}"


def _tls_options(stack: Stack) -> str:
    if stack.settings.tls_cert_file is None:
        return ""
    return " --ca CA.pem" + ("" if stack.settings.tls_client_ca_file is None else " --cert YOURS.pem --key YOURS.key")

"""Callers are moved from one model to another under load: nothing fails, and every mask is of one of the two."""

import contextlib
import itertools
import json
import signal
import threading
from dataclasses import dataclass, field

import pytest
from e2e_support import draw, image_file, iou, is_serving, run_command, running_service, wait_until

from bench.relay import Relay
from splitsam.client import Client
from splitsam.common.rle import decode_rle

POINT = (100, 120)
RIGHT_IOU = 0.99  # a batch may turn single pixels of an edge; the two models' masks are further apart, see `known`
CALLERS = 3


def photo_of(seed, comment=""):
    """An image; its comment makes it another file with the same pixels."""
    return image_file(draw(seed), "JPEG", quality=95, comment=comment.encode())


@dataclass
class Load:
    """Callers who each encode an image now and then and click on it, until they are stopped.

    Args:
        known: of each image, the masks of the models by name.
        models: whose mask each click got, by caller; empty for a mask that is nobody's.
    """

    encoder: str
    decoder: str
    token: str
    known: list
    failures: list = field(default_factory=list)
    models: list = field(default_factory=lambda: [[] for _ in range(CALLERS)])

    def __enter__(self):
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(CALLERS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _call(self, number):
        with Client(self.encoder, self.decoder, token=self.token, encode_timeout_s=60, predict_timeout_s=30) as client:
            for turn in itertools.count():
                if self._stop.is_set():
                    return
                seed = turn % len(self.known)
                try:
                    image = client.encode(photo_of(seed, f"{number} {turn}" if turn % 8 == 0 else ""))
                    for _ in range(3):
                        self.models[number].append(
                            self._whose(seed, client.predict(image, points=[POINT])[0].to_array())
                        )
                except Exception as error:
                    self.failures.append(error)
                    raise

    def _whose(self, seed, mask):
        return next((model for model, other in self.known[seed].items() if iou(mask, other) > RIGHT_IOU), "")


@pytest.fixture
def colours(stack, weights, other_weights, device_args, tenant_args):
    """Two deployments on one Redis, with one secret: an encoder and a decoder of either model, by colour."""
    with contextlib.ExitStack() as running:
        found = {}
        for colour, checkpoint in (("blue", weights), ("green", other_weights)):
            arguments = ("--checkpoint", str(checkpoint), *device_args, *tenant_args, "--drain-delay-ms", "2000")
            patience = ("--max-queue-ms", "120000")
            found[colour] = [
                running.enter_context(running_service(stack, name, *arguments, *patience, until_ready=False))
                for name in ("encoder", "decoder")
            ]
        yield found


@pytest.mark.long
@pytest.mark.own_services
@pytest.mark.timeout(600)
def test_callers_are_moved_to_another_model_without_a_failure(colours, alpha, where, tmp_path):
    blue, green = colours["blue"], colours["green"]
    known = [{} for _ in range(2)]
    for colour, (encoder, decoder) in colours.items():
        for service in (encoder, decoder):
            wait_until(lambda service=service: is_serving(service.address), "all four are ready", 120)
        with Client(encoder.address, decoder.address, token=alpha.token, encode_timeout_s=60) as client:
            for seed, masks in enumerate(known):
                masks[colour] = client.predict(client.encode(photo_of(seed)), points=[POINT])[0].to_array()
    assert all(iou(masks["blue"], masks["green"]) < 0.9 for masks in known)

    with (
        Relay(blue[0].address) as encoder,
        Relay(blue[1].address) as decoder,
        Load(encoder.address, decoder.address, alpha.token, known) as load,
    ):

        def every_caller_gets(colour):
            return all(models[-3:] == [colour] * 3 for models in load.models) or load.failures

        wait_until(lambda: every_caller_gets("blue"), "all callers click on blue")
        # Who comes now meets the new decoder, and the new encoder only a second later.
        decoder.target = green[1].address
        later = threading.Timer(1.0, lambda: setattr(encoder, "target", green[0].address))
        later.start()
        assert iou(newcomers_mask(encoder.address, decoder.address, where, tmp_path), known[0]["green"]) > RIGHT_IOU
        later.join()
        for service in blue:
            service.child.signal(signal.SIGTERM)
        for service in blue:
            assert service.child.wait(60)
            assert service.child.exit_status() == 0
        wait_until(lambda: every_caller_gets("green"), "all callers click on green")
    assert load.failures == []
    for models in load.models:
        assert [model for model, _ in itertools.groupby(models)] == ["blue", "green"]


def newcomers_mask(encoder, decoder, where, folder):
    """What a process of its own gets, whose connections are new; those of one process are shared."""
    (folder / "photo.jpg").write_bytes(photo_of(0))
    addresses = "--encoder", encoder, "--decoder", decoder, *where[-2:]
    result = run_command("segment", "photo.jpg", "--point", "100,120", "--json", *addresses, folder=folder)
    assert result.returncode == 0, result.stderr
    rle = json.loads(result.stdout)["masks"][0]["rle"]
    return decode_rle(rle["size"], rle["counts"])

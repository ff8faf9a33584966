"""Replicas that are killed, replaced or lose their device while callers are at work: the client library tells nobody.

The long run of the same, with figures, is `python -m bench.faults`.
"""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
from e2e_support import draw, image_file, iou, metric, wait_until

from bench.faults.deployment import Deployment
from bench.faults.failing_device import FAULT_FOLDER
from splitsam.client import Client, SplitsamError
from splitsam.common.process import DEVICE_LOST_STATUS

pytestmark = [
    pytest.mark.timeout(600),  # six processes start here, some of them twice, while others compute
    pytest.mark.own_services,
]
POINT = [(100, 80)]
PAUSE_S = 0.3  # most of the machine is left to processes that start
RIGHT_IOU = 0.99  # whom an answer shares its batch with may turn single pixels of its edge


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    """A file of a replica's port in here makes its device fail."""
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="module")
def replicas(weights, device_args, orders, tmp_path_factory):
    """Two of each service, whose devices fail when they are told to and are sound until then."""
    arguments = ("--checkpoint", str(weights), *device_args)
    with Deployment(
        tmp_path_factory.mktemp("replicas"),
        encoder_args=(*arguments, "--precision", "bf16"),
        decoder_args=arguments,
        module="bench.faults.failing_device",
        environment={FAULT_FOLDER: str(orders)},
    ) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def client(replicas):
    encoders, decoders = ([each.address for each in of] for of in (replicas.encoders, replicas.decoders))
    with Client(encoders, decoders, encode_timeout_s=60, predict_timeout_s=60) as client:
        yield client


@contextmanager
def callers(client, seed):
    """Two users encode and click all the while; each answer is right, and nobody is told of an error."""
    images = [image_file(draw(seed + user)) for user in range(2)]
    expected = [client.predict(client.encode(image), points=POINT)[0].to_array() for image in images]
    stop, errors, answered = threading.Event(), [], [0] * len(images)

    def work(user):
        number = 0
        while not stop.wait(PAUSE_S):
            number += 1
            try:
                # Bytes after the end of a PNG are not read, but make it an image that nobody has encoded yet.
                handle = client.encode(images[user] + number.to_bytes(4, "big"))
                mask = client.predict(handle, points=POINT)[0].to_array()
            except SplitsamError as error:
                errors.append(error)
                return
            if iou(mask, expected[user]) < RIGHT_IOU:
                errors.append(AssertionError(f"another mask: {np.count_nonzero(mask)} pixels"))
            answered[user] += 1

    threads = [threading.Thread(target=work, args=(user,)) for user in range(len(images))]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: min(answered) >= 1 or errors, "everybody is calling")
        yield
        before = list(answered)
        wait_until(lambda: errors or all(a > b for a, b in zip(answered, before, strict=True)), "everybody is served")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


def test_killed_replicas_are_passed_over_in_the_middle_of_their_work(replicas, client):
    with callers(client, 700):
        for replica in (replicas.encoders[0], replicas.decoders[0]):
            replica.kill()
    for replica in (replicas.encoders[0], replicas.decoders[0]):
        replica.start()
    replicas.until_ready()


def test_rolling_restart_of_both_services_fails_no_call(replicas, client):
    with callers(client, 710):
        for pair in zip(replicas.encoders, replicas.decoders, strict=True):
            for replica in pair:
                replica.terminate()
                replica.start()
            for replica in pair:
                replica.until_ready()
    assert [replica.crashes for replica in replicas.all] == [0] * 4


def test_replica_that_loses_its_device_ends_and_the_other_serves(replicas, client, orders):
    victims = replicas.encoders[1], replicas.decoders[1]
    with callers(client, 720):
        for replica in victims:
            replica.may_end()
            (orders / str(replica.port)).write_text("lost")
        for replica in victims:
            assert replica.wait(60)
            assert replica.exit_status() == DEVICE_LOST_STATUS
    for replica in victims:
        assert "the device is lost" in replica.log_path.read_text()
        (orders / str(replica.port)).unlink()
        replica.start()
    replicas.until_ready()


def test_memory_that_runs_out_is_waited_for(replicas, client, orders):
    for replica in replicas.all:
        (orders / str(replica.port)).write_text("out-of-memory 1")
    with callers(client, 730):
        pass
    failures = [
        metric(replica.metrics_url, "splitsam_device_errors_total", kind="out_of_memory") for replica in replicas.all
    ]
    assert sum(failures) >= 2
    assert all(replica.is_ready() for replica in replicas.all)


def test_services_start_without_redis_and_use_it_when_it_comes(weights, device_args, tmp_path):
    arguments = ("--checkpoint", str(weights), *device_args)
    with Deployment(
        tmp_path, with_redis=False, replicas=1, encoder_args=arguments, decoder_args=arguments
    ) as deployment:
        image = image_file(draw(740))
        with Client(deployment.encoders[0].address, deployment.decoders[0].address, encode_timeout_s=60) as client:
            assert not client.encode(image).stored
            deployment.redis.start()
            handle = wait_until(lambda: (made := client.encode(image)).stored and made, "Redis is used")
            assert client.predict(handle, points=POINT)[0].area_px > 0

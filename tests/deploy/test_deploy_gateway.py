"""The component `gateway` against the code: settings, ports, probes, secrets, and whom it reaches."""

import os
from pathlib import Path

import pytest
from manifests import build, container_of, named, of_kind, pod_labels, selects, size_bytes
from test_deploy_settings import CLOSING_MS, DOCKERFILE, NOT_SETTINGS, environment

from splitsam.gateway.gate import OPEN
from splitsam.gateway.settings import GatewaySettings

NAME = "splitsam-gateway"
# What the process takes, and how often an image is in memory: gateway/settings.py.
SEEN_BYTES, COPIES = 0.2 * 2**30, 5


@pytest.fixture
def manifests():
    return build("cpu-kind with the gateway")


@pytest.fixture
def container(manifests):
    return container_of(manifests, "gateway")


@pytest.fixture
def settings(manifests, container, monkeypatch):
    for name in os.environ:
        if name.upper().startswith("SPLITSAM_"):
            monkeypatch.delenv(name)
    for name, value in environment(manifests, container).items():
        assert name in NOT_SETTINGS or name.removeprefix("SPLITSAM_GATEWAY_").lower() in GatewaySettings.model_fields
        monkeypatch.setenv(name, value)
    return GatewaySettings.load()


def test_ports_and_probes_are_the_settings(settings, container):
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings.port, "metrics": settings.metrics_port}
    paths = {probe: container[probe]["httpGet"] for probe in container if probe.endswith("Probe")}
    assert len(paths) == 3
    assert all(get["port"] == "http" and get["path"] in OPEN for get in paths.values())
    assert (container["args"], settings.host) == (["gateway"], "0.0.0.0")  # noqa: S104


def test_its_metrics_are_scraped_and_prometheus_is_let_in(settings, manifests):
    service = named(manifests, "Service", NAME)
    [monitor] = of_kind(manifests, "ServiceMonitor")
    assert selects(monitor["spec"]["selector"], service["metadata"]["labels"])
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert ports == {"http": settings.port, "metrics": settings.metrics_port}
    scrapes = named(manifests, "NetworkPolicy", "splitsam-scrapes")["spec"]
    assert selects(scrapes["podSelector"], pod_labels(manifests)[NAME])
    [rule] = scrapes["ingress"]
    assert settings.metrics_port in {port["port"] for port in rule["ports"]}


def test_image_starts_the_gateway_on_its_ports(settings):
    stage = DOCKERFILE.partition("FROM runtime AS gateway\n")[2]
    assert f"EXPOSE {settings.port} {settings.metrics_port}\n" in stage
    assert 'CMD ["gateway"]' in stage
    assert '*extras["gateway"]' in DOCKERFILE


def test_services_are_called_by_names_and_ports_that_exist(settings, manifests):
    for addresses in (settings.encoders, settings.decoders):
        [(name, _, port)] = [address.partition(":") for address in addresses]
        [grpc] = [item for item in named(manifests, "Service", name)["spec"]["ports"] if item["name"] == "grpc"]
        assert grpc["port"] == int(port)


def test_tokens_are_asked_for_and_read_from_one_secret(settings, container):
    files = (settings.tokens_file, settings.service_token_file)
    [mount] = [mount for mount in container["volumeMounts"] if mount.get("readOnly")]
    assert {path.parent for path in files} == {Path(mount["mountPath"])}
    assert (settings.image_hosts, settings.private_images) == ((), False)


def test_no_caller_can_take_every_connection(settings):
    assert 0 < settings.caller_requests_in_flight < settings.max_connections / 10
    assert settings.caller_requests_per_s > 10  # a person's clicks, and an image's prompts one after the other


def test_it_is_given_time_to_drain_and_memory_for_its_images(settings, manifests, container):
    pod = named(manifests, "Deployment", NAME)["spec"]["template"]["spec"]
    assert settings.grace_ms >= settings.encode_timeout_ms
    assert settings.drain_delay_ms >= 1000 * container["readinessProbe"]["periodSeconds"]
    assert pod["terminationGracePeriodSeconds"] * 1000 >= settings.drain_delay_ms + settings.grace_ms + CLOSING_MS
    promised = settings.max_images_in_work * settings.max_image_bytes * COPIES
    assert size_bytes(container["resources"]["limits"]["memory"]) - promised >= SEEN_BYTES


def test_it_reaches_the_services_alone_and_they_let_it_in(manifests):
    labels = pod_labels(manifests)
    policy = named(manifests, "NetworkPolicy", NAME)["spec"]
    reached = {
        (pod, rule["ports"][0]["port"])
        for rule in policy["egress"]
        for peer in rule["to"]
        for pod in labels
        if selects(peer["podSelector"], labels[pod])
    }
    assert reached == {("splitsam-encoder", 50051), ("splitsam-decoder", 50052)}
    for service in ("encoder", "decoder"):
        [rule] = named(manifests, "NetworkPolicy", f"splitsam-{service}-calls")["spec"]["ingress"]
        assert any(
            selects(peer.get("podSelector", {"matchLabels": {"no": "pod"}}), labels[NAME]) for peer in rule["from"]
        )
    assert NAME in {budget["metadata"]["name"] for budget in of_kind(manifests, "PodDisruptionBudget")}

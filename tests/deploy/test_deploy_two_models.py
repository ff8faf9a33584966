"""Two models side by side: what is of one colour, what is shared, and which one callers reach."""

import pytest
from manifests import (
    COLOURS,
    KUSTOMIZE,
    SERVICES,
    TWO_MODELS,
    build,
    container_of,
    kustomize,
    load,
    named,
    of_kind,
    pod_labels,
    selects,
)
from test_deploy_policy import flows

LIVE = KUSTOMIZE / "overlays" / TWO_MODELS / "live" / "kustomization.yaml"


@pytest.fixture(scope="module")
def both():
    return kustomize(TWO_MODELS)


def reached(manifests, service):
    """The Deployments whose pods a Service leads to."""
    selector = {"matchLabels": named(manifests, "Service", service)["spec"]["selector"]}
    return {name for name, labels in pod_labels(manifests).items() if selects(selector, labels)}


def test_the_names_that_callers_know_lead_to_the_colour_that_is_live(both):
    [lists] = load(LIVE)
    live = lists["labels"][0]["pairs"]["splitsam-colour"]
    assert live in COLOURS
    for service in SERVICES:
        for address in (f"splitsam-{service}", f"splitsam-{service}-replicas"):
            assert reached(both, address) == {f"splitsam-{service}-{live}"}


def test_each_colour_has_addresses_of_its_own_for_a_look_before_the_switch(both):
    for service in SERVICES:
        for colour in COLOURS:
            for address in (f"splitsam-{service}-{colour}", f"splitsam-{service}-replicas-{colour}"):
                assert reached(both, address) == {f"splitsam-{service}-{colour}"}


def test_decoders_call_encoders_of_their_own_colour(both):
    for colour in COLOURS:
        pods = named(both, "Deployment", f"splitsam-decoder-{colour}")["spec"]["template"]["spec"]
        [address] = [
            variable["value"]
            for variable in pods["containers"][0]["env"]
            if variable["name"] == "SPLITSAM_DECODER_ENCODER_ADDRESS"
        ]
        assert reached(both, address.partition(":")[0]) == {f"splitsam-encoder-{colour}"}


def test_nothing_of_one_colour_selects_the_other(both):
    for kind in ("Deployment", "PodDisruptionBudget"):
        for item in of_kind(both, kind):
            name = item["metadata"]["name"]
            assert name == "splitsam-redis" or {
                pod for pod, labels in pod_labels(both).items() if selects(item["spec"]["selector"], labels)
            } == {name}


def test_both_colours_share_redis_secrets_and_policies(both):
    for service in SERVICES:
        port = {"encoder": 50051, "decoder": 50052}[service]
        for colour in COLOURS:
            name = f"splitsam-{service}-{colour}"
            assert flows(both, "ingress", name) == {("TCP", port)}
            to_encoder = {("TCP", 50051)} if service == "decoder" else set()
            assert flows(both, "egress", name) == {("UDP", 53), ("TCP", 53), ("TCP", 6379)} | to_encoder
            volumes = named(both, "Deployment", name)["spec"]["template"]["spec"]["volumes"]
            secrets = {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
            assert secrets == {"splitsam-auth", "splitsam-redis"}


def test_each_replica_is_scraped_once(both):
    scraped = [item for item in of_kind(both, "Service") if item["metadata"]["labels"].get("splitsam-metrics")]
    assert sorted(pod for item in scraped for pod in reached(both, item["metadata"]["name"])) == sorted(
        f"splitsam-{service}-{colour}" for service in SERVICES for colour in COLOURS
    )


def test_the_colours_have_different_weights():
    for service in SERVICES:
        blue, green = (container_of(build(f"{TWO_MODELS}, {colour}"), service)["env"] for colour in COLOURS)
        names = [{variable["name"] for variable in variables} for variables in (blue, green)]
        assert names[1] - names[0] == {"WEIGHTS_FILE"} | {
            f"SPLITSAM_{service.upper()}_{name}" for name in ("CHECKPOINT", "SHA256")
        }

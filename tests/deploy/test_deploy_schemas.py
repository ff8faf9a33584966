"""What the API servers of three versions would say to the manifests, as far as schemas go."""

import copy
import json
from collections.abc import Iterable

import pytest
from kubernetes_validate import ValidationError, validate
from kubernetes_validate.utils import all_versions
from manifests import (
    DEPLOY,
    KUSTOMIZE,
    SERVICES,
    TWO_MODELS,
    VARIANTS,
    Manifest,
    build,
    container_of,
    kustomize,
    load,
    named,
    of_kind,
)

VERSIONS = list(dict.fromkeys(all_versions()))[-3:]  # each is listed twice: with and without strict
# Kinds of operators: kubernetes-validate has no schemas for them, so their fields are held here.
FIELDS_OF_OPERATORS = {
    "ServiceMonitor": {"selector", "endpoints"},
    "PrometheusRule": {"groups"},
    "PeerAuthentication": {"selector", "mtls", "portLevelMtls"},
    "DestinationRule": {"host", "trafficPolicy"},
    "HTTPRoute": {"parentRefs", "hostnames", "rules"},
    "ScaledObject": {
        *("scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod"),
        *("fallback", "triggers"),
    },
}


def check(manifests: Iterable[Manifest], version: str) -> None:
    for manifest in manifests:
        if manifest["kind"] not in FIELDS_OF_OPERATORS:
            validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_valid(version):
    made = [*(manifest for variant in VARIANTS for manifest in build(variant)), *kustomize(TWO_MODELS)]
    different = {json.dumps(manifest): manifest for manifest in made}
    check(different.values(), version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", ["secrets.example.yaml", "kustomize/components/weights/loader.yaml"])
def test_files_outside_the_overlays_are_valid(path, version):
    check(load(DEPLOY / path), version)


def test_a_misspelt_field_is_found():
    deployment = copy.deepcopy(named(build("gpu"), "Deployment", "splitsam-encoder"))
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(ValidationError):
        validate(deployment, VERSIONS[-1], strict=True)


def test_objects_of_operators_have_only_known_fields(manifests):
    for manifest in manifests:
        if manifest["kind"] in FIELDS_OF_OPERATORS:
            assert set(manifest["spec"]) <= FIELDS_OF_OPERATORS[manifest["kind"]]
            assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}


def test_all_components_are_in_a_tested_variant():
    tested = {name for _, components in VARIANTS.values() for name in components}
    for overlay in (KUSTOMIZE / "overlays").iterdir():
        for path in overlay.rglob("kustomization.yaml"):
            [lists] = load(path)
            tested |= {path.rpartition("/")[2] for path in lists.get("components", ())}
    assert tested == {path.name for path in (KUSTOMIZE / "components").iterdir()}


def test_overlays_differ_in_what_they_are_for():
    kind, gpu, external = build("cpu-kind"), build("gpu"), build("external-redis")
    for service in SERVICES:
        assert container_of(gpu, service)["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert "nvidia.com/gpu" not in container_of(kind, service)["resources"]["limits"]
        assert named(kind, "Deployment", f"splitsam-{service}")["spec"]["replicas"] == 1
    assert {item["metadata"]["name"] for item in of_kind(external, "Deployment")} == {
        f"splitsam-{service}" for service in SERVICES
    }

"""The manifests of deploy/kustomize as `kubectl kustomize` builds them, and ways to look into them."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUSTOMIZE = DEPLOY / "kustomize"
PROGRAMS = Path(sys.executable).parent
Manifest = dict[str, Any]

TWO_MODELS = "blue-green"
COLOURS = ("blue", "green")
OVERLAYS = tuple(sorted(path.name for path in (KUSTOMIZE / "overlays").iterdir()))
# What a deployment adds to an overlay, as deploy/README.md shows.
VARIANTS: dict[str, tuple[str, Sequence[str]]] = {
    **{name: (name, ()) for name in OVERLAYS if name != TWO_MODELS},
    **{f"{TWO_MODELS}, {colour}": (TWO_MODELS, ()) for colour in COLOURS},
    "cpu-kind with all": ("cpu-kind", ("weights", "autoscale-cpu", "monitoring")),
    "gpu with all": ("gpu", ("weights", "autoscale-queue-time", "monitoring")),
    "gpu with TLS": ("gpu", ("tls", "mutual-tls", "redis-tls", "monitoring")),
    "cpu-kind with TLS": ("cpu-kind", ("tls",)),
    "gpu with traces": ("gpu", ("tracing", "weights")),
    "external-redis with weights": ("external-redis", ("weights", "monitoring")),
    "cpu-kind with a dataset": ("cpu-kind", ("encode-dataset",)),
    "cpu-kind with the gateway": ("cpu-kind", ("gateway", "monitoring")),
    "cpu-kind with a route": ("cpu-kind", ("gateway", "gateway-route")),
    "mesh with monitoring": ("mesh", ("monitoring",)),
}
SERVICES = ("encoder", "decoder")


@functools.cache
def build(variant: str) -> tuple[Manifest, ...]:
    """The objects of a variant; not to be changed."""
    made = kustomize(*VARIANTS[variant])
    return one_colour(made, variant.rpartition(" ")[2]) if variant.startswith(TWO_MODELS) else made


def one_colour(manifests: Sequence[Manifest], colour: str) -> tuple[Manifest, ...]:
    """Of two models one, and what both share, under the names that it would have alone."""
    kept = [item for item in manifests if item["metadata"]["labels"].get("splitsam-colour", colour) == colour]
    coloured = {item["metadata"]["name"] for item in kept if item["metadata"]["name"].endswith(f"-{colour}")}
    addresses = {name.removesuffix(f"-{colour}") for name in coloured}
    alone = [item for item in kept if item["kind"] != "Service" or item["metadata"]["name"] not in addresses]
    return tuple(json.loads(json.dumps(alone).replace(f"-{colour}", ""), object_hook=_without_colour))


def _without_colour(item: Manifest) -> Manifest:
    return {name: value for name, value in item.items() if name != "splitsam-colour"}


def kustomize(overlay: str, components: Sequence[str] = (), **settings: str) -> tuple[Manifest, ...]:
    """An overlay with components and settings on top, as a deployment's own kustomization.yaml would have them."""
    with tempfile.TemporaryDirectory() as folder:
        # Kustomize takes other folders by relative path only, and from the real one.
        here = Path(folder).resolve()
        lists = {
            "resources": [os.path.relpath(KUSTOMIZE / "overlays" / overlay, here)],
            "components": [os.path.relpath(KUSTOMIZE / "components" / name, here) for name in components],
        }
        (here / "kustomization.yaml").write_text(yaml.safe_dump(lists | settings))
        result = subprocess.run(
            [PROGRAMS / "kubectl", "kustomize", here], capture_output=True, text=True, timeout=60, check=False
        )
    assert result.returncode == 0, result.stderr
    assert not result.stderr, result.stderr  # kustomize warns there of what it will stop to understand
    return tuple(yaml.safe_load_all(result.stdout))


def load(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(manifests: Sequence[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def named(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    [found] = [manifest for manifest in of_kind(manifests, kind) if manifest["metadata"]["name"] == name]
    return found


def pod_specs(manifests: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Name and pod spec of everything that makes pods."""
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            yield manifest["metadata"]["name"], manifest["spec"]
        elif "template" in manifest.get("spec", {}):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]


def containers(spec: Manifest) -> list[Manifest]:
    return [*spec.get("initContainers", ()), *spec["containers"]]


def pod_labels(manifests: Sequence[Manifest]) -> dict[str, dict[str, str]]:
    """Labels of the pods of each Deployment and Job."""
    return {
        manifest["metadata"]["name"]: manifest["spec"]["template"]["metadata"]["labels"]
        for manifest in (*of_kind(manifests, "Deployment"), *of_kind(manifests, "Job"))
    }


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector, as in a policy or a budget, takes labels."""
    by_name = all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        by_name = by_name and labels.get(expression["key"]) in expression["values"]
    return by_name


def container_of(manifests: Sequence[Manifest], service: str) -> Manifest:
    [found] = named(manifests, "Deployment", f"splitsam-{service}")["spec"]["template"]["spec"]["containers"]
    return found


def size_bytes(quantity: str) -> int:
    """Of 2Gi, 512Mi (Kubernetes) or 512mb, 3gb (Redis)."""
    units = {"Mi": 2**20, "Gi": 2**30, "mb": 2**20, "gb": 2**30}
    return int(quantity[:-2]) * units[quantity[-2:]]

"""Pod Security `restricted` and our own rules, for every object of every variant."""

import re
from urllib.parse import urlsplit

import pytest
from manifests import (
    DEPLOY,
    KUSTOMIZE,
    SERVICES,
    build,
    containers,
    kustomize,
    load,
    named,
    of_kind,
    pod_labels,
    pod_specs,
    selects,
    size_bytes,
)

LOADER = load(KUSTOMIZE / "components" / "weights" / "loader.yaml")
VOLUMES_OF_RESTRICTED = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}


def test_pods_meet_the_restricted_standard(manifests):
    for _, spec in pod_specs([*manifests, *LOADER]):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for container in containers(spec):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not any("hostPort" in port for port in container.get("ports", ()))
        for volume in spec.get("volumes", ()):
            assert volume.keys() - {"name"} <= VOLUMES_OF_RESTRICTED


def test_the_namespace_enforces_that_standard(manifests):
    [namespace] = of_kind(manifests, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_pods_hold_no_token_and_no_variables_of_services(manifests):
    for _, spec in pod_specs([*manifests, *LOADER]):
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
    accounts = {account["metadata"]["name"]: account for account in of_kind(manifests, "ServiceAccount")}
    for name, spec in pod_specs(manifests):
        assert spec["serviceAccountName"] == name
        assert accounts[name]["automountServiceAccountToken"] is False


def test_images_are_pinned_and_memory_is_bounded(manifests):
    for _, spec in pod_specs([*manifests, *LOADER]):
        for container in containers(spec):
            assert re.search(r":[0-9]+\.[0-9]+\.[0-9]+(-\w+)?$", container["image"])
            resources = container["resources"]
            # What is asked for is what may be used: nobody is evicted for a neighbour's growth.
            assert resources["limits"]["memory"] == resources["requests"]["memory"]
            assert "cpu" in resources["requests"]


def test_scratch_volumes_are_bounded_within_the_pods_limit(manifests):
    for _, spec in pod_specs(manifests):
        scratch = [volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume]
        limit = spec["containers"][0]["resources"]["limits"]["ephemeral-storage"]
        assert sum(size_bytes(volume["sizeLimit"]) for volume in scratch) <= size_bytes(limit)


def test_mounts_name_volumes_and_volumes_name_what_exists(manifests):
    maps = {item["metadata"]["name"] for item in of_kind(manifests, "ConfigMap")}
    claims = {item["metadata"]["name"] for item in of_kind(manifests, "PersistentVolumeClaim")}
    claims.add("splitsam-dataset")  # there already: deploy/README.md
    for _, spec in pod_specs(manifests):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounted = {mount["name"] for container in containers(spec) for mount in container["volumeMounts"]}
        assert mounted == volumes.keys()
        for volume in volumes.values():
            assert "configMap" not in volume or volume["configMap"]["name"] in maps
            assert "persistentVolumeClaim" not in volume or volume["persistentVolumeClaim"]["claimName"] in claims
        for container in containers(spec):
            sources = [variable.get("valueFrom", {}) for variable in container.get("env", ())]
            assert {source["configMapKeyRef"]["name"] for source in sources if "configMapKeyRef" in source} <= maps


def test_secrets_are_files_that_are_referred_to_and_never_held(manifests):
    assert not of_kind(manifests, "Secret")
    example = {item["metadata"]["name"]: item["stringData"] for item in load(DEPLOY / "secrets.example.yaml")}
    # Made by others: deploy/README.md.
    of_others = {
        *(f"splitsam-{name}-tls" for name in (*SERVICES, "redis")),
        "splitsam-dataset-caller",
        "splitsam-gateway",
    }
    for _, spec in pod_specs(manifests):
        for volume in spec["volumes"]:
            if "secret" in volume:
                name = volume["secret"]["secretName"]
                assert volume["secret"]["defaultMode"] == 0o440
                if name not in of_others:
                    assert {item["key"] for item in volume["secret"].get("items", ())} <= example[name].keys()
        for container in containers(spec):
            sources = [variable.get("valueFrom", {}) for variable in container.get("env", ())]
            assert not any("secretKeyRef" in source for source in sources)  # the environment leaks easily
            assert "envFrom" not in container


def test_a_pod_holds_of_redis_what_is_its_own(manifests):
    """The services need the URL, not the list of users; Redis needs the list."""
    for name, spec in pod_specs(manifests):
        for volume in spec["volumes"]:
            if volume.get("secret", {}).get("secretName") == "splitsam-redis":
                key = "users.acl" if name == "splitsam-redis" else "url"
                assert volume["secret"]["items"] == [{"key": key, "path": key}]


def test_everything_lies_in_one_namespace(manifests):
    apart = {"Namespace", "PriorityClass"}
    assert {item["metadata"]["namespace"] for item in manifests if item["kind"] not in apart} == {"splitsam"}
    assert not any("namespace" in item["metadata"] for item in manifests if item["kind"] in apart)


def test_a_namespace_of_its_own_renames_everything():
    """What deploy/README.md does for a second model beside the first."""
    items = kustomize("gpu", namespace="splitsam-green")
    apart = {"Namespace", "PriorityClass"}
    assert {item["metadata"]["namespace"] for item in items if item["kind"] not in apart} == {"splitsam-green"}
    [namespace] = of_kind(items, "Namespace")
    assert namespace["metadata"]["name"] == "splitsam-green"


def test_services_and_budgets_select_the_pods_of_their_name(manifests):
    pods = pod_labels(manifests)
    for service in of_kind(manifests, "Service"):
        name = service["metadata"]["name"].removesuffix("-replicas")
        selector = {"matchLabels": service["spec"]["selector"]}
        assert [pod for pod, labels in pods.items() if selects(selector, labels)] == [name]
        [container] = named(manifests, "Deployment", name)["spec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    budgets = of_kind(manifests, "PodDisruptionBudget")
    budgeted = {f"splitsam-{service}" for service in (*SERVICES, "gateway")} & pods.keys()
    assert {budget["metadata"]["name"] for budget in budgets} == budgeted
    for budget in budgets:
        assert budget["spec"]["maxUnavailable"] == 1
        selected = [pod for pod, labels in pods.items() if selects(budget["spec"]["selector"], labels)]
        assert selected == [budget["metadata"]["name"]]


def test_each_service_has_one_address_and_its_replicas(manifests):
    is_headless = manifests is build("headless")
    for service in SERVICES:
        spec = named(manifests, "Service", f"splitsam-{service}")["spec"]
        assert ("clusterIP" in spec) == is_headless
        assert not is_headless or spec["clusterIP"] == "None"
        assert named(manifests, "Service", f"splitsam-{service}-replicas")["spec"]["clusterIP"] == "None"


def test_replicas_spread_over_nodes_and_zones(manifests):
    for service in SERVICES:
        deployment = named(manifests, "Deployment", f"splitsam-{service}")
        spread = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert [item["topologyKey"] for item in spread] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        assert all(item["labelSelector"] == deployment["spec"]["selector"] for item in spread)


def test_clicks_come_before_encoding(manifests):
    values = {item["metadata"]["name"]: item["value"] for item in of_kind(manifests, "PriorityClass")}
    classes = {name: spec["priorityClassName"] for name, spec in pod_specs(manifests)}
    assert values[classes["splitsam-decoder"]] > values[classes["splitsam-encoder"]] > 0
    for job in of_kind(manifests, "Job"):
        assert values[classes["splitsam-encoder"]] > values[classes[job["metadata"]["name"]]] > 0


def test_an_autoscaler_owns_the_replicas(manifests):
    scalers = [*of_kind(manifests, "HorizontalPodAutoscaler"), *of_kind(manifests, "ScaledObject")]
    scaled = {scaler["spec"]["scaleTargetRef"]["name"] for scaler in scalers}
    assert len(scaled) == len(scalers)
    for deployment in of_kind(manifests, "Deployment"):
        assert ("replicas" in deployment["spec"]) == (deployment["metadata"]["name"] not in scaled)


def test_nothing_flows_that_no_policy_allows(manifests):
    deny = named(manifests, "NetworkPolicy", "splitsam-default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in of_kind(manifests, "NetworkPolicy"):
        for direction, side in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(direction, ()):
                assert direction.capitalize() in policy["spec"]["policyTypes"]
                assert rule["ports"]
                assert rule[side]  # an absent or empty list would allow everybody
                assert {} not in rule[side]


def flows(manifests, direction, pod):
    """Ports that policies open for a pod."""
    labels = pod_labels(manifests)[pod]
    return {
        (port["protocol"], port["port"])
        for policy in of_kind(manifests, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], labels)
        for rule in policy["spec"].get(direction, ())
        for port in rule["ports"]
    }


@pytest.mark.parametrize("service", SERVICES)
def test_services_are_reached_on_their_ports_and_reach_redis_and_dns(manifests, service):
    name = f"splitsam-{service}"
    ports = named(manifests, "Service", f"{name}-replicas")["spec"]["ports"]
    grpc, metrics = (next(port["port"] for port in ports if port["name"] == which) for which in ("grpc", "metrics"))
    opened = flows(manifests, "ingress", name)
    assert ("TCP", grpc) in opened
    assert (("TCP", metrics) in opened) == bool(of_kind(manifests, "ServiceMonitor"))
    [container] = named(manifests, "Deployment", name)["spec"]["template"]["spec"]["containers"]
    health = {port["containerPort"] for port in container["ports"] if port["name"] == "health"}
    assert not health & {port for _, port in opened}  # kubelets reach their own pods regardless, and nobody else asks
    endpoints = [item["value"] for item in container["env"] if item["name"] == "OTEL_EXPORTER_OTLP_ENDPOINT"]
    own = {("TCP", urlsplit(endpoint).port) for endpoint in endpoints}
    if of_kind(manifests, "PeerAuthentication"):
        own.add(("TCP", 15012))  # the mesh's control plane
    if service == "decoder":
        own.add(("TCP", 50051))
    if not any(pod == "splitsam-redis" for pod, _ in pod_specs(manifests)):
        own.add(("TCP", 26379))  # Sentinels of a Redis elsewhere
    assert flows(manifests, "egress", name) == {("UDP", 53), ("TCP", 53), ("TCP", 6379)} | own


def test_decoders_reach_encoders_and_nobody_else_of_the_pods_does(manifests):
    # Whoever has that label is a caller like any other.
    pods = {name: labels for name, labels in pod_labels(manifests).items() if "splitsam-client" not in labels}
    [egress] = named(manifests, "NetworkPolicy", "splitsam-decoder-to-encoder")["spec"]["egress"]
    [ingress] = named(manifests, "NetworkPolicy", "splitsam-encoder-calls")["spec"]["ingress"]
    callers = {
        name
        for name, labels in pods.items()
        for peer in ingress["from"]
        if "podSelector" in peer and selects(peer["podSelector"], labels)
    }
    called = {name for name, labels in pods.items() for peer in egress["to"] if selects(peer["podSelector"], labels)}
    assert (callers, called) == ({"splitsam-decoder"}, {"splitsam-encoder"})


@pytest.mark.parametrize("variant", ["cpu-kind", "gpu"])
def test_redis_is_reached_by_the_services_only(variant):
    manifests = build(variant)
    assert flows(manifests, "ingress", "splitsam-redis") == {("TCP", 6379)}
    policy = named(manifests, "NetworkPolicy", "splitsam-redis-calls")
    [rule] = policy["spec"]["ingress"]
    [peer] = rule["from"]
    callers = {name for name, labels in pod_labels(manifests).items() if selects(peer["podSelector"], labels)}
    assert callers == {f"splitsam-{service}" for service in SERVICES}
    assert {port for _, port in flows(manifests, "egress", "splitsam-redis")} == {53}


def test_the_dataset_is_read_only_and_its_pods_reach_encoders_alone():
    manifests = build("cpu-kind with a dataset")
    name = "splitsam-encode-dataset"
    assert flows(manifests, "ingress", name) == set()
    assert flows(manifests, "egress", name) == {("UDP", 53), ("TCP", 53), ("TCP", 50051)}
    [rule] = named(manifests, "NetworkPolicy", name)["spec"]["egress"]
    [peer] = rule["to"]
    reached = {pod for pod, labels in pod_labels(manifests).items() if selects(peer["podSelector"], labels)}
    assert reached == {"splitsam-encoder"}
    calls = named(manifests, "NetworkPolicy", "splitsam-encoder-calls")["spec"]["ingress"][0]["from"]
    assert any(selects(caller.get("podSelector", {}), pod_labels(manifests)[name]) for caller in calls)
    [spec] = [spec for pod, spec in pod_specs(manifests) if pod == name]
    [mount] = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "dataset"]
    [volume] = [volume for volume in spec["volumes"] if volume["name"] == "dataset"]
    assert mount["readOnly"]
    assert volume["persistentVolumeClaim"]["readOnly"]


def test_an_external_redis_has_to_be_named(manifests):
    cidrs = {
        peer["ipBlock"]["cidr"]
        for policy in of_kind(manifests, "NetworkPolicy")
        for rule in policy["spec"].get("egress", ())
        for peer in rule["to"]
        if "ipBlock" in peer
    }
    in_cluster = any(name == "splitsam-redis" for name, _ in pod_specs(manifests))
    assert cidrs == (set() if in_cluster else {"REPLACE_CIDR"})  # no CIDR, so the API server refuses it

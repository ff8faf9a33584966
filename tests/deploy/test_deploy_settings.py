"""The manifests and images against the code: names, ports, variables, probes and times are the services' own."""

import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
from manifests import (
    DEPLOY,
    PROGRAMS,
    ROOT,
    SERVICES,
    VARIANTS,
    build,
    container_of,
    containers,
    load,
    named,
    of_kind,
    pod_specs,
    selects,
    size_bytes,
)
from opentelemetry.sdk.resources import OTELResourceDetector
from opentelemetry.sdk.trace import TracerProvider

from splitsam.client.cli import app
from splitsam.client.failures import AGAIN, BAD_INPUT
from splitsam.client.image_list import parse_shard
from splitsam.client.stack import StackSettings
from splitsam.common.checkpoint_files import META_SHA256, file_sha256
from splitsam.common.metrics import Metrics
from splitsam.decoder_service.service import DecoderService
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.encoder_service.service import EncoderService
from splitsam.encoder_service.settings import EncoderSettings
from splitsam.gateway.metrics import GatewayMetrics
from splitsam.gateway.settings import GatewaySettings

SETTINGS = {"encoder": EncoderSettings, "decoder": DecoderSettings}
FULL_NAMES = {"encoder": EncoderService.full_name, "decoder": DecoderService.full_name}
# Longest wait for a place in a batch: a drain that is shorter would cut off a call that is still in time.
LONGEST_CALL = {"encoder": "encode_timeout_ms", "decoder": "predict_timeout_ms"}
# Read by libraries, or by the container itself; everything else must be a setting.
NOT_SETTINGS = {"OMP_NUM_THREADS", "WEIGHTS_FILE", "POD_NAME"}
CLOSING_MS = 10_000
# Of the processes with vit_t on a CPU, after the image was started and used once: deploy/README.md.
SEEN_BYTES = {"encoder": 1.4 * 2**30, "decoder": 0.5 * 2**30}
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()


def resolved(manifests, source):
    """A value that a variable takes from elsewhere; from a Secret none does, those are files."""
    if "configMapKeyRef" in source:
        reference = source["configMapKeyRef"]
        return named(manifests, "ConfigMap", reference["name"])["data"][reference["key"]]
    if "fieldRef" in source:
        assert source["fieldRef"] == {"fieldPath": "metadata.name"}
        return "a-pod"
    assert source["resourceFieldRef"]["resource"] == "requests.cpu"
    return "1"


def environment(manifests, container):
    """The variables of a container, references to earlier ones expanded as Kubernetes does."""
    values = {}
    for variable in container["env"]:
        value = variable["value"] if "value" in variable else resolved(manifests, variable["valueFrom"])
        assert variable["name"] not in values
        values[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda match, known=values: known[match[1]], value)
    return values


@pytest.fixture(params=[(variant, service) for variant in VARIANTS for service in SERVICES], ids=" ".join)
def deployed(request, monkeypatch):
    """One service of one variant: manifests, its container, and the settings that the container's variables make."""
    variant, service = request.param
    manifests = build(variant)
    container = container_of(manifests, service)
    for name in os.environ:
        if name.upper().startswith("SPLITSAM_"):
            monkeypatch.delenv(name)
    for name, value in environment(manifests, container).items():
        monkeypatch.setenv(name, value)
    return manifests, service, container, SETTINGS[service].load()


def test_every_variable_is_a_setting_of_that_service(deployed):
    _, service, container, settings = deployed
    prefix = settings.model_config["env_prefix"]
    names = {variable["name"] for variable in container["env"]} - NOT_SETTINGS
    names = {name for name in names if not name.startswith("OTEL_")}  # OpenTelemetry's own
    assert names <= {(prefix + name).upper() for name in type(settings).model_fields}
    assert container["args"] == [f"serve-{service}"]


def test_traces_are_exported_where_their_component_is(deployed, request):
    manifests, _, container, _ = deployed
    variables = environment(manifests, container)
    wanted = "tracing" in VARIANTS[request.node.callspec.params["deployed"][0]][1]
    assert ("OTEL_EXPORTER_OTLP_ENDPOINT" in variables) == wanted
    if wanted:
        sampler = TracerProvider(shutdown_on_exit=False).sampler  # of the environment, as a service reads it
        assert "root:TraceIdRatioBased{0.1}" in sampler.get_description()
        assert OTELResourceDetector().detect().attributes == {"k8s.pod.name": "a-pod"}


def test_ports_are_the_settings_and_the_defaults(deployed):
    _, service, container, settings = deployed
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    health = {"health": settings.health_port} if settings.health_port else {}
    assert ports == {"grpc": settings.port, "metrics": settings.metrics_port, **health}
    assert settings.port == SETTINGS[service].model_fields["port"].default
    assert settings.metrics_port == getattr(StackSettings(), f"{service}_metrics_port")
    assert settings.host == "0.0.0.0"  # noqa: S104 (a pod's own address is known only when it runs)


def test_probes_ask_for_names_that_the_service_serves(deployed):
    _, service, container, settings = deployed
    plaintext_port = settings.health_port if settings.tls_cert_file else settings.port
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["grpc"] == {"port": plaintext_port, "service": FULL_NAMES[service]}
    assert container["livenessProbe"]["grpc"] == {"port": plaintext_port, "service": ""}
    assert all(container[probe]["timeoutSeconds"] > 1 for probe in container if probe.endswith("Probe"))


def test_a_pod_is_given_time_to_drain(deployed):
    manifests, service, container, settings = deployed
    pod = named(manifests, "Deployment", f"splitsam-{service}")["spec"]["template"]["spec"]
    readiness = container["readinessProbe"]
    assert settings.drain_delay_ms >= 1000 * readiness["periodSeconds"]
    assert settings.grace_ms >= getattr(settings, LONGEST_CALL[service])
    assert pod["terminationGracePeriodSeconds"] * 1000 >= settings.drain_delay_ms + settings.grace_ms + CLOSING_MS
    assert "lifecycle" not in container  # a preStop hook would be one more wait to count


def test_secrets_are_read_from_where_they_are_mounted(deployed):
    manifests, service, container, settings = deployed
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    pod = named(manifests, "Deployment", f"splitsam-{service}")["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    secrets = {item["metadata"]["name"]: item["stringData"] for item in load(DEPLOY / "secrets.example.yaml")}
    # The third is what tools that make certificates add to a Secret of type kubernetes.io/tls.
    secrets[f"splitsam-{service}-tls"] = {"tls.crt": "", "tls.key": "", "ca.crt": ""}
    tls_files = (settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
    for path in (settings.secret_file, settings.tokens_file, settings.redis_url_file, *filter(None, tls_files)):
        mount = mounts[str(path.parent)]
        assert mount["readOnly"]
        assert "subPath" not in mount  # such a mount never changes again
        assert path.name in secrets[volumes[mount["name"]]["secret"]["secretName"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoders_call_encoders_by_a_name_and_with_what_those_ask_for(variant, monkeypatch):
    manifests = build(variant)
    for name, value in environment(manifests, container_of(manifests, "decoder")).items():
        monkeypatch.setenv(name, value)
    settings = DecoderSettings.load()
    service, _, port = settings.encoder_address.partition(":")
    [grpc_port] = [p for p in named(manifests, "Service", service)["spec"]["ports"] if p["name"] == "grpc"]
    assert int(port) == grpc_port["port"]
    assert (settings.encoder_ca_file is not None) == (settings.tls_cert_file is not None)
    asked = settings.tls_client_ca_file is not None
    pair = (settings.tls_cert_file, settings.tls_key_file) if asked else (None, None)
    assert (settings.encoder_cert_file, settings.encoder_key_file) == pair
    own_files = (settings.encoder_ca_file, settings.encoder_cert_file, settings.encoder_key_file)
    assert {path.parent for path in own_files if path} <= {Path("/etc/splitsam/tls")}


def test_tls_is_on_where_its_component_is_and_ports_say_so(deployed, request):
    manifests, service, _, settings = deployed
    variant = request.node.callspec.params["deployed"][0]
    assert (settings.tls_cert_file is not None) == ("TLS" in variant)
    assert (settings.tls_client_ca_file is not None) == ("mutual-tls" in VARIANTS[variant][1])
    for name in (f"splitsam-{service}", f"splitsam-{service}-replicas"):
        [port] = [port for port in named(manifests, "Service", name)["spec"]["ports"] if port["name"] == "grpc"]
        plaintext = "grpc" if VARIANTS[variant][0] == "mesh" else "kubernetes.io/h2c"
        assert port["appProtocol"] == ("https" if settings.tls_cert_file else plaintext)
        assert settings.health_port not in {port["port"] for port in named(manifests, "Service", name)["spec"]["ports"]}


def test_production_settings_are_safe(deployed):
    _, _, _, settings = deployed
    assert not settings.reflection
    assert settings.log_level == "info"
    assert settings.tokens_file is not None
    assert settings.max_connection_age_ms > 0


def test_memory_holds_what_the_settings_promise(deployed):
    _, service, container, settings = deployed
    limit = size_bytes(container["resources"]["limits"]["memory"])
    if service == "encoder":
        # Waiting images of 1024 x 1024 x 3 bytes, and in whatever decodes one at its full size, twice.
        decoding = settings.decode_processes or settings.decode_threads
        promised = settings.max_queue * 3 * 2**20 + decoding * settings.max_image_pixels * 3 * 2
    else:
        promised = settings.logits_memory_bytes + (settings.memory_bytes if settings.device == "cpu" else 0)
    promised += 3 * settings.max_upload_bytes  # what has arrived, its message, and the image in that
    assert limit - promised >= SEEN_BYTES[service]


def test_a_device_and_its_resources_agree(deployed):
    _, service, container, settings = deployed
    is_cuda = settings.device == "cuda"
    assert is_cuda == ("nvidia.com/gpu" in container["resources"]["limits"])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container["image"] == f"splitsam-{service}:{version}-{'cuda' if is_cuda else 'cpu'}"


def test_the_job_asks_the_encoder_for_as_many_shards_as_it_has():
    manifests = build("cpu-kind with a dataset")
    [job] = of_kind(manifests, "Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    encode, *words, dataset = container["args"]
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert encode == "encode"
    assert options.keys() <= {
        flag for option in typer.main.get_command(app).commands[encode].params for flag in option.opts
    }
    shards = job["spec"]["completions"]
    assert options["--shard"] == f"$(JOB_COMPLETION_INDEX)/{shards}"
    parse_shard(options["--shard"].replace("$(JOB_COMPLETION_INDEX)", str(shards - 1)))
    service, _, port = options["--encoder"].partition(":")
    ports = named(manifests, "Service", service)["spec"]["ports"]
    assert int(port) in {item["port"] for item in ports if item["name"] == "grpc"}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {dataset, str(Path(options["--token-file"]).parent)} <= mounts
    assert container["image"] == container_of(manifests, "encoder")["image"]


def test_the_job_tries_again_what_may_help_and_nothing_else():
    [job] = of_kind(build("cpu-kind with a dataset"), "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["backoffLimitPerIndex"] > 0
    [final] = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailIndex"]
    assert final["values"] == [2, BAD_INPUT]
    assert AGAIN not in final["values"]
    assert final["containerName"] == spec["template"]["spec"]["containers"][0]["name"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # such a policy allows no other


def test_the_mesh_encrypts_everything_but_scrapes_and_knows_the_services():
    manifests = build("mesh")
    [namespace] = of_kind(manifests, "Namespace")
    assert namespace["metadata"]["labels"]["istio-injection"] == "enabled"
    policies = of_kind(manifests, "PeerAuthentication")
    assert all(policy["spec"]["mtls"] == {"mode": "STRICT"} for policy in policies)
    assert [policy["metadata"]["name"] for policy in policies if "selector" not in policy["spec"]] == ["default"]
    for service in SERVICES:
        name = f"splitsam-{service}"
        metrics = SETTINGS[service].model_fields["port"].default + 10
        assert named(manifests, "PeerAuthentication", name)["spec"]["portLevelMtls"] == {
            str(metrics): {"mode": "PERMISSIVE"}
        }
        ports = {port["name"]: port["containerPort"] for port in container_of(manifests, service)["ports"]}
        assert ports["metrics"] == metrics
        assert named(manifests, "DestinationRule", name)["spec"]["host"] == name


def test_redis_is_where_the_made_url_says():
    made = next(item for item in load(DEPLOY / "secrets.example.yaml") if item["metadata"]["name"] == "splitsam-redis")
    assert made["stringData"]["url"] == "REPLACE_URL"
    [port] = named(build("cpu-kind"), "Service", "splitsam-redis")["spec"]["ports"]
    assert f"@splitsam-redis:{port['port']}/0" in (DEPLOY / "make-secrets").read_text()


def test_init_container_verifies_what_the_service_loads(deployed):
    manifests, service, container, settings = deployed
    pod = named(manifests, "Deployment", f"splitsam-{service}")["spec"]["template"]["spec"]
    if settings.checkpoint is None:
        assert "initContainers" not in pod
        return
    [init] = pod["initContainers"]
    variables = environment(manifests, init)
    assert settings.checkpoint == f"/weights/{variables['WEIGHTS_FILE']}"
    assert settings.sha256 == variables["WEIGHTS_SHA256"] == META_SHA256[variables["WEIGHTS_FILE"]]
    assert init["image"] == container["image"]
    for each in (init, container):
        assert {"name": "weights", "mountPath": "/weights", "readOnly": True} in each["volumeMounts"]


@pytest.mark.parametrize("damaged", [False, True])
def test_the_verification_stops_damaged_weights(tmp_path, damaged):
    deployment = named(build("gpu with all"), "Deployment", "splitsam-encoder")
    [init] = deployment["spec"]["template"]["spec"]["initContainers"]
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"weights")
    digest = file_sha256(weights)
    if damaged:
        weights.write_bytes(b"weighty")
    script = init["command"][2].replace("/weights/", f"{tmp_path}/")
    variables = {**os.environ, "WEIGHTS_FILE": "w.pth", "WEIGHTS_SHA256": digest}
    result = subprocess.run([*init["command"][:2], script], env=variables, capture_output=True, check=False)
    assert (result.returncode != 0) == damaged


def series() -> dict[str, set[str]]:
    """Every time series that the services may expose, with the names of its labels."""
    found = {}
    collectors = GatewayMetrics().registry._names_to_collectors | Metrics().registry._names_to_collectors
    for name, collector in collectors.items():
        labels = set(collector._labelnames)
        found[name] = labels | ({"le"} if name.endswith("_bucket") else set())
    return found


def expressions():
    for variant in ("cpu-kind with all", "gpu with all"):
        for rule in of_kind(build(variant), "PrometheusRule"):
            for group in rule["spec"]["groups"]:
                yield from (alert["expr"] for alert in group["rules"])
        for scaled in of_kind(build(variant), "ScaledObject"):
            yield from (trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"])
    yield from (target["expr"] for panel in panels() for target in panel["targets"])


def panels():
    """Of the Grafana dashboard, as the cluster is given it."""
    boards = [item for item in of_kind(build("gpu with all"), "ConfigMap") if "dashboard.json" in item["data"]]
    [board] = boards
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    return json.loads(board["data"]["dashboard.json"])["panels"]


def test_dashboard_shows_every_metric_in_places_of_its_own():
    asked = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    names = {name.removesuffix("_created") for name in series()}
    bases = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in names}
    assert {base for base in bases if base not in asked} == set()
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels()]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in panels()})
    assert all(panel["title"] and panel["description"].endswith(".") for panel in panels())


def test_alerts_scalers_and_dashboard_ask_for_series_and_labels_that_exist():
    known = series()
    asked = 0
    for expression in expressions():
        assert expression.count("(") == expression.count(")")
        for name, selector in re.findall(r"\b(splitsam_\w+)(?:\{([^}]*)\})?", expression):
            asked += 1
            labels = set(re.findall(r"(\w+)=~?\"", selector))
            assert labels - {"namespace", "service"} <= known[name]
        for grouping in re.findall(r"by \(([^)]*)\)", expression):
            of_scrapes = {"namespace", "service"}
            assert set(grouping.replace(" ", "").split(",")) - of_scrapes <= set().union(*known.values())
    assert asked > 10


def test_alerts_name_values_that_the_code_uses():
    used = "".join(path.read_text() for path in (ROOT / "common").glob("*.py"))
    used += "".join(path.read_text() for path in ROOT.glob("*_service/*.py"))
    values = {
        value for text in expressions() for value in re.findall(r'(?:tier|result|kind|batcher)=~?"([\w|]+)"', text)
    }
    names = {name for value in values for name in value.split("|")}
    assert names >= {"unavailable", "bad", "encoder", "decoder", "prepare"}
    for name in names:
        assert f'"{name}"' in used


def test_every_alert_says_what_to_do():
    [rule] = of_kind(build("gpu with all"), "PrometheusRule")
    for group in rule["spec"]["groups"]:
        for alert in group["rules"]:
            assert alert["labels"]["severity"] in ("warning", "critical")
            assert len(alert["annotations"]["runbook"]) > 40
            assert alert["annotations"]["summary"].endswith(".")


def test_metrics_are_scraped_where_they_are_served(manifests):
    for monitor in of_kind(manifests, "ServiceMonitor"):
        selector = monitor["spec"]["selector"]
        scraped = [item for item in of_kind(manifests, "Service") if selects(selector, item["metadata"]["labels"])]
        gateways = {item["metadata"]["name"] for item in of_kind(manifests, "Deployment")} & {"splitsam-gateway"}
        wanted = {f"splitsam-{name}-replicas" for name in SERVICES} | gateways
        assert {item["metadata"]["name"] for item in scraped} == wanted
        for service in scraped:
            assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_dockerfile_is_clean():
    result = subprocess.run(
        [PROGRAMS / "hadolint", "--failure-threshold", "style", DEPLOY / "docker" / "Dockerfile"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_images_hold_what_exports_traces():
    assert '*extras["tracing"]' in DOCKERFILE


def test_images_start_the_services_on_their_ports():
    for service in SERVICES:
        stage = DOCKERFILE.partition(f"FROM runtime AS {service}\n")[2].partition("\nFROM")[0]
        settings = SETTINGS[service].model_fields
        metrics_port = getattr(StackSettings(), f"{service}_metrics_port")
        assert f"EXPOSE {settings['port'].default} {metrics_port}\n" in stage
        assert json.loads(stage.partition("CMD ")[2].splitlines()[0]) == [f"serve-{service}"]
    assert 'ENTRYPOINT ["splitsam"]' in DOCKERFILE


def test_images_run_as_the_user_of_the_pods_and_write_where_they_may(manifests):
    user, group = map(int, re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.M).groups())
    written = re.findall(r"(?:HOME|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR)=(\S+)", DOCKERFILE)
    assert len(written) == 3
    for name, spec in pod_specs(manifests):
        if name not in {f"splitsam-{service}" for service in SERVICES}:
            continue
        security = spec["securityContext"]
        assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (user, group, group)
        for container in spec["containers"]:
            mounts = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
            assert all(any(f"{path}/".startswith(f"{mount}/") for mount in mounts) for path in written)
            assert "/tmp" in mounts


def test_the_image_is_made_of_what_the_wheel_is_made_of():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.partition("/")[0] for path in project["tool"]["setuptools"]["package-dir"].values()}
    copied = {line.split()[1] for line in DOCKERFILE.splitlines() if re.match(r"COPY \w+ \w+$", line)}
    assert copied == folders
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    files = {name for line in re.findall(r"^COPY (.*\.\w+ .*)\./?$", DOCKERFILE, re.M) for name in shlex.split(line)}
    assert kept == files | {f"{folder}/" for folder in folders}


def test_no_other_container_reads_our_settings(manifests):
    for _, spec in pod_specs(manifests):
        for container in containers(spec):
            if container["name"] not in (*SERVICES, "gateway"):
                assert not any(item["name"].startswith("SPLITSAM_") for item in container.get("env", ()))


def test_the_guide_names_settings_and_files_that_exist():
    guide = (DEPLOY / "README.md").read_text()
    known = {
        (settings.model_config["env_prefix"] + name).upper()
        for settings in (*SETTINGS.values(), GatewaySettings)
        for name in settings.model_fields
    }
    assert set(re.findall(r"SPLITSAM_\w+", guide)) <= known
    for path in re.findall(r"deploy/[\w./-]*\w", guide):
        assert (ROOT / path).exists(), path

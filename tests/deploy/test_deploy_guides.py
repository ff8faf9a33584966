"""What the guides claim: tests, settings and files that exist, and commands for certificates that work."""

import csv
import math
import os
import re
import shutil
import subprocess

import pytest
import yaml
from manifests import DEPLOY, PROGRAMS, ROOT, of_kind

from splitsam.common.certificates import Identity
from splitsam.common.metrics import Metrics
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.encoder_service.settings import EncoderSettings

THREATS = (DEPLOY / "THREATS.md").read_text()
GUIDE = (DEPLOY / "README.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", GUIDE, re.S | re.M)


def test_every_threat_names_tests_that_exist():
    named = re.findall(r"`((?:unit|e2e|deploy)/\w+\.py)(?:::(\w+))?`", THREATS)
    assert len(named) > 20
    for path, test in named:
        source = (ROOT / "tests" / path).read_text()
        assert not test or f"def {test}(" in source, f"{path}::{test}"


def test_every_threat_that_is_met_names_what_shows_it():
    rows = [line for line in THREATS.splitlines() if line.startswith("|")][2:]
    assert rows
    for row in rows:
        assert "`" in row.rsplit("|", 2)[1], row


def test_settings_of_the_threats_exist():
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", THREATS)) - {"weights_only"}
    assert len(named) > 5
    assert named <= EncoderSettings.model_fields.keys() & DecoderSettings.model_fields.keys()


def test_the_guide_lists_every_metric_with_its_labels():
    listed = {
        name: set(re.findall(r"`(\w+)`", labels))
        for name, labels in re.findall(r"^\| `(splitsam_\w+)` \|([^|]*)\|", GUIDE, re.M)
    }
    registry = Metrics().registry
    exported = {
        family.name + ("_total" if family.type == "counter" else ""): set(
            registry._names_to_collectors[family.name]._labelnames
        )
        for family in registry.collect()
        if family.name.startswith("splitsam_")
    }
    assert listed == exported


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl: the guide's commands cannot be run")
def test_the_guides_certificates_are_accepted(tmp_path):
    [block] = [block for block in BLOCKS if block.startswith("openssl req")]
    script = 'set -e\nkubectl() { echo kubectl "$@"; }\n' + block
    result = subprocess.run(
        [shutil.which("bash"), "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    for service in ("encoder", "decoder"):
        secret = next(line for line in result.stdout.splitlines() if f"splitsam-{service}-tls" in line)
        files = dict(re.findall(r"--from-file (\S+)=(\S+)", secret))
        assert files.keys() == {"tls.crt", "tls.key", "ca.crt"}
        read = {name: (tmp_path / file).read_bytes() for name, file in files.items()}
        Identity(read["tls.crt"], read["tls.key"], read["ca.crt"]).check()
        command = ["openssl", "verify", "-x509_strict", "-CAfile", files["ca.crt"], "-verify_hostname"]
        checked = subprocess.run(
            [*command, f"splitsam-{service}.splitsam.svc", files["tls.crt"]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert checked.returncode == 0, checked.stderr


def test_the_guides_job_has_as_many_shards_as_it_says(tmp_path):
    [block] = [block for block in BLOCKS if "components/encode-dataset" in block]
    kustomization = tmp_path.resolve() / "kustomization.yaml"
    kustomization.write_text(block.replace("../splitsam", os.path.relpath(ROOT, kustomization.parent)))
    command = [PROGRAMS / "kubectl", "kustomize", kustomization.parent]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    [job] = of_kind(list(yaml.safe_load_all(result.stdout)), "Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert job["spec"]["completions"] == 32
    assert container["args"][1:3] == ["--shard", "$(JOB_COMPLETION_INDEX)/32"]
    assert container["image"].startswith("registry.example/")


def measured(name, **where):
    """Rows of a file of results."""
    with (ROOT / "bench" / "results" / name).open() as file:
        return [row for row in csv.DictReader(file) if all(row[column] == value for column, value in where.items())]


def test_the_guides_gpus_are_what_the_results_say():
    rows = re.findall(r"^\| (vit_\w) \| ([\d,.]+) \| ([\d,]+) MiB \| (\d+) \| (\d+) \| (\d+) \|$", GUIDE, re.M)
    assert {row[0] for row in rows} == {"vit_t", "vit_b", "vit_l", "vit_h"}
    for model, images_s, peak_mib, *gpus in rows:
        runs = measured("waterfall-nvidia-h100-80gb-hbm3.csv", scope="encoder", model=model, rung="fused")
        best = max(float(run["img_s"]) for run in runs)
        assert float(images_s.replace(",", "")) == pytest.approx(best, rel=0.005)
        assert int(peak_mib.replace(",", "")) == round(max(float(run["peak_mib"]) for run in runs))
        assert [int(count) for count in gpus] == [math.ceil(rate / (0.7 * best)) for rate in (10, 100, 500)]


def test_the_guides_cpus_are_what_the_results_say():
    said = re.search(r"2 cores encode \[([\d.]+) images a second\]\S+ with vit_t and ([\d.]+) with vit_b", GUIDE)
    for figure, model in zip(said.groups(), ("vit_t", "vit_b"), strict=True):
        [run] = measured("encode-cpu-2-cores.csv", model=model)
        assert float(figure) == pytest.approx(float(run["img_s"]), rel=0.03)


def test_the_guides_codec_keeps_what_the_results_say():
    [said] = re.findall(r"masks \[keep a mean IoU of ([\d.]+)\]", GUIDE)
    [run] = measured("codecs-cpu-2-cores.csv", codec="int8")
    assert float(said) == round(float(run["mask_miou"]), 3)

"""`splitsam encode` against running services: folders, lists, shards, bad files, and a second run."""

import json
from pathlib import Path

import pytest
import yaml
from e2e_support import draw, image_file, run_command

from bench.relay import Relay
from splitsam.client import cli
from splitsam.client.image_list import Shard

JOB = Path(__file__).parents[2] / "deploy" / "kustomize" / "components" / "encode-dataset" / "job.yaml"
NAMES = ("a.jpg", "deep/b.jpg", "deep/c.jpg")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of small images, by a name for each."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep").mkdir()
    for seed, name in enumerate(NAMES, start=800):
        (folder / name).write_bytes(image_file(draw(seed), "JPEG"))
    return folder


def test_a_folder_is_encoded_once_past_bad_files(alpha, where, images, tmp_path):
    options = tmp_path / "missing.png", "--report", tmp_path / "report.json", *where
    (images / "bad.png").write_bytes(b"not an image")
    first = run_command("encode", images, *options, folder=tmp_path)
    (images / "bad.png").unlink()
    assert first.returncode == 3, first.stderr  # nothing that another run would mend
    assert first.stdout.startswith("3 of 5 images are encoded (")
    failed = [line for line in first.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2
    assert any("bad.png" in line and "image" in line for line in failed)
    assert any("missing.png" in line for line in failed)
    assert "Traceback" not in first.stderr
    assert all(alpha.look_up((images / name).read_bytes()).found for name in NAMES)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["encoded"], report["found"], report["unanswered"]) == (5, 3, 0, 0)
    assert {failure["image"] for failure in report["failures"]} == {str(images / "bad.png"), str(options[0])}
    assert all(failure["is_final"] for failure in report["failures"])


def test_a_second_run_sends_no_image(stack, alpha, where, images, tmp_path):
    contents = [(images / name).read_bytes() for name in NAMES]
    for content in contents:
        alpha.encode(content)
    with Relay(stack.encoder) as relay:
        result = run_command("encode", images, "--encoder", relay.address, *where[2:], folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("3 of 3 images are encoded (")
    assert result.stdout.endswith(", 3 of them were before\n")
    assert 0 < relay.sent_bytes < min(map(len, contents))


def test_shards_of_a_list_and_of_a_coco_file_are_the_whole(alpha, where, images, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(NAMES))
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"file_name": name} for name in NAMES]}))
    for name in NAMES:
        alpha.encode((images / name).read_bytes())
    for index, source in enumerate((("--list", "list.txt"), ("--coco", "coco.json"))):
        expected = sum(Shard(index, 2).holds(name) for name in NAMES)
        result = run_command("encode", *source, "--root", images, "--shard", f"{index}/2", *where, folder=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"{expected} of {expected} images are encoded (")


def test_the_jobs_command_encodes_every_image_in_one_shard(alpha, stack, where, images, capsys):
    """As the manifest has it, but for names that only exist in a cluster."""
    [job] = [item for item in yaml.safe_load_all(JOB.read_text()) if item["kind"] == "Job"]
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    here = {
        "/dataset": images,
        "splitsam-encoder-replicas:50051": stack.encoder,
        "/etc/splitsam/caller/token": where[-1],
    }
    counts = []
    for index in range(job["spec"]["completions"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(here.get(word, word)).replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in args])
        assert stopped.value.code == 0
        counts.append(int(capsys.readouterr().out.split()[0]))
    assert sum(counts) == len(NAMES)
    assert all(alpha.look_up((images / name).read_bytes()).found for name in NAMES)

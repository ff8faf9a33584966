"""The wheel, built from a clean copy of this tree and installed where nothing else is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What earlier builds have left behind must not be needed, nor get in.
LEFT_OUT = (".*", "__pycache__", "build", "dist", "out", "*.egg-info", "*_pb2*", "tests", "training", "bench")


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def modules(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py") if "_pb2" not in path.name}


@pytest.mark.long
def test_wheel_installs_only_splitsam_and_its_command(tmp_path):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name.removeprefix("splitsam."): folder for name, folder in settings["package-dir"].items()}
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_OUT))
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", source)
    [wheel] = (tmp_path / "dist").iterdir()
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    [packages] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    before = {path.name for path in packages.iterdir()}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run(programs / "pip", "install", "--no-deps", "--no-index", wheel, env=environment)
    [info] = packages.glob("splitsam-*.dist-info")
    installed = packages / "splitsam"
    assert {path.name for path in packages.iterdir()} - before == {"splitsam", info.name}
    assert {path.name for path in installed.iterdir()} - {"__pycache__"} == folders.keys()
    for name, folder in folders.items():
        assert modules(installed / name) == modules(ROOT / folder)
    page = {path.name for path in (ROOT / "gateway" / "page").iterdir()}
    assert {path.name for path in (installed / "gateway" / "page").iterdir()} == page
    for name in ("encoder", "decoder", "types"):
        assert (installed / "v1" / f"{name}_pb2.py").is_file()
        assert (installed / "v1" / f"{name}.proto").is_file()

    # The dependencies are lent by this environment, in which splitsam itself is only a link to the tree.
    environment["PYTHONPATH"] = os.pathsep.join([str(packages), sysconfig.get_path("purelib")])
    version = run(programs / "splitsam", "--version", cwd="/tmp", env=environment)
    assert version.split() == ["splitsam", info.name.removeprefix("splitsam-").removesuffix(".dist-info")]
    where = "import splitsam.client.cli as cli; print(cli.__file__)"
    assert run(programs / "python", "-c", where, cwd="/tmp", env=environment).startswith(str(packages))

"""The examples in other languages, made ready to run: in a folder of their own, with what they need beside them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e_support import draw, image_file

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PROTOS = ROOT / "protos"
# Programs of the tests, which use the examples' clients.
PROGRAMS = Path(__file__).parent / "examples"
OFFLINE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH")
# Where Debian puts the sources of Go packages.
GO_SOURCES = Path("/usr/share/gocode")
GO_NEEDS = ("google.golang.org/grpc", "google.golang.org/protobuf", "google.golang.org/genproto")
PROTO_FILES = [f"splitsam/v1/{name}.proto" for name in ("types", "encoder", "decoder")]


@dataclass(frozen=True)
class Example:
    """An example's folder, and the command of each program in it: click, recovery and runs."""

    language: str
    folder: Path
    commands: Mapping[str, tuple[str, ...]]

    def run(self, program: str, *arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, calling nothing through a proxy."""
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return subprocess.run(
            [*self.commands[program], *map(str, arguments)],
            cwd=self.folder,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def require(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: no client in its language to call the services from")


def prepare_node(folder: Path) -> Example:
    """Installs what the lock file pins; beside it are a photo and the .proto files, as the README's example wants."""
    require("node", "npm")
    shutil.copytree(EXAMPLES / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(PROTOS / "splitsam", folder / "protos" / "splitsam", ignore=shutil.ignore_patterns("*.py*"))
    for program in PROGRAMS.glob("*.mjs"):
        shutil.copy(program, folder)
    (folder / "photo.jpg").write_bytes(image_file(draw(700, (640, 480)), "JPEG"))
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if installed.returncode and any(sign in installed.stderr for sign in OFFLINE):
        pytest.skip("npm cannot reach its registry: no dependencies for the Node client")
    assert installed.returncode == 0, installed.stderr
    commands = {name: ("node", f"{name}.mjs") for name in ("recovery", "runs", "five_lines")}
    return Example("node", folder, {**commands, "click": ("node", "click.mjs", "--protos", "protos")})


def prepare_go(folder: Path) -> Example:
    """Generates code and builds with the packages of Debian, which need no network."""
    require("go", "protoc-gen-go", "protoc-gen-go-grpc")
    for package in GO_NEEDS:
        if not (GO_SOURCES / "src" / package).is_dir():
            pytest.skip(f"the Go package {package} is not installed (Debian has it as golang-google-*-dev)")
    sources = folder / "src" / "splitsamclick"
    shutil.copytree(EXAMPLES / "go", sources)
    for program in PROGRAMS.glob("*.go"):
        shutil.copy(program, sources)
    options = ",".join(["paths=source_relative", *(f"M{name}=splitsamclick/splitsam/v1" for name in PROTO_FILES)])
    outputs = [word for kind in ("go", "go-grpc") for word in (f"--{kind}_out={sources}", f"--{kind}_opt={options}")]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *outputs, *PROTO_FILES]
    subprocess.run(protoc, check=True, timeout=60)
    # One path, in GOPATH's way: builds that share a folder of modules would want a network.
    environment = os.environ | {"GO111MODULE": "off", "GOPATH": f"{folder}:{GO_SOURCES}", "GOFLAGS": ""}
    for name in ("click", "recovery", "runs"):
        build = ["go", "build", "-o", str(folder / name), "client.go", "mask.go", "codec.go", f"{name}.go"]
        built = subprocess.run(
            build, cwd=sources, env=environment, capture_output=True, text=True, timeout=150, check=False
        )
        assert built.returncode == 0, built.stderr
    return Example("go", folder, {name: (str(folder / name),) for name in ("click", "recovery", "runs")})

"""Generates the Python code of splitsam.v1 beside its .proto files; run by the build and by `make`."""

from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate() -> None:
    protos = sorted(str(path) for path in ROOT.rglob("*.proto"))
    outputs = [f"--{kind}_out={ROOT}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{ROOT}", *outputs, *protos]) != 0:
        raise RuntimeError("protoc failed; its messages are above")


if __name__ == "__main__":
    generate()

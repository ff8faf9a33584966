"""Real labeling tools, each in an environment of its own that `make test-tools` sets up."""

from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[3] / ".tools"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.tools)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def program():
    """The path of a program in a tool's environment."""

    def find(tool, name):
        path = TOOLS / tool / "bin" / name
        assert path.exists(), f"{path} is missing: make test-tools sets it up"
        return str(path)

    return find

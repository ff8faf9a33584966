"""Importing the client stays light: no torch, no cv2, nothing of the command line."""

import subprocess
import sys

import splitsam.client

HEAVY = ("torch", "cv2", "typer", "pycocotools", "redis", "pydantic", "segment_anything", "PIL")


def test_import_of_the_client_loads_nothing_heavy():
    code = f"import sys, splitsam.client; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_loads_what_starts_services_only_when_it_does():
    code = "import sys, splitsam.client.cli; print([name for name in ('torch', 'redis', 'cv2') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    assert all(hasattr(splitsam.client, name) for name in splitsam.client.__all__)

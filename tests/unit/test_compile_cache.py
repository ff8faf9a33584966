"""A compile cache that cannot be written: in processes of their own, because the way out lasts as long as a process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FULL_AT_FIRST = """
import os
from pathlib import Path
from splitsam.encoder_service.compile_cache import NOTE, warm_up

calls = []
def compile_all():
    calls.append(os.environ["TORCHINDUCTOR_CACHE_DIR"] + "/kernel" if calls else "/dev/full")
    try:
        Path(calls[-1]).write_bytes(b"code")
    except OSError as error:
        raise RuntimeError("backend failed") from error

assert warm_up(compile_all) == (NOTE,)
assert len(calls) == 2 and Path(calls[1]).exists()
assert warm_up(lambda: None) == ()
try:
    warm_up(lambda: 1 / 0)
except ZeroDivisionError:
    print(calls[1])
"""
SMALL_ENCODER = """
import torch
from random_encoders import random_encoder, random_images
from splitsam.encoder_service.compile_cache import NOTE, warm_up
from splitsam.encoder_service.optimize import build_rungs

encoder = build_rungs(random_encoder(64, 256, heads=2), ("fp32", "compile"), torch.device("cpu"))
with torch.inference_mode():
    assert warm_up(lambda: encoder(random_images(1, 256))) == (NOTE,)
print("compiled")
"""


def run(program, cache):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_is_compiled_goes_elsewhere_when_its_disk_is_full(tmp_path):
    kernel = Path(run(FULL_AT_FIRST, tmp_path))
    assert tmp_path not in kernel.parents
    assert not kernel.exists()  # it is gone with its process


@pytest.fixture
def tiny_disk(tmp_path):
    mount, umount = shutil.which("mount"), shutil.which("umount")
    command = [mount, "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)]
    if not mount or not umount or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield tmp_path
    subprocess.run([umount, str(tmp_path)], check=True)


@pytest.mark.long
def test_encoder_is_compiled_although_the_disk_of_its_cache_is_full(tiny_disk):
    assert run(SMALL_ENCODER, tiny_disk / "cache").splitlines()[-1] == "compiled"

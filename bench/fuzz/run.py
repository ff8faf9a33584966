"""Workers, one target after the other; what breaks the property is kept and can be played again."""

import collections
import json
import subprocess
import sys
import traceback
from pathlib import Path

from bench.commit import ROOT
from bench.fuzz.target import judge
from bench.fuzz.targets import BY_NAME
from bench.fuzz.worker import Report, read_current, save_crash


def run_target(name: str, *, inputs: int, seed: int, guided: bool, folder: Path) -> Report:
    """Run a target in a process of its own.

    Args:
        folder: of this target: crashes, atheris' corpus, the worker's `log`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bench.fuzz.worker", name, "--inputs", str(inputs), "--seed", str(seed)]
    command += ["--folder", str(folder), *(["--guided"] if guided else [])]
    with (folder / "log").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False, cwd=ROOT)
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines and lines[-1].startswith("{"):
        fields = json.loads(lines[-1])
        return Report(**fields | {"outcomes": collections.Counter(fields["outcomes"])})
    ended = f"the process ended with status {done.returncode}"
    if not (folder / "current").exists():
        raise RuntimeError(f"{name}: {ended} before its first input; log: {folder / 'log'}")
    crash = save_crash(folder, read_current(folder), ended)
    return Report(inputs=1, outcomes=collections.Counter({"crash": 1}), crashes={ended: crash})


def replay(path: Path) -> str:
    """Judge a crash again; its folder is named after its target. The outcome, or the traceback of what it breaks."""
    target = next(target for target in BY_NAME.values() if folder_name(target.name) == path.parent.name)
    try:
        return judge(target, path.read_bytes())
    except Exception:  # noqa: BLE001 - as the worker
        return traceback.format_exc()


def folder_name(target: str) -> str:
    return target.lower().replace(" ", "-")

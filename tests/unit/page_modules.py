"""Runs the labeling page's modules that need no browser, in Node."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "gateway" / "page"


class Modules:
    """A copy of the page's files, as modules of Node."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "page"
        shutil.copytree(PAGE, self._folder)
        (self._folder / "package.json").write_text('{"type": "module"}')

    def run(self, imports: str, script: str, given: Any = None) -> Any:
        """What a script returns, as JSON.

        Args:
            imports: as in `{ joinHoles } from "./coco.js"`, several in lines.
            script: the body of an asynchronous function of `given`.
        """
        head = "\n".join(f"import {line}" for line in imports.splitlines())
        run = f"""{head}
import {{ readFileSync }} from "node:fs";
const given = JSON.parse(readFileSync(0));
console.log(JSON.stringify(await (async () => {{ {script} }})()));
"""
        command = ["node", "--input-type=module", "--eval", run]
        result = subprocess.run(
            command, cwd=self._folder, input=json.dumps(given), capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)


def open_modules(folder: Path) -> Modules:
    if shutil.which("node") is None:
        pytest.skip("node is not installed: nothing but a browser to run the page's modules in")
    return Modules(folder)

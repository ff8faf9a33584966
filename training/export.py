"""Write the averaged weights of a training state as the checkpoint that ships.

python -m training.export --state .data/state --checkpoint common/assets/vit_t.safetensors
"""

import argparse
import os
from pathlib import Path

from safetensors.torch import save_file

from splitsam.common.architectures import ARCHITECTURES, build_sam
from training.state import load_progress

METADATA = {"model": "vit_t", "license": "Apache-2.0", "format": "pt"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    arguments = parser.parse_args()
    _, average, progress = load_progress(arguments.state)
    build_sam(ARCHITECTURES["vit_t"]).load_state_dict(average, strict=True)
    counts = {f"training_{name}": f"{progress[name]:.0f}" for name in ("seconds", "steps", "images")}
    metadata = {**METADATA, **counts}
    draft = arguments.checkpoint.with_suffix(".draft")
    save_file({key: value.half().contiguous() for key, value in average.items()}, draft, metadata)
    draft.chmod(0o644)  # safetensors leaves a file that only its owner can read
    os.replace(draft, arguments.checkpoint)
    print(arguments.checkpoint, arguments.checkpoint.stat().st_size, metadata)


if __name__ == "__main__":
    main()

"""What a rung starts from: the dense fp32 encoder or, where it prunes and there are images for that, a pruned one."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from splitsam.common.sam_modules import Sam
from splitsam.encoder_service.ahead_of_time import read_images
from splitsam.encoder_service.calibrated_pruning import PRUNED_LAYERS, prune_on_images_


class Sources:
    """The fp32 encoders that rungs are built from, pruned once for each kind of pruning.

    Args:
        files: images to prune on, as of `splitsam optimize --image`; without any, rungs prune by magnitude themselves.
        device: to prune on.

    Raises:
        CheckpointError: a file is no image.
    """

    def __init__(self, sam: Sam, files: Sequence[Path], device: torch.device) -> None:
        self._dense, self._device = sam.image_encoder, device
        self._images = read_images(files, sam)
        self._pruned: dict[str, nn.Module] = {}

    def encoder(self, rungs: Sequence[str]) -> nn.Module:
        """On the CPU, and not to be changed."""
        pruning = [rung for rung in rungs if rung in PRUNED_LAYERS]
        if not pruning or self._images is None:
            return self._dense
        [rung] = pruning
        if rung not in self._pruned:
            encoder = copy.deepcopy(self._dense).to(self._device)
            with torch.inference_mode(False), torch.no_grad():
                prune_on_images_(encoder, self._images.to(self._device), PRUNED_LAYERS[rung])
            self._pruned[rung] = encoder.cpu()
        return self._pruned[rung]

"""The model sizes this project serves, all of them the one architecture of `segment_anything`."""

from dataclasses import dataclass

from splitsam.common.sam_modules import Sam, assemble_sam


@dataclass(frozen=True)
class Architecture:
    """The numbers that tell one SAM image encoder from another; prompt encoder and mask decoder never differ.

    Source: https://github.com/facebookresearch/segment-anything/blob/main/segment_anything/build_sam.py
    """

    name: str
    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]


ARCHITECTURES = {
    spec.name: spec
    for spec in (
        Architecture("vit_t", width=192, depth=8, heads=3, global_blocks=(3, 7)),
        Architecture("vit_b", width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
        Architecture("vit_l", width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
        Architecture("vit_h", width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
    )
}


def build_sam(architecture: Architecture) -> Sam:
    """Build `segment_anything`'s own module tree for an architecture, with random weights, in eval mode."""
    return assemble_sam(
        encoder_embed_dim=architecture.width,
        encoder_depth=architecture.depth,
        encoder_num_heads=architecture.heads,
        encoder_global_attn_indexes=list(architecture.global_blocks),
    )

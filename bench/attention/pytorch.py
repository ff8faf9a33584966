"""What PyTorch offers for the same layer, with and without its bias."""

import functools
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.attention.inputs import GRID, Inputs
from bench.attention.timing import Case, Variant
from splitsam.kernels.relpos_window import WINDOW


def split_heads(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v for SDPA, contiguous: [B, heads, 4096, d], or [25 B, heads, 196, d] with the padded tokens."""
    qkv = inputs.qkv
    batch, _, _, heads, d = qkv.shape
    if inputs.kind == "window":
        down, across = (-(-side // WINDOW) for side in GRID)
        padded = inputs.bias.expand(batch, down * WINDOW, across * WINDOW, 3, heads, d).clone()
        padded[:, : GRID[0], : GRID[1]] = qkv.view(batch, *GRID, 3, heads, d)
        windows = padded.view(batch, down, WINDOW, across, WINDOW, 3, heads, d).transpose(2, 3)
        qkv = windows.reshape(batch * down * across, WINDOW * WINDOW, 3, heads, d)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()
    return q, k, v


def dense_bias(inputs: Inputs, q: torch.Tensor) -> torch.Tensor:
    """[.., heads, N, N] in the dtype of q, its rows at a multiple of 8 elements as the backends ask."""
    groups, heads, tokens, d = q.shape
    side = GRID[0] if inputs.kind == "global" else WINDOW
    positions = torch.arange(side, device=q.device)
    offsets = positions[:, None] - positions[None, :] + side - 1
    grid_q = q.view(groups, heads, side, side, d)
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid_q, inputs.rel_pos_h[offsets])[..., :, None]
    rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid_q, inputs.rel_pos_w[offsets])[..., None, :]
    bias = (rel_h + rel_w).reshape(groups, heads, tokens, tokens)
    return pad(bias, (0, -tokens % 8))[..., :tokens] if tokens % 8 else bias


def sdpa_variants(case: Case) -> Iterator[Variant]:
    """Flash and cuDNN without bias, memory-efficient and cuDNN with a dense one."""
    q, k, v = split_heads(case.inputs)
    per_image = q.shape[0] // case.batch

    def image(out: torch.Tensor, index: int) -> torch.Tensor:
        return out[index * per_image : (index + 1) * per_image]

    @functools.cache
    def bias() -> torch.Tensor:
        return dense_bias(case.inputs, q)

    def expected(biased: bool, index: int) -> torch.Tensor:
        scores = (image(q, index).float() * case.inputs.scale) @ image(k, index).float().transpose(-2, -1)
        if biased:
            scores += image(bias(), index)
        weights: torch.Tensor = scores.softmax(dim=-1)
        return weights @ image(v, index).float()

    def run(backend: SDPBackend, biased: bool) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, attn_mask=bias() if biased else None, scale=case.inputs.scale)

    for name, backend, biased in (
        ("flash", SDPBackend.FLASH_ATTENTION, False),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION, False),
        ("mem-efficient", SDPBackend.EFFICIENT_ATTENTION, True),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION, True),
    ):
        yield Variant(
            f"{name} SDPA, {'dense' if biased else 'no'} bias",
            functools.partial(run, backend, biased),
            image,
            functools.partial(expected, biased),
        )

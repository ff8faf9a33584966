"""SAM's forward pass for many prompts of many images at once, at 1024 px or at half of it.

The weights are those of `segment_anything`'s modules, used in another order: its own forward takes one image at a
time and its attention builds the full score matrix. Decomposed relative positions become extra channels here,
q' = [q, q.Rh, q.Rw] and k' = [k, onehot(row), onehot(column)], so that q'.k' is the biased score and flash attention
takes it from there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from splitsam.common.sam_modules import MaskDecoder, PromptEncoder, Sam

FRAME_PX = 1024


def relative_table(table: torch.Tensor, size: int) -> torch.Tensor:
    """Embeddings of row differences: [2 * any - 1, C] to [query, key, C], resampled like `get_rel_pos`."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], 2 * size - 1, mode="linear")[0].T
    line = torch.arange(size, device=table.device)
    return table[line[:, None] - line[None, :] + size - 1]


def attend(attention: Any, x: torch.Tensor) -> torch.Tensor:
    """Multi-head attention with decomposed relative positions: [B, H, W, C] to the same."""
    batch, height, width, channels = x.shape
    heads, tokens = attention.num_heads, height * width
    q, k, v = attention.qkv(x).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    grid = q.reshape(batch, heads, height, width, -1)
    rows = torch.einsum("bnhwc,hkc->bnhwk", grid, relative_table(attention.rel_pos_h, height).to(q.dtype))
    columns = torch.einsum("bnhwc,wkc->bnhwk", grid, relative_table(attention.rel_pos_w, width).to(q.dtype))
    line = torch.arange(tokens, device=x.device)
    where = torch.cat([F.one_hot(line // width, height), F.one_hot(line % width, width)], -1).to(q.dtype)
    long_q = torch.cat([q * attention.scale, rows.flatten(2, 3), columns.flatten(2, 3)], -1)
    long_k = torch.cat([k, where.expand(batch, heads, -1, -1)], -1)
    padding = -long_q.shape[-1] % 8
    long_q, long_k = F.pad(long_q, (0, padding)), F.pad(long_k, (0, padding))
    long_v = F.pad(v, (0, long_q.shape[-1] - v.shape[-1]))
    mixed = F.scaled_dot_product_attention(long_q, long_k, long_v, scale=1.0)[..., : v.shape[-1]]
    projected: torch.Tensor = attention.proj(mixed.transpose(1, 2).reshape(batch, height, width, channels))
    return projected


def run_block(block: Any, x: torch.Tensor) -> torch.Tensor:
    """One transformer block, windowed or global: [B, H, W, C] to the same."""
    batch, height, width, channels = x.shape
    side, y = block.window_size, block.norm1(x)
    if side == 0:
        y = attend(block.attn, y)
    else:
        down, right = -height % side, -width % side
        y = F.pad(y, (0, 0, 0, right, 0, down))
        rows, columns = (height + down) // side, (width + right) // side
        windows = y.view(batch, rows, side, columns, side, channels).transpose(2, 3).flatten(0, 2)
        windows = attend(block.attn, windows).view(batch, rows, columns, side, side, channels)
        y = windows.transpose(2, 3).reshape(batch, rows * side, columns * side, channels)[:, :height, :width]
    x = x + y
    added: torch.Tensor = block.mlp(block.norm2(x))
    return x + added


def encode(sam: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Embed normalised images: [B, 3, S, S] to [B, 256, S / 16, S / 16]."""
    encoder: Any = sam.image_encoder
    x = encoder.patch_embed(images)
    position = F.interpolate(encoder.pos_embed.permute(0, 3, 1, 2), x.shape[1:3], mode="area").permute(0, 2, 3, 1)
    x = x + position
    for block in encoder.blocks:
        x = run_block(block, x)
    embeddings: torch.Tensor = encoder.neck(x.permute(0, 3, 1, 2))
    return embeddings


def normalise(sam: Sam, images: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """SAM's preprocessing of [B, 3, S, S] RGB 0..255; padding (not `valid`) becomes zero after it."""
    normalised: torch.Tensor = (images - sam.pixel_mean) / sam.pixel_std * valid
    return normalised


def embed_points(prompt_encoder: PromptEncoder, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Embed points: [N, P, 2] frame pixels (x, y) and [N, P] labels to [N, P, 256].

    Labels: -1 none, 0 background, 1 object, 2 and 3 the corners of a box.
    """
    with torch.autocast(points.device.type, enabled=False):
        position = prompt_encoder.pe_layer._pe_encoding((points.float() + 0.5) / FRAME_PX)
    table = torch.cat([prompt_encoder.not_a_point_embed.weight, *(e.weight for e in prompt_encoder.point_embeddings)])
    return torch.where(labels[..., None] < 0, 0.0, position) + table[labels + 1]


def embed_masks(prompt_encoder: PromptEncoder, masks: torch.Tensor, use: torch.Tensor) -> torch.Tensor:
    """Embed earlier logits [N, 1, G, G] where `use` [N] bool holds, else the embedding of no mask: [N, 256, g, g]."""
    none = prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
    dense = prompt_encoder.mask_downscaling(masks)
    return torch.where(use.view(-1, 1, 1, 1), dense, none.to(dense.dtype))


def mix(
    attention: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, present: torch.Tensor | None = None
) -> torch.Tensor:
    """The decoder's attention; `present` [K] bool says which keys are real, the others being padding."""
    heads = attention.num_heads
    q, k, v = (
        project(x).unflatten(2, (heads, -1)).transpose(1, 2)
        for project, x in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v))
    )
    if present is None:
        mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
        mixed = scores.masked_fill(~present, -1e9).softmax(-1).to(v.dtype) @ v
    projected: torch.Tensor = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return projected


def run_two_way(
    transformer: Any, keys: torch.Tensor, key_pe: torch.Tensor, tokens: torch.Tensor, present: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """SAM's two-way transformer over padded tokens.

    Args:
        keys: [N, T, 256], image tokens; key_pe: [1, T, 256].
        tokens: [N, P, 256]; present: [P] bool.

    Returns: tokens [N, P, 256] and image tokens [N, T, 256].
    """
    queries = tokens
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            queries = mix(layer.self_attn, queries, queries, queries, present)
        else:
            q = queries + tokens
            queries = queries + mix(layer.self_attn, q, q, queries, present)
        queries = layer.norm1(queries)
        queries = queries + mix(layer.cross_attn_token_to_image, queries + tokens, keys + key_pe, keys)
        queries = layer.norm2(queries)
        queries = layer.norm3(queries + layer.mlp(queries))
        keys = keys + mix(layer.cross_attn_image_to_token, keys + key_pe, queries + tokens, queries, present)
        keys = layer.norm4(keys)
    last = mix(transformer.final_attn_token_to_image, queries + tokens, keys + key_pe, keys)
    return transformer.norm_final_attn(queries + last), keys


def decode(
    decoder: MaskDecoder,
    embeddings: torch.Tensor,
    position: torch.Tensor,
    sparse: torch.Tensor,
    dense: torch.Tensor,
    present: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode M prompts for each of B images.

    Args:
        embeddings: [B, 256, g, g]
        position: [1, 256, g, g], the dense positional encoding
        sparse: [B * M, P, 256], image by image
        dense: [B * M, 256, g, g]
        present: [P] bool, false for padding at the end: with it every round has the same shape, and compiles once.

    Returns: logits [B * M, 4, 4g, 4g], predicted IoU [B * M, 4]; mask 0 is the single-mask output.
    """
    count, masks = len(sparse), decoder.num_mask_tokens
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([own.expand(count, -1, -1).to(sparse.dtype), sparse], 1)
    source = embeddings.repeat_interleave(count // len(embeddings), 0) + dense
    grid = source.shape[-2:]
    hidden, image = run_two_way(
        decoder.transformer,
        source.flatten(2).transpose(1, 2),
        position.flatten(2).transpose(1, 2),
        tokens,
        F.pad(present, (len(own), 0), value=True),
    )
    upscaled = decoder.output_upscaling(image.transpose(1, 2).reshape(count, -1, *grid))
    weights = torch.stack([decoder.output_hypernetworks_mlps[i](hidden[:, 1 + i]) for i in range(masks)], 1)
    logits = (weights @ upscaled.flatten(2)).view(count, masks, *upscaled.shape[-2:])
    return logits, decoder.iou_prediction_head(hidden[:, 0])

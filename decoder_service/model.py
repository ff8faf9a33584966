"""The prompt encoder and mask decoder of SAM over many images and prompts at once.

    tokens [S, j_prompts, T, 256] jagged ─┐
    sources [S, 4096, 256] ───────────────┴► two-way transformer ─► hypernetwork weights · upscaled features ─► logits

The arithmetic is that of `segment_anything`'s `PromptEncoder` and `MaskDecoder` on their own weights, except that what
depends on the image alone (three projections of the first layer) is computed per source and spread to its prompts.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nested import nested_tensor_from_jagged
from torch.nn import functional as F

from splitsam.common.architectures import EMBEDDING_SHAPE, IMAGE_SIDE_PX, LOW_RES_SIDE_PX
from splitsam.common.precision import DTYPES, exact_convolutions
from splitsam.common.sam_modules import Sam
from splitsam.decoder_service.packing import TOKENS_OF_SELECTION, ImageJob, Tile, pack

CHANNELS, GRID, _ = EMBEDDING_SHAPE
Spread = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PromptLogits:
    """What the model answers to one prompt, for k masks in the order of their mask tokens.

    Args:
        mask_indices: which mask token made each: 0, or 1 to 3.
        predicted_iou: the model's own estimate for each, about 0 to 1.
        logits: [k, 256, 256] float32 of the padded input, on the model's device; a view of its tile.
    """

    mask_indices: tuple[int, ...]
    predicted_iou: tuple[float, ...]
    logits: Tensor


class DecoderModel:
    """SAM's prompt encoder and mask decoder on one device.

    Args:
        sam: `segment_anything`'s model with its weights loaded; its modules are copied, not changed.
        device: where to compute.
        precision: of the transformer and upscaling; positional encodings and the small heads stay fp32.
        max_prompts_per_forward: prompts in one forward pass; each takes about 25 MiB in fp32, 12 in bf16.
    """

    def __init__(
        self,
        sam: Sam,
        device: torch.device | str,
        precision: Literal["fp32", "bf16"] = "fp32",
        max_prompts_per_forward: int = 16,
    ):
        self.device = torch.device(device)
        self.dtype = DTYPES[precision]
        self.max_prompts_per_forward = max_prompts_per_forward
        self._encoder = copy.deepcopy(sam.prompt_encoder).to(self.device).eval()
        self._heads = copy.deepcopy(sam.mask_decoder).to(self.device).eval()
        self._decoder = copy.deepcopy(sam.mask_decoder).to(self.device, self.dtype).eval()
        with torch.no_grad():
            encoder, heads = self._encoder, self._heads
            # [5, 256] in the order of packing's kinds.
            kinds = [encoder.not_a_point_embed, *encoder.point_embeddings]
            self._kind_embeddings = torch.cat([embedding.weight for embedding in kinds])
            self._output_tokens = torch.cat([heads.iou_token.weight, heads.mask_tokens.weight])
            self._positions = encoder.get_dense_pe().flatten(2).mT.to(self.dtype)

    @torch.no_grad()
    def decode(self, jobs: Sequence[ImageJob]) -> list[list[PromptLogits]]:
        """Predict mask logits for every prompt of every image.

        Args:
            jobs: images of any number of callers, each with any number of prompts.

        Returns:
            For each job and each of its prompts, in order, its masks. Batch-mates change nothing but rounding.

        Raises:
            torch.OutOfMemoryError: several jobs do not fit together, or one not even prompt by prompt.
        """
        prompts = self.max_prompts_per_forward
        while True:
            try:
                return self._decode(jobs, prompts)
            except torch.OutOfMemoryError:
                if len(jobs) > 1 or prompts == 1:
                    raise
            prompts //= 2  # out here what the failed attempt held is free again

    def _decode(self, jobs: Sequence[ImageJob], max_prompts: int) -> list[list[PromptLogits]]:
        """As `decode`, at most `max_prompts` in one forward pass."""
        tiles = pack(jobs, max_prompts)
        with exact_convolutions(self.device, self.dtype):
            outputs = [self._forward(tile, jobs) for tile in tiles]
        # One copy for all tiles: the host waits for the device here and nowhere before.
        numbers = [torch.stack([index.float(), iou], -1).flatten() for _, index, iou in outputs]
        host = torch.cat(numbers).tolist() if numbers else []
        answers: dict[tuple[int, int], PromptLogits] = {}
        position = 0
        for tile, (logits, _, _) in zip(tiles, outputs, strict=True):
            width = tile.wanted.shape[1]
            for row, owner in enumerate(tile.owners):
                scores = host[position : position + 2 * width]
                position += 2 * width
                i, j = owner
                k = len(TOKENS_OF_SELECTION[jobs[i].prompts[j].resolve(jobs[i].selection)])
                indices = tuple(int(index) for index in scores[: 2 * k : 2])
                answers[owner] = PromptLogits(indices, tuple(scores[1 : 2 * k : 2]), logits[row, :k])
        return [[answers[i, j] for j in range(len(job.prompts))] for i, job in enumerate(jobs)]

    def _forward(self, tile: Tile, jobs: Sequence[ImageJob]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits [P, K, 256, 256] float32, mask tokens [P, K] int64 and predicted IoU [P, K] float32."""
        offsets = self._to_device(tile.offsets)
        tokens = nested_tensor_from_jagged(self._embed_tokens(tile).to(self.dtype), offsets)
        queries, features = self._transform(tokens, self._embed_sources(tile, jobs))
        outputs = queries[:, :5].float()
        iou = self._heads.iou_prediction_head(outputs[:, 0])
        mlps = self._heads.output_hypernetworks_mlps
        hyper = torch.stack([mlp(outputs[:, 1 + i]) for i, mlp in enumerate(mlps)], dim=1)
        wanted = self._to_device(tile.wanted)
        wanted = torch.where(wanted < 0, iou[:, 1:].argmax(dim=1, keepdim=True) + 1, wanted)
        chosen = hyper.gather(1, wanted[..., None].expand(-1, -1, hyper.shape[-1]))
        return self._paint(features, chosen.to(self.dtype)).float(), wanted, iou.gather(1, wanted)

    def _embed_tokens(self, tile: Tile) -> Tensor:
        """Returns [P, 5 + T, 256] float32: the IoU token, four mask tokens and the prompt's own."""
        coords, kinds = self._to_device(tile.coords), self._to_device(tile.kinds)
        unit = 2 * ((coords + 0.5) / IMAGE_SIDE_PX) - 1
        # Written out because a matmul would lose the low bits of coordinates wherever TF32 is on.
        gaussian = self._encoder.pe_layer.positional_encoding_gaussian_matrix
        angles = 2 * torch.pi * (unit[..., :1] * gaussian[0] + unit[..., 1:] * gaussian[1])
        encoding = torch.cat([angles.sin(), angles.cos()], dim=-1)
        prompt = encoding * (kinds > 0)[..., None] + self._kind_embeddings[kinds]
        return torch.cat([self._output_tokens.expand(len(prompt), -1, -1), prompt], dim=1)

    def _embed_sources(self, tile: Tile, jobs: Sequence[ImageJob]) -> Tensor:
        """Returns [S, 4096, 256]: each source's image embedding plus its dense prompt embedding."""
        images = torch.stack([jobs[i].embedding.to(self.device, self.dtype, non_blocking=True) for i in tile.jobs])
        unmasked = len(tile.image_of_source) - len(tile.mask_inputs)
        dense = self._encoder.no_mask_embed.weight.view(1, CHANNELS, 1, 1).expand(unmasked, -1, GRID, GRID)
        if len(tile.mask_inputs):
            dense = torch.cat([dense, self._encoder.mask_downscaling(self._to_device(tile.mask_inputs))])
        sources: Tensor = images[self._to_device(tile.image_of_source)] + dense.to(self.dtype)
        return sources.flatten(2).mT.contiguous()

    def _transform(self, tokens: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        """`TwoWayTransformer.forward` for jagged prompts: tokens [S, j, T, 256], sources [S, 4096, 256].

        All prompts of a tile have T tokens, so the arithmetic runs on the packed values; a dispatch through
        NestedTensor costs about 100 us an operation and broadcasts sources by padding.

        Returns:
            [P, T, 256] tokens and [P, 4096, 256] features.
        """
        transformer = self._decoder.transformer
        offsets: Tensor = tokens.offsets()  # type: ignore[attr-defined]  # absent from torch's stubs
        tokens = tokens.values()
        spread = _spreader(offsets, len(tokens))
        queries, keys = tokens, sources
        for layer in transformer.layers:
            if layer.skip_first_layer_pe:
                queries = _attend(layer.self_attn, queries, queries, queries)
            else:
                located = queries + tokens
                queries = queries + _attend(layer.self_attn, located, located, queries)
            queries = layer.norm1(queries)
            located = keys + self._positions
            to_image = layer.cross_attn_token_to_image
            queries = layer.norm2(queries + _attend(to_image, queries + tokens, located, keys, spread_keys=spread))
            queries = layer.norm3(queries + layer.mlp(queries))
            to_token = layer.cross_attn_image_to_token
            update = _attend(to_token, located, queries + tokens, queries, spread_queries=spread)
            keys = layer.norm4(update.add_(spread(keys)))
            spread = _same
        final = transformer.final_attn_token_to_image
        queries = queries + _attend(final, queries + tokens, keys + self._positions, keys)
        return transformer.norm_final_attn(queries), keys

    def _paint(self, features: Tensor, hyper: Tensor) -> Tensor:
        """Upscale features [P, 4096, 256] and weigh them by hyper [P, K, 32] into logits [P, K, 256, 256].

        Both transposed convolutions have stride equal to their kernel, so each is a linear layer of every pixel on its
        own. The 2 x 2 blocks stay behind one another until the end, where only K channels are left to shuffle.
        """
        first, norm, activation, second, last_activation = self._decoder.output_upscaling
        pixels = _upscale(first, features)
        pixels = activation(F.layer_norm(pixels, norm.weight.shape, norm.weight, norm.bias, norm.eps))
        pixels = last_activation(_upscale(second, pixels))
        blocks: Tensor = (pixels @ hyper.mT).view(len(hyper), GRID, GRID, 2, 2, 2, 2, -1)
        return blocks.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(len(hyper), -1, LOW_RES_SIDE_PX, LOW_RES_SIDE_PX)

    def _to_device(self, array: object) -> Tensor:
        return torch.as_tensor(array).to(self.device, non_blocking=True)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _attend(
    attention: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    spread_queries: Spread = _same,
    spread_keys: Spread = _same,
) -> Tensor:
    """`Attention.forward` of segment_anything on [N, n, 256], spreading per-source sides after their projection."""
    q = spread_queries(attention.q_proj(queries))
    k, v = spread_keys(attention.k_proj(keys)), spread_keys(attention.v_proj(values))
    q, k, v = (side.reshape(*side.shape[:2], attention.num_heads, -1).transpose(1, 2) for side in (q, k, v))
    output: Tensor = attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return output


def _spreader(offsets: Tensor, prompts: int) -> Spread:
    """A function that repeats [S, ...] per prompt into [P, ...], as a view where there is one source."""
    if len(offsets) == 2:
        return lambda tensor: tensor.expand(prompts, *tensor.shape[1:])
    sources = torch.arange(len(offsets) - 1, device=offsets.device)
    source_of_prompt = torch.repeat_interleave(sources, offsets.diff(), output_size=prompts)
    return lambda tensor: tensor[source_of_prompt]


def _upscale(convolution: nn.ConvTranspose2d, pixels: Tensor) -> Tensor:
    """A 2 x 2, stride 2 transposed convolution: [P, n, C_in] to [P, 4 n, C_out], each pixel's block together."""
    out_channels = convolution.out_channels
    weight = convolution.weight.permute(2, 3, 1, 0).reshape(4 * out_channels, -1)
    bias = convolution.bias.repeat(4) if convolution.bias is not None else None
    return F.linear(pixels, weight, bias).view(len(pixels), -1, out_channels)

"""The prompt encoder and mask decoder of SAM over many images and prompts at once.

    tokens [S, j_prompts, T, 256] jagged ─┐
    prepared embeddings of S sources ─────┴► two-way transformer ─► hypernetwork weights · upscaled pixels ─► logits

The function is that of `segment_anything`'s `PromptEncoder` and `MaskDecoder` on their own weights; what depends on the
image alone is computed once for each embedding, and `Pixels` moves projections of pixels to the tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

from splitsam.common.architectures import IMAGE_SIDE_PX
from splitsam.common.precision import DTYPES, exact_convolutions
from splitsam.common.sam_modules import Sam
from splitsam.decoder_service.packing import TOKENS_OF_SELECTION, ImageJob, Tile, pack
from splitsam.decoder_service.paint import paint
from splitsam.decoder_service.pixels import Pixels, attend_by_head
from splitsam.decoder_service.prepared import PreparedEmbedding, prepare_rows


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
            self._positions = encoder.get_dense_pe()[0].flatten(1).mT.to(self.dtype).contiguous()

    @torch.no_grad()
    def decode(self, jobs: Sequence[ImageJob]) -> list[list[PromptLogits]]:
        """Predict mask logits for every prompt of every image.

        Args:
            jobs: images of any number of callers, each with any number of prompts.

        Returns:
            For each job and each of its prompts, in order, its masks. Batch-mates change nothing but rounding.
        """
        tiles = pack(jobs, self.max_prompts_per_forward)
        images = {i: self._prepared(jobs[i]) for i in {i for tile in tiles for i in tile.job_of_source}}
        with exact_convolutions(self.device, self.dtype):
            outputs = [self._forward(tile, images) for tile in tiles]
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

    def _forward(self, tile: Tile, images: Mapping[int, PreparedEmbedding]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits [P, K, 256, 256] float32, mask tokens [P, K] int64 and predicted IoU [P, K] float32."""
        offsets = self._to_device(tile.offsets)
        tokens = nested_tensor_from_jagged(self._embed_tokens(tile).to(self.dtype), offsets)
        pixels = Pixels(self._prepare_sources(tile, images), np.diff(tile.offsets).tolist(), self._positions)
        queries = self._transform(tokens, pixels)
        outputs = queries[:, :5].float()
        iou = self._heads.iou_prediction_head(outputs[:, 0])
        mlps = self._heads.output_hypernetworks_mlps
        hyper = torch.stack([mlp(outputs[:, 1 + i]) for i, mlp in enumerate(mlps)], dim=1)
        wanted = self._to_device(tile.wanted)
        wanted = torch.where(wanted < 0, iou[:, 1:].argmax(dim=1, keepdim=True) + 1, wanted)
        chosen = hyper.gather(1, wanted[..., None].expand(-1, -1, hyper.shape[-1]))
        logits = paint(self._decoder.output_upscaling, pixels.own, chosen.to(self.dtype)).float()
        return logits, wanted, iou.gather(1, wanted)

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

    @torch.no_grad()
    def prepare(self, embedding: Tensor) -> PreparedEmbedding:
        """An embedding with what every click on it needs and none changes; callers keep it.

        Args:
            embedding: [256, 64, 64] of any floating dtype, on any device.
        """
        pixels = embedding.to(self.device, self.dtype).flatten(1).mT + self._encoder.no_mask_embed.weight.to(self.dtype)
        return PreparedEmbedding(prepare_rows(self._decoder.transformer, pixels[None], self._positions)[0])

    def _prepared(self, job: ImageJob) -> PreparedEmbedding:
        return job.embedding if isinstance(job.embedding, PreparedEmbedding) else self.prepare(job.embedding)

    def _prepare_sources(self, tile: Tile, images: Mapping[int, PreparedEmbedding]) -> list[PreparedEmbedding]:
        """Each source of a tile; only those with mask inputs need work."""
        sources = [images[i] for i in tile.job_of_source]
        if len(tile.mask_inputs):
            dense = self._encoder.mask_downscaling(self._to_device(tile.mask_inputs)).flatten(2).mT
            dense = (dense - self._encoder.no_mask_embed.weight).to(self.dtype)
            masked = sources[-len(dense) :]
            pixels = torch.stack([image.pixels for image in masked]) + dense
            rows = prepare_rows(self._decoder.transformer, pixels, self._positions)
            sources[-len(dense) :] = map(PreparedEmbedding, rows)
        return sources

    def _transform(self, tokens: Tensor, pixels: Pixels) -> Tensor:
        """`TwoWayTransformer.forward` for jagged prompts, tokens [S, j, T, 256], that changes the pixels they see.

        All prompts of a tile have T tokens, so the arithmetic runs on the packed values; a dispatch through
        NestedTensor costs about 100 us an operation.

        Returns:
            [P, T, 256] tokens.
        """
        transformer = self._decoder.transformer
        queries = tokens = tokens.values()
        for layer in transformer.layers:
            if layer.skip_first_layer_pe:
                queries = _attend(layer.self_attn, queries, queries, queries)
            else:
                located = queries + tokens
                queries = queries + _attend(layer.self_attn, located, located, queries)
            queries = layer.norm1(queries)
            queries = layer.norm2(queries + pixels.read(layer.cross_attn_token_to_image, queries + tokens))
            queries = layer.norm3(queries + layer.mlp(queries))
            pixels.write(layer.cross_attn_image_to_token, layer.norm4, queries + tokens, queries)
        queries = queries + pixels.read(transformer.final_attn_token_to_image, queries + tokens)
        normalised: Tensor = transformer.norm_final_attn(queries)
        return normalised

    def _to_device(self, array: object) -> Tensor:
        return torch.as_tensor(array).to(self.device, non_blocking=True)


def _attend(attention: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`Attention.forward` of segment_anything on [N, n, 256]."""
    mixed = attend_by_head(attention.q_proj(queries), attention.k_proj(keys), attention.v_proj(values))
    output: Tensor = attention.out_proj(mixed)
    return output

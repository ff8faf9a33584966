"""SAM's prompt encoder and mask decoder as functions of tensors on a device, without a wait for the host in them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from splitsam.common.sam_modules import Sam
from splitsam.common.shapes import IMAGE_SIDE_PX
from splitsam.common.transfers import upload
from splitsam.decoder_service.addressed import TOKEN_COUNTS, AddressedPixels
from splitsam.decoder_service.mask_inputs import MaskDownscaling
from splitsam.decoder_service.paint import Painter
from splitsam.decoder_service.pixels import HEADS, Pixels, attend_by_head
from splitsam.decoder_service.prepared import PreparedEmbedding, prepare_rows

MASK_TOKENS = 4
OUTPUT_TOKENS = 1 + MASK_TOKENS  # that of the IoU, and of masks
# One point, two, or a box alone or with a point; and all others up to ten points.
KERNEL_WIDTHS = tuple(tokens - OUTPUT_TOKENS for tokens in TOKEN_COUNTS)


@dataclass(frozen=True, eq=False)
class Prediction:
    """Of P prompts with K masks each.

    Args:
        logits: [P, K, 256, 256] float32.
        scores: [P, K, 2] float32, which mask token made each, and its predicted IoU; together, for one copy.
    """

    logits: Tensor
    scores: Tensor


class Network:
    """The weights, copied, and what is computed with them.

    Args:
        dtype: of the transformer and upscaling; positional encodings and the small heads stay fp32.
        kernels: use this project's, which are the faster ones for 16-bit numbers on a GPU, and are for those alone.
    """

    def __init__(self, sam: Sam, device: torch.device, dtype: torch.dtype, kernels: bool = False):
        self.device, self.dtype = device, dtype
        self._has_kernels = kernels and device.type == "cuda" and dtype != torch.float32
        self._encoder = copy.deepcopy(sam.prompt_encoder).to(device).eval()
        self._transformer = copy.deepcopy(sam.mask_decoder.transformer).to(device, dtype).eval()
        with torch.no_grad():
            encoder, heads = self._encoder, copy.deepcopy(sam.mask_decoder).to(device)
            # [5, 256] in the order of packing's kinds.
            kinds = [encoder.not_a_point_embed, *encoder.point_embeddings]
            self._kind_embeddings = torch.cat([embedding.weight for embedding in kinds])
            self._output_tokens = torch.cat([heads.iou_token.weight, heads.mask_tokens.weight])
            self.positions = encoder.get_dense_pe()[0].flatten(1).mT.to(dtype).contiguous()
            self._heads = Heads([heads.iou_prediction_head, *heads.output_hypernetworks_mlps])
            self._downscaling = MaskDownscaling(encoder.mask_downscaling)
            self._painter = Painter(sam.mask_decoder.output_upscaling, device, dtype, self._has_kernels)

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of prompt tokens, fillers included, that `AddressedPixels` take; none without kernels."""
        return KERNEL_WIDTHS if self._has_kernels else ()

    def prepare(self, embedding: Tensor) -> PreparedEmbedding:
        """See `DecoderModel.prepare`."""
        # From the host as it is: there, one thread would take longer to round it than the copy takes.
        on_device = upload(embedding, self.device) if embedding.device.type == "cpu" else embedding.to(self.device)
        pixels = on_device.to(self.dtype).flatten(1).mT + self._encoder.no_mask_embed.weight.to(self.dtype)
        return PreparedEmbedding(prepare_rows(self._transformer, pixels[None], self.positions)[0])

    def prepare_masked(self, images: Sequence[PreparedEmbedding], mask_inputs: Tensor) -> list[PreparedEmbedding]:
        """The images with mask inputs, [M, 1, 256, 256] on the device, in place of no mask."""
        pixels = torch.stack([image.pixels for image in images])
        return [PreparedEmbedding(rows) for rows in self.masked_rows(pixels, mask_inputs)]

    def masked_rows(self, pixels: Tensor, mask_inputs: Tensor) -> Tensor:
        """The rows of M sources, [M, 4096, 640], from pixels without a mask, [M, 4096, 256], and mask inputs."""
        dense = self._downscaling(mask_inputs) - self._encoder.no_mask_embed.weight
        return prepare_rows(self._transformer, pixels + dense.to(self.dtype), self.positions)

    def embed(self, coords: Tensor, kinds: Tensor) -> Tensor:
        """The IoU token, four mask tokens and the prompt's own: [P, 5 + T, 256].

        Args:
            coords: [P, T, 2] float32, pixels (x, y) of the 1024 x 1024 input.
            kinds: [P, T] int64, of `packing`; what a filler becomes matters to nobody.
        """
        unit = 2 * ((coords + 0.5) / IMAGE_SIDE_PX) - 1
        # Written out because a matmul would lose the low bits of coordinates wherever TF32 is on.
        gaussian = self._encoder.pe_layer.positional_encoding_gaussian_matrix
        angles = 2 * torch.pi * (unit[..., :1] * gaussian[0] + unit[..., 1:] * gaussian[1])
        encoding = torch.cat([angles.sin(), angles.cos()], dim=-1)
        prompt = encoding * (kinds > 0)[..., None] + self._kind_embeddings[kinds.clamp_min(0)]
        return torch.cat([self._output_tokens.expand(len(prompt), -1, -1), prompt], dim=1).to(self.dtype)

    def predict(self, tokens: Tensor, pixels: Pixels | AddressedPixels, wanted: Tensor) -> Prediction:
        """Masks of jagged prompts.

        Args:
            tokens: [S, j, T, 256] jagged, P prompts in all, of as many sources as the pixels have.
            pixels: what they see; changed.
            wanted: [P, K] int64 mask tokens, -1 for the best of 1 to 3.
        """
        outputs = self._transform(tokens, pixels)[:, :OUTPUT_TOKENS].float()
        read = self._heads(outputs.transpose(0, 1)).transpose(0, 1)
        iou, hyper = read[:, 0, :MASK_TOKENS], read[:, 1:]
        chosen = torch.where(wanted < 0, iou[:, 1:].argmax(dim=1, keepdim=True) + 1, wanted)
        hyper = hyper.gather(1, chosen[..., None].expand(-1, -1, hyper.shape[-1]))
        scores = torch.stack([chosen.float(), iou.gather(1, chosen)], -1)
        return Prediction(self._painter.paint(pixels.own, hyper), scores)

    def _transform(self, tokens: Tensor, pixels: Pixels | AddressedPixels) -> Tensor:
        """`TwoWayTransformer.forward`, to [P, T, 256] tokens.

        All prompts have T tokens, so the arithmetic runs on the packed values; a dispatch through NestedTensor costs
        about 100 us an operation.
        """
        queries = tokens = tokens.values()
        barred = pixels.barred
        mask = None if barred is None else barred.to(tokens.dtype)[:, None, None].expand(-1, HEADS, tokens.shape[1], -1)
        for layer in self._transformer.layers:
            if layer.skip_first_layer_pe:
                queries = _attend(layer.self_attn, queries, queries, queries, mask)
            else:
                located = queries + tokens
                queries = queries + _attend(layer.self_attn, located, located, queries, mask)
            queries = layer.norm1(queries)
            queries = layer.norm2(queries + pixels.read(layer.cross_attn_token_to_image, queries + tokens))
            queries = layer.norm3(queries + layer.mlp(queries))
            pixels.write(layer.cross_attn_image_to_token, layer.norm4, queries + tokens, queries)
        queries = queries + pixels.read(self._transformer.final_attn_token_to_image, queries + tokens)
        normalised: Tensor = self._transformer.norm_final_attn(queries)
        return normalised


class Heads:
    """The multilayer perceptrons of the output tokens, which are of one form but for their last width, as one.

    Args:
        mlps: N of `segment_anything`'s `MLP`, with as many layers; narrow outputs are filled up with zeros.
    """

    def __init__(self, mlps: Sequence[Any]):
        self._layers = []
        for layers in zip(*(mlp.layers for mlp in mlps), strict=True):
            width = max(layer.out_features for layer in layers)
            weights = [F.pad(layer.weight.mT, (0, width - layer.out_features)) for layer in layers]
            biases = [F.pad(layer.bias, (0, width - layer.out_features)) for layer in layers]
            self._layers.append((torch.stack(weights), torch.stack(biases)[:, None]))

    def __call__(self, tokens: Tensor) -> Tensor:
        """[N, P, 256], the tokens of each, to [N, P, widest output]."""
        *inner, (last_weight, last_bias) = self._layers
        for weight, bias in inner:
            tokens = torch.baddbmm(bias, tokens, weight).relu_()
        return torch.baddbmm(last_bias, tokens, last_weight)


def _attend(attention: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """`Attention.forward` of segment_anything on [N, n, 256]; `mask` as of `attend_by_head`."""
    mixed = attend_by_head(attention.q_proj(queries), attention.k_proj(keys), attention.v_proj(values), mask)
    output: Tensor = attention.out_proj(mixed)
    return output

"""The pixels' side of SAM's two-way transformer: what tokens read from an image, and what they write into it.

A projection of every pixel is moved to the few tokens wherever that is exact. With H heads, x a pixel and p its
position, reading is, for a token's head h,

    Wv_h (softmax_x((q_h Wk_h) (x + p)) x) + bv_h   instead of   softmax_x(q_h (Wk_h (x + p) + bk_h)) (Wv_h x + bv_h)

since bk adds the same to every score of a token and the weights of a softmax add up to one. Writing is

    x + sum_h softmax_t(x . (k_ht Wq_h) + p . (k_ht Wq_h) + bq_h . k_ht) (v_ht Wo_h) + bo

For T tokens that is 8 T x 256 products a pixel instead of 128 x 256 a projection, so it pays below 16 tokens. In the
first layer all prompts of an image meet the same pixels, whose projections come with `PreparedEmbedding`.

Source: `TwoWayAttentionBlock` and `Attention` of segment_anything.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from splitsam.decoder_service.prepared import CHANNELS, PIXELS, PreparedEmbedding

HEADS = 8
# Beyond, projecting every pixel is cheaper than giving each head of each token 256 channels.
MOST_ABSORBED_TOKENS = 16


class Pixels:
    """The pixels that P prompts see, first shared by all prompts on a source, then each prompt's own.

    Args:
        sources: S of them.
        counts: prompts on each, which follow one another.
        positions: [4096, 256], encoded.
    """

    def __init__(self, sources: Sequence[PreparedEmbedding], counts: Sequence[int], positions: Tensor):
        self._sources, self._counts = sources, counts
        self._positions = positions
        self._own: Tensor | None = None
        self._located: Tensor | None = None
        self.barred: Tensor | None = None  # no prompt has fillers

    @property
    def own(self) -> Tensor:
        """[P, 4096, 256], once written to."""
        if self._own is None:
            raise RuntimeError("no prompt has written to its pixels yet")
        return self._own

    def read(self, attention: Any, tokens: Tensor) -> Tensor:
        """Attention from tokens to pixels.

        Args:
            tokens: [P, T, 256], located.

        Returns:
            [P, T, 256].
        """
        queries = attention.q_proj(tokens)
        if self._own is None:
            mixed = self._read_shared(queries)
        elif tokens.shape[1] > MOST_ABSORBED_TOKENS:
            keys, values = attention.k_proj(self._located_pixels()), attention.v_proj(self._own)
            mixed = attend_by_head(queries, keys, values)
        else:
            rows = to_pixel_side(queries * head_scale(queries), attention.k_proj.weight)
            weights = torch.bmm(rows, self._located_pixels().mT).softmax(-1)
            mixed = from_pixel_side(torch.bmm(weights, self._own), attention.v_proj)
        output: Tensor = attention.out_proj(mixed)
        return output

    def write(self, attention: Any, norm: Any, tokens: Tensor, values: Tensor) -> None:
        """Attention from pixels to tokens, added to the pixels and normalised.

        Args:
            tokens: [P, T, 256], located; `values` without their positions.
        """
        keys, values = attention.k_proj(tokens), attention.v_proj(values)
        if tokens.shape[1] > MOST_ABSORBED_TOKENS:
            updates = self._write_projected(attention, keys, values)
        else:
            keys = keys * head_scale(keys)
            scores = self._score(attention, keys)
            weights = scores.view(len(scores), HEADS, -1, PIXELS).softmax(2).view_as(scores)
            # The weights of a head add up to one, so its share of the bias goes with every token.
            written = to_pixel_side(values, attention.out_proj.weight.mT) + attention.out_proj.bias / HEADS
            updates = self._add(weights.mT, written)
        self._own = F.layer_norm(updates, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        self._located = None

    def _located_pixels(self) -> Tensor:
        if self._located is None:
            self._located = self.own + self._positions
        return self._located

    def _read_shared(self, queries: Tensor) -> Tensor:
        """[P, T, 128]: all tokens on a source as the rows of one attention, with nothing repeated."""
        mixed = torch.empty_like(queries)
        for source, start, stop in self._ranges():
            rows = queries[start:stop].flatten(0, 1)[None]
            mixed[start:stop].flatten(0, 1)[:] = attend_by_head(rows, source.keys[None], source.values[None])[0]
        return mixed

    def _score(self, attention: Any, keys: Tensor) -> Tensor:
        """Scores of every pixel for every head of every token: [P, 8 T, 4096]."""
        if self._own is not None:
            rows = to_pixel_side(keys, attention.q_proj.weight)
            constant = (split_heads(keys) @ attention.q_proj.bias.view(HEADS, -1, 1)).flatten(1, 2)
            return torch.baddbmm(constant, rows, self._located_pixels().mT)
        rows = block_diagonal(keys)
        scores = rows.new_empty(*rows.shape[:2], PIXELS)
        for source, start, stop in self._ranges():
            torch.mm(rows[start:stop].flatten(0, 1), source.queries.mT, out=scores[start:stop].flatten(0, 1))
        return scores

    def _add(self, weights: Tensor, written: Tensor) -> Tensor:
        """pixels + weights @ written: [P, 4096, 256]."""
        if self._own is not None:
            return torch.baddbmm(self._own, weights, written)
        updates = written.new_empty(len(written), PIXELS, CHANNELS)
        for source, start, stop in self._ranges():
            torch.baddbmm(source.pixels, weights[start:stop], written[start:stop], out=updates[start:stop])
        return updates

    def _write_projected(self, attention: Any, keys: Tensor, values: Tensor) -> Tensor:
        """The same for many tokens, with every pixel projected."""
        if self._own is not None:
            queries, pixels = attention.q_proj(self._located_pixels()), self._own
        else:
            queries, pixels = (
                torch.cat([side.expand(count, -1, -1) for side, count in zip(sides, self._counts, strict=True)])
                for sides in zip(*((source.queries, source.pixels) for source in self._sources), strict=True)
            )
        update: Tensor = attention.out_proj(attend_by_head(queries, keys, values))
        return update.add_(pixels)

    def _ranges(self) -> list[tuple[PreparedEmbedding, int, int]]:
        """Each source with the first of its prompts and the one after its last."""
        ranges, start = [], 0
        for source, count in zip(self._sources, self._counts, strict=True):
            ranges.append((source, start, start + count))
            start += count
        return ranges


def attend_by_head(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of 8 heads: [N, n, C] queries, [N, m, C] keys and values to [N, n, C].

    Args:
        mask: [N, 8, n, m], added to the scores.
    """
    q, k, v = (split_heads(side) for side in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def split_heads(side: Tensor) -> Tensor:
    """[N, n, C] to [N, 8, n, C / 8]."""
    return side.reshape(*side.shape[:2], HEADS, -1).transpose(1, 2)


def block_diagonal(tokens: Tensor) -> Tensor:
    """[P, T, C] to [P, 8 T, C], in the row of each head of a token the channels of that head and zeros."""
    prompts, count, channels = tokens.shape
    rows = tokens.new_zeros(prompts, HEADS, count, HEADS, channels // HEADS)
    rows.diagonal(dim1=1, dim2=3).copy_(tokens.view(prompts, count, HEADS, -1).permute(0, 1, 3, 2))
    return rows.view(prompts, HEADS * count, channels)


def to_pixel_side(tokens: Tensor, weight: Tensor) -> Tensor:
    """Multiply each head of [P, T, 128] with its rows of a [128, 256] weight: [P, 8 T, 256], head by head."""
    prompts, count, channels = tokens.shape
    by_head = tokens.view(prompts * count, HEADS, -1).transpose(0, 1)
    rows = torch.bmm(by_head, weight.reshape(HEADS, channels // HEADS, -1))
    return rows.view(HEADS, prompts, count, -1).transpose(0, 1).reshape(prompts, HEADS * count, -1)


def from_pixel_side(mixed: Tensor, projection: Any) -> Tensor:
    """Project each head of [P, 8 T, 256] with its rows of a projection to 128 channels: [P, T, 128]."""
    prompts, _, channels = mixed.shape
    by_head = mixed.view(prompts, HEADS, -1, channels).transpose(0, 1).reshape(HEADS, -1, channels)
    values = torch.bmm(by_head, projection.weight.view(HEADS, -1, channels).mT)
    joined: Tensor = values.transpose(0, 1).reshape(prompts, by_head.shape[1] // prompts, -1) + projection.bias
    return joined


def head_scale(side: Tensor) -> float:
    """Of the scores; a power of two, so it rounds nothing."""
    return float((side.shape[-1] // HEADS) ** -0.5)

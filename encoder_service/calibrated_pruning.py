"""2:4 pruning that lets the weights which stay make up for those that go, on a few images.

A layer is to give the same answers to the inputs X [M, K] that it sees: min |X W^T - X V^T| over V with two of every
four weights in a row zero. Column by column, what zeroing changes is spread over the columns to come:

    U = chol((X^T X / M + damping)^-1), upper
    error = (W[:, c] - V[:, c]) / U[c, c];   W[:, c:] -= error U[c, c:]

Of four weights those two go whose W^2 / U[c, c]^2 is smallest. Layers are pruned from the first block on, each on what
the pruned ones before it give. A pruned encoder needs no more pruning: the sparse rungs then keep the weights as they
are. Three images and the MLPs of an encoder 192 wide and 8 deep take a minute of two busy CPU cores.
Source: SparseGPT, https://arxiv.org/abs/2301.00774, algorithm 1.
"""

from typing import Any

import torch
from torch import Tensor, nn

from splitsam.encoder_service.sparsity import Layers, find_linears

# What each rung that prunes takes.
PRUNED_LAYERS: dict[str, Layers] = {"sparse": "all", "sparse_mlp": "mlp"}
# Of the mean diagonal, as in the paper: inputs may be nearly dependent.
DAMPING = 0.01
COLUMNS = 64  # corrected one by one; those beyond get their corrections in one product


def prune_on_images_(image_encoder: nn.Module, images: Tensor, which: Layers = "all") -> None:
    """Prune an image encoder in place.

    Args:
        image_encoder: `segment_anything`'s, or after the exact rungs, in float32, not yet compiled or quantised.
        images: [n, 3, 1024, 1024] as the encoder takes them; they matter, and should be of the kind that is served.
        which: all linear layers, or those of the MLPs.
    """
    encoder: Any = image_encoder
    inputs = [encoder.patch_embed(image[None]) + encoder.pos_embed for image in images]
    for block in encoder.blocks:
        for layer in find_linears(block, which).values():
            _prune_layer(layer, *_input_moments(layer, block, inputs))
        inputs = [block(x) for x in inputs]


def _input_moments(layer: nn.Linear, block: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Means [K] and mean products [K, K], float64, of what a layer is given when its block sees the inputs."""
    width = layer.in_features
    total = torch.zeros(width, dtype=torch.float64, device=layer.weight.device)
    products = torch.zeros(width, width, dtype=torch.float64, device=layer.weight.device)
    rows = 0

    def count(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal rows
        x = arguments[0].flatten(0, -2).double()
        rows += len(x)
        total.add_(x.sum(0))
        products.add_(x.T @ x)

    handle = layer.register_forward_pre_hook(count)
    for x in inputs:
        block(x)
    handle.remove()
    return total / rows, products / rows


def _prune_layer(layer: nn.Linear, means: Tensor, products: Tensor) -> None:
    damping = DAMPING * products.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(products + damping * torch.eye(len(products)).to(products)))
    upper = torch.linalg.cholesky(inverse, upper=True)
    original = layer.weight.detach().double()
    weights = original.clone()
    for first in range(0, weights.shape[1], COLUMNS):
        some = slice(first, first + COLUMNS)
        errors = _prune_columns(weights[:, some], upper[some, some])
        weights[:, some.stop :] -= errors @ upper[some, some.stop :]
    layer.weight.data.copy_(weights)
    if layer.bias is not None:
        layer.bias.data.add_((original - weights) @ means)  # so that the mean answer stays what it was


def _prune_columns(weights: Tensor, upper: Tensor) -> Tensor:
    """Prune [N, columns] in place; returns the errors, by which the columns beyond are still to be corrected."""
    errors = torch.zeros_like(weights)
    for first in range(0, weights.shape[1], 4):
        four = slice(first, first + 4)
        costs = weights[:, four].square() / upper.diagonal()[four].square()
        kept = torch.zeros_like(costs).scatter_(1, costs.topk(2, dim=1).indices, 1)
        for column in range(first, first + 4):
            stays = weights[:, column] * kept[:, column - first]
            errors[:, column] = (weights[:, column] - stays) / upper[column, column]
            weights[:, column:] -= errors[:, column, None] * upper[column, column:]
            weights[:, column] = stays
    return errors

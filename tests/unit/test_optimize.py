"""Every rung of the ladder against segment_anything's own image encoder, on the CPU."""

import copy
from collections.abc import Iterator

import pytest
import torch
from random_encoders import random_encoder, random_images, relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from splitsam.common.sam_modules import ImageEncoderViT
from splitsam.encoder_service.calibrated_pruning import prune_on_images_
from splitsam.encoder_service.float8 import Float8Linear, scaled_product
from splitsam.encoder_service.fused import linear_gelu
from splitsam.encoder_service.graphs import GraphedEncoder
from splitsam.encoder_service.optimize import BESIDE, RUNGS, apply_rung, build_rungs, unsupported
from splitsam.encoder_service.sparsity import (
    Int8SparseLinear,
    SparseLinear,
    compress,
    find_linears,
    prune_2_4_,
    quantise_rows,
)
from splitsam.kernels.quantise_rows import quantise_rows_reference

CPU = torch.device("cpu")
TO_FUSED = RUNGS[: RUNGS.index("fused") + 1]


def built(encoder: ImageEncoderViT, *rungs: str) -> nn.Module:
    return build_rungs(copy.deepcopy(encoder), rungs, CPU)


@pytest.fixture(scope="module", params=[64, 80])
def encoder(request: pytest.FixtureRequest) -> ImageEncoderViT:
    return random_encoder(request.param)


@pytest.fixture(scope="module")
def narrow() -> ImageEncoderViT:
    return random_encoder(64)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("rungs", [("fp32",), ("sdpa",), ("triton",), ("sdpa", "triton")])
@pytest.mark.parametrize("batch", [1, 3])
def test_exact_rung_gives_the_embedding_of_segment_anything(encoder: ImageEncoderViT, rungs, batch: int):
    images = random_images(batch)
    expected = encoder(images)
    assert expected.std() > 0.1
    assert (built(encoder, *rungs)(images) - expected).abs().max() <= 1e-4


def test_exact_rungs_agree_on_the_whole_grid_of_1024_pixels():
    encoder = random_encoder(64, side_px=1024, heads=1)
    images = random_images(1, side_px=1024)
    expected = encoder(images)
    for rung in ("sdpa", "triton"):
        assert (built(encoder, rung)(images) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("table", ["rel_pos_h", "rel_pos_w"])
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("rung", ["bf16", "sdpa", "triton"])
def test_rung_reads_every_position_table(narrow: ImageEncoderViT, rung: str, block: int, table: str):
    altered = copy.deepcopy(narrow)
    getattr(altered.blocks[block].attn, table).zero_()
    images = random_images(1)
    difference = built(altered, rung)(images).float() - narrow(images)
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize(
    ("rungs", "bound"),
    [
        # bf16 carries 8 bits, int8 rows a little less; each error is a few roundings through two blocks.
        (("bf16",), 0.02),
        (("bf16", "sdpa"), 0.02),
        (("bf16", "triton"), 0.02),
        (("bf16", "triton", "fused"), 0.02),
        (("sdpa", "int8"), 0.02),
        # Factors with 4 bits, eight products in a row.
        (("bf16", "triton", "fp8"), 0.04),
        (("bf16", "sdpa", "triton", "fused", "int8"), 0.02),
    ],
)
def test_rounding_rung_errs_within_its_bound(encoder: ImageEncoderViT, rungs: tuple[str, ...], bound: float):
    images = random_images(2)
    error = relative_error(built(encoder, *rungs)(images), encoder(images))
    assert 1e-4 < error < bound


def test_compiled_encoder_is_exact_and_compiles_each_kind_of_block_once(narrow: ImageEncoderViT):
    """One graph each: patch embedding, block with windows, block without, neck; the second block of a kind is free."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    deeper = copy.deepcopy(narrow)
    deeper.blocks.append(copy.deepcopy(narrow.blocks[1]))
    model = built(deeper, "compile", "sdpa", "triton")
    images = random_images(1)
    assert (model(images) - deeper(images)).abs().max() <= 1e-4
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        model(images)
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("rungs", [RUNGS, TO_FUSED, (*TO_FUSED, "fp8")], ids=["all", "fused", "fp8"])
def test_ladder_compiles_without_a_graph_break(narrow: ImageEncoderViT, rungs: tuple[str, ...]):
    torch._dynamo.reset()
    images = random_images(1)
    expected = built(narrow, *(rung for rung in rungs if rung not in ("compile", "sdpa")))(images)
    model = built(narrow, *rungs)  # fullgraph: a break is an error
    torch._dynamo.utils.counters.clear()
    assert relative_error(model(images), expected.float()) < 0.02
    assert not torch._dynamo.utils.counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        model(images)


class Operators(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def operators_of(model: nn.Module) -> set[str]:
    with Operators() as operators:
        model(random_images(1))
    return operators.names


@pytest.mark.parametrize("rungs", [("bf16",), ("bf16", "sdpa")])
def test_forward_makes_no_tables_that_a_gpu_would_wait_for(narrow: ImageEncoderViT, rungs: tuple[str, ...]):
    waited_for = {"arange", "index"}
    assert waited_for <= operators_of(narrow)
    assert not waited_for & operators_of(built(narrow, *rungs))


def test_gelu_is_fused_while_its_layer_is_as_it_was(narrow: ImageEncoderViT):
    assert "linear_gelu" in operators_of(built(narrow, "fused"))
    assert "linear_gelu" in operators_of(built(narrow, "bf16", "triton", "fused"))
    assert "linear_gelu" not in operators_of(built(narrow, "fused", "int8"))
    images = random_images(1)
    assert torch.equal(built(narrow, "fused", "int8")(images), built(narrow, "int8")(images))


def test_fused_rung_errs_as_its_gelu(narrow: ImageEncoderViT):
    images = random_images(1)
    assert 1e-6 < relative_error(built(narrow, "fused")(images), narrow(images)) < 3e-4


def test_fused_gelu_is_the_exact_one_within_a_thousandth():
    x = torch.linspace(-8, 8, 4096)[:, None]
    weight, bias = torch.tensor([[1.0], [-0.5]]), torch.tensor([0.1, 0.3])
    difference = (linear_gelu(x, weight, bias) - F.gelu(F.linear(x, weight, bias))).abs().max()
    assert 1e-5 < difference < 1e-3


def test_state_dict_keeps_its_names(narrow: ImageEncoderViT):
    model = built(narrow, *RUNGS)
    assert model.state_dict().keys() == narrow.state_dict().keys()


def test_float8_keeps_names_and_the_dtype_of_what_is_not_multiplied(narrow: ImageEncoderViT):
    model = built(narrow, "bf16", "triton", "fp8")
    layers = find_linears(narrow, "all")
    weights = model.state_dict()
    scales = {f"{name}.scales" for name in layers} | {f"{name}.out_scale" for name in layers if name.endswith("lin1")}
    assert weights.keys() == narrow.state_dict().keys() | scales
    in_8_bits = {name for name, weight in weights.items() if weight.dtype == torch.float8_e4m3fn}
    assert in_8_bits == {f"{name}.weight" for name in layers}
    for name, layer in layers.items():
        found = weights[f"{name}.weight"].float()
        rows, row_scales = quantise_rows_reference(layer.weight.bfloat16())
        assert torch.equal(found, rows.float())
        assert 0.02 < relative_error(found * row_scales, layer.weight) < 0.03
    assert {weight.dtype for name, weight in weights.items() if name not in scales} == {
        torch.float8_e4m3fn,
        torch.bfloat16,
    }


def test_float8_multiplies_what_was_rounded_and_nothing_else(narrow: ImageEncoderViT):
    operators = operators_of(built(narrow, "bf16", "fp8"))
    assert {"add_normalise_rows", "scaled_product", "gelu_product", "global_attention"} <= operators
    x, weight = torch.randn(7, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    bias = torch.randn(48).bfloat16()
    layer = nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    expected = F.linear(x.float(), weight.float(), bias.float())
    rows, scales = quantise_rows_reference(x)
    weight_rows, weight_scales = quantise_rows_reference(weight)
    dequantised = (rows.float() * scales) @ (weight_rows.float() * weight_scales).t() + bias.float()
    found = Float8Linear(layer)(rows, scales)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, dequantised) < 3e-3
    assert 0.02 < relative_error(found, expected) < 0.05  # two factors that err by 2.6 % each


def test_float8_scale_known_beforehand_costs_no_accuracy(narrow: ImageEncoderViT):
    """Against a scale for each row of the hidden layer, which takes one more pass."""
    images, found = random_images(2), []
    expected = narrow(images)
    for in_one_kernel in (False, True):
        model = built(narrow, "bf16", "triton", "fp8")
        for block in model.blocks:
            assert block.in_one_kernel
            block.in_one_kernel = in_one_kernel
        found.append(relative_error(model(images), expected))
    by_row, by_bound = found
    assert by_row != by_bound
    assert by_bound < 1.1 * by_row


def test_float8_product_is_that_of_pytorch():
    """Called as on a GPU."""
    x, weight, bias = torch.randn(7, 64), torch.randn(48, 64), torch.randn(48).bfloat16()
    (rows, scales), (weight_rows, weight_scales) = quantise_rows_reference(x), quantise_rows_reference(weight)
    weight_scales = weight_scales.t().contiguous()
    factors = {"scale_a": scales, "scale_b": weight_scales, "bias": bias, "out_dtype": bias.dtype}
    try:
        expected = torch._scaled_mm(rows, weight_rows.t(), use_fast_accum=True, **factors)
    except RuntimeError as error:
        pytest.skip(f"this PyTorch multiplies rows of e4m3 on a GPU alone: {error}")
    found = scaled_product(rows, scales, weight_rows, weight_scales, bias)
    assert relative_error(found, expected.float()) < 1e-3


@pytest.mark.parametrize("rungs", [("fp8",), ("bf16", "int8", "fp8")])
def test_float8_refuses_weights_it_cannot_round(narrow: ImageEncoderViT, rungs: tuple[str, ...]):
    with pytest.raises(ValueError, match="apply bf16 before, and neither int8"):
        built(narrow, *rungs)


def test_rungs_are_applied_in_the_order_of_the_ladder(narrow: ImageEncoderViT):
    images = random_images(1)
    model = built(narrow, "triton", "sdpa", "bf16")
    assert torch.equal(model(images), built(narrow, "bf16", "sdpa", "triton")(images))
    assert [type(block.attn).__name__ for block in model.blocks] == ["KernelAttention"] * 2


@pytest.mark.parametrize("name", ["fp64", ""])
def test_unknown_rung_is_refused_with_the_known_ones(narrow: ImageEncoderViT, name: str):
    with pytest.raises(ValueError, match=r"there are fp32, bf16, .*sparse_mlp"):
        apply_rung(name, narrow)
    with pytest.raises(ValueError, match="no rung is called"):
        build_rungs(narrow, ["fp32", name], CPU)


def test_rung_refuses_what_is_no_image_encoder():
    with pytest.raises(ValueError, match="not Linear"):
        apply_rung("sdpa", nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("head_dim", "window", "message"), [(32, 14, "heads of 64 or 80 channels, not 32"), (64, 7, "windows of 14 x 14")]
)
def test_kernels_refuse_heads_and_windows_they_do_not_know(head_dim: int, window: int, message: str):
    with pytest.raises(ValueError, match=message):
        apply_rung("triton", random_encoder(head_dim, window=window))


def test_cpu_says_what_it_does_not_speed_up():
    reasons = {rung: unsupported(rung, CPU) for rung in (*RUNGS, *BESIDE)}
    assert [rung for rung, reason in reasons.items() if reason is None] == ["fp32", "bf16", "compile", "sdpa", "int8"]
    assert all("CUDA GPU" in reason for reason in reasons.values() if reason is not None)


def pruned(weights: torch.Tensor) -> torch.Tensor:
    """2:4 by sorting, one group of four after another."""
    groups = weights.reshape(-1, 4).clone()
    for group in groups:
        group[group.abs().argsort()[:2]] = 0
    return groups.view_as(weights)


@pytest.mark.parametrize(
    ("which", "changed"),
    [("all", {"attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"}), ("mlp", {"mlp.lin1", "mlp.lin2"})],
)
def test_pruning_keeps_the_two_largest_of_four(narrow: ImageEncoderViT, which, changed: set[str]):
    model = copy.deepcopy(narrow)
    prune_2_4_(model, which)
    weights = narrow.state_dict()
    for name, found in model.state_dict().items():
        layer = name.removesuffix(".weight").partition(".")[2].partition(".")[2]
        assert torch.equal(found, pruned(weights[name]) if layer in changed else weights[name]), name


@pytest.mark.parametrize(("rung", "which"), [("sparse", "all"), ("sparse_mlp", "mlp")])
def test_sparse_rung_is_the_encoder_with_pruned_weights(narrow: ImageEncoderViT, rung: str, which):
    expected = copy.deepcopy(narrow)
    prune_2_4_(expected, which)
    images = random_images(1)
    assert (built(narrow, "triton", rung)(images) - expected(images)).abs().max() <= 1e-4


def test_pruning_int8_weights_is_rounding_pruned_ones(narrow: ImageEncoderViT):
    before, after = copy.deepcopy(narrow), built(narrow, "int8", "sparse")
    prune_2_4_(before)
    before = built(before, "int8")
    for name, layer in find_linears(after, "all").items():
        found, expected = layer.weight.dequantize(), before.get_submodule(name).weight.dequantize()
        assert (found.unflatten(1, (-1, 4)) == 0).sum(2).min() >= 2
        # Two weights of four that round to the same number are a tie, which either may win.
        assert (found != expected).float().mean() < 0.03


def test_graphed_encoder_calls_the_encoder_on_a_cpu(narrow: ImageEncoderViT):
    graphed = GraphedEncoder(narrow, (4, 1), CPU, side_px=256)
    graphed.capture()
    assert torch.equal(graphed(random_images(2)), narrow(random_images(2)))


def test_graphed_encoder_refuses_a_batch_of_no_images(narrow: ImageEncoderViT):
    with pytest.raises(ValueError, match="at least one image"):
        GraphedEncoder(narrow, (1,), CPU, side_px=256)(random_images(0))


def test_quantised_rows_are_the_values_within_half_a_step():
    x = torch.cat([torch.randn(5, 64), torch.zeros(1, 64), 1e4 * torch.ones(1, 64)])
    quantised, scales = quantise_rows(x)
    assert ((quantised * scales - x).abs() <= 0.5001 * scales).all()
    assert quantised.abs().amax(1).tolist() == [127] * 5 + [0, 127]


def test_linear_layers_of_the_blocks_alone_are_quantised(narrow: ImageEncoderViT):
    model = built(narrow, "int8")
    int8 = {name for name, parameter in model.named_parameters() if hasattr(parameter, "qdata")}
    assert int8 == {f"{name}.weight" for name in find_linears(narrow, "all")}
    assert len(int8) == 8
    assert isinstance(model.neck[0], nn.Conv2d)
    patches = model.patch_embed(random_images(1))
    assert (patches - narrow.patch_embed(random_images(1))).abs().max() <= 1e-4
    assert F.mse_loss(patches, narrow.patch_embed(random_images(1))) < 1e-9


@pytest.fixture
def stand_in_for_cusparselt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense arithmetic where a GPU has 2:4, with the layouts and scales that PyTorch documents."""

    def multiply(compressed, dense, bias=None, alpha=None, out_dtype=None, transpose_result=False):
        assert transpose_result
        assert dense.stride(0) == 1  # an 8-bit product takes its second factor transposed
        product = dense.t().float() @ compressed.t().float()
        product = product * (1 if alpha is None else alpha) + (0 if bias is None else bias)
        return product.to(out_dtype or dense.dtype)

    monkeypatch.setattr(torch, "_cslt_compress", lambda weights: weights.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)


@pytest.mark.usefixtures("stand_in_for_cusparselt")
@pytest.mark.parametrize(("rungs", "kind"), [(("bf16",), SparseLinear), (("bf16", "int8"), Int8SparseLinear)])
def test_sparse_layer_computes_what_the_dense_layer_does(narrow: ImageEncoderViT, rungs, kind: type[nn.Module]):
    dense = built(narrow, *rungs).blocks[0].mlp.lin1
    prune_2_4_(dense)
    x = torch.randn(2, 3, 5, 128).bfloat16()
    expected = dense(x)
    found = kind(dense)(x)
    assert (found.dtype, found.shape) == (torch.bfloat16, expected.shape)
    assert found.is_contiguous()
    assert relative_error(found, expected.float()) < 0.01


def test_sparse_layer_refuses_float32_weights(narrow: ImageEncoderViT):
    with pytest.raises(ValueError, match="apply bf16 or int8 before"):
        compress(narrow.blocks[0].mlp.lin1)


@pytest.mark.parametrize(("which", "rung"), [("mlp", "sparse_mlp"), ("all", "sparse")])
def test_pruning_on_images_costs_less_than_by_magnitude(narrow: ImageEncoderViT, which, rung: str):
    model = copy.deepcopy(narrow)
    prune_on_images_(model, random_images(4), which)
    for layer in find_linears(model, which).values():
        assert ((layer.weight.view(-1, 4) == 0).sum(1) >= 2).all()
    images = random_images(3)  # others than the four
    expected = narrow(images)
    by_magnitude = relative_error(built(narrow, "triton", rung)(images), expected)
    # The rung finds nothing left to prune.
    assert torch.equal(built(model, "triton", rung)(images), built(model, "triton")(images))
    assert relative_error(built(model, "triton", rung)(images), expected) < 0.8 * by_magnitude

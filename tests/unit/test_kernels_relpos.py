"""The attention kernels against the encoder's own arithmetic, in Triton's interpreter: no GPU needed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision_shim  # noqa: F401

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

import splitsam.common.sam_modules  # noqa: F401 makes segment_anything importable without all of torchvision
from splitsam.kernels import relpos_global, relpos_window
from splitsam.kernels.quantise_rows import FLOAT8, LARGEST
from splitsam.kernels.relpos_global import global_attention, global_attention_reference
from splitsam.kernels.relpos_window import window_attention, window_attention_reference

NAMES = [
    "global square",
    "global batch",
    "global odd",
    "global production row",
    "global tall",
    "global one token",
    "global descriptors",
    "window exact",
    "window padded",
    "window padded batch",
    "window smaller grid",
]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    program = Path(__file__).with_name("kernels_interpreted.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def block(heads: int, d: int, window: int, grid: int):
    """A `Block` of segment_anything whose tables and biases, zero when newly built, count."""
    from segment_anything.modeling.image_encoder import Block

    torch.manual_seed(d)
    built = Block(heads * d, heads, use_rel_pos=True, window_size=window, input_size=(grid, grid)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "rel_pos" in name or "bias" in name:
                parameter.normal_(std=0.3)
    return built


def attention_of(built, x: torch.Tensor, grid: int, window: int) -> torch.Tensor:
    """The block's attention branch with the reference between its two Linear layers; `x` [B, grid, grid, C]."""
    attn = built.attn
    d = attn.rel_pos_h.shape[1]
    qkv = attn.qkv(built.norm1(x)).view(x.shape[0], grid * grid, 3, attn.num_heads, d)
    if window:
        bias = attn.qkv.bias.view(3, attn.num_heads, d)
        out = window_attention_reference(qkv, bias, attn.rel_pos_h, attn.rel_pos_w, (grid, grid), attn.scale)
    else:
        out = global_attention_reference(qkv, attn.rel_pos_h, attn.rel_pos_w, (grid, grid), attn.scale)
    return attn.proj(out).view_as(x)


@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize(("window", "grid"), [(0, 9), (14, 14), (14, 16)])
@torch.no_grad()
def test_references_follow_the_encoder(window: int, grid: int, d: int) -> None:
    built = block(2, d, window, grid)
    x = torch.randn(2, grid, grid, 2 * d)
    after_attention = x + attention_of(built, x, grid, window)
    expected = built(x)
    actual = after_attention + built.mlp(built.norm2(after_attention))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_float32_kernel_agrees_with_pytorch(interpreted: dict[str, dict[str, float]], name: str) -> None:
    found = interpreted[f"{name} float32"]
    # Two float32 computations of sums over up to 196 scores of size 5 to 30 part by about 1e-6 of the largest value.
    assert found["kernel"] <= 5e-6 * max(1.0, found["largest"])


@pytest.mark.parametrize("name", NAMES)
def test_float16_kernel_errs_no_more_than_twice_pytorch(interpreted: dict[str, dict[str, float]], name: str) -> None:
    found = interpreted[f"{name} float16"]
    assert found["kernel"] <= 2 * found["pytorch"] or found["kernel"] == 0


def test_every_interpreted_case_is_asserted(interpreted: dict[str, dict[str, float]]) -> None:
    cases = {f"{name} {dtype}" for name in NAMES for dtype in ("float32", "float16")}
    assert set(interpreted) == cases | {"recomputed"}


def test_global_kernel_recomputes_the_wanted_query_tiles_alone(interpreted: dict[str, dict[str, float]]) -> None:
    found = interpreted["recomputed"]
    assert found["wanted"] <= 5e-6 * max(1.0, found["largest"])
    assert found["others"] == 0


def good_inputs(sides: tuple[int, int] = (4, 4)) -> list[torch.Tensor]:
    return [torch.zeros(1, 16, 3, 2, 64), torch.zeros(2 * sides[0] - 1, 64), torch.zeros(2 * sides[1] - 1, 64)]


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(1, 16, 3, 2, 48), "d of"),
        (0, torch.zeros(1, 15, 3, 2, 64), "for a grid of 4 x 4"),
        (0, torch.zeros(0, 16, 3, 2, 64), "0 images"),
        (0, torch.zeros(1, 16, 2, 64), "qkv must be"),
        (0, torch.zeros(1, 16, 3, 2, 64, dtype=torch.float64), "qkv must be of"),
        (0, torch.zeros(1, 16, 2, 3, 64).transpose(2, 3), "must follow each other"),
        (0, torch.zeros(1, 16, 3, 2, 65)[..., :64], "must follow each other"),
        (0, torch.zeros(1, 16, 385)[..., :384].unflatten(2, (3, 2, 64)), "multiple of 8"),
        (1, torch.zeros(8, 64), "rel_pos_h must be"),
        (2, torch.zeros(7, 80), "rel_pos_w must be"),
        (2, torch.zeros(7, 64, dtype=torch.float16), "rel_pos_w is"),
        (2, torch.zeros(64, 7).T, "rel_pos_w must be contiguous"),
    ],
)
def test_global_attention_refuses_wrong_arguments(position: int, wrong: torch.Tensor, message: str) -> None:
    inputs = good_inputs()
    inputs[position] = wrong
    with pytest.raises(ValueError, match=message):
        global_attention(*inputs, 4, 4, 0.125)


def test_window_attention_refuses_a_bias_of_another_shape() -> None:
    qkv, *tables = good_inputs((14, 14))
    with pytest.raises(ValueError, match="qkv_bias must be"):
        window_attention(qkv, torch.zeros(3 * 2 * 64), *tables, 4, 4, 0.125)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_attention_refuses_a_scale_that_is_not_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be positive"):
        global_attention(*good_inputs(), 4, 4, scale)


def test_global_attention_refuses_a_grid_beyond_its_tiles() -> None:
    inputs = [torch.zeros(1, 129, 3, 1, 64), torch.zeros(257, 64), torch.zeros(1, 64)]
    with pytest.raises(ValueError, match="larger than 128"):
        global_attention(*inputs, 129, 1, 0.125)


def test_operators_trace_whole_without_running() -> None:
    """Under fake tensors, as torch.compile(fullgraph=True) traces them."""

    def both(qkv, bias, h, w, window_h, window_w):
        return global_attention(qkv, h, w, 4, 4, 0.125), window_attention(qkv, bias, window_h, window_w, 4, 4, 0.125)

    qkv, *tables = good_inputs()
    inputs = [qkv, torch.zeros(3, 2, 64), *tables, torch.zeros(27, 64), torch.zeros(27, 64)]
    exported = torch.export.export(Both(both), tuple(inputs))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert any("splitsam.global_attention" in target for target in targets)
    assert any("splitsam.window_attention" in target for target in targets)
    shapes = [node.meta["val"].shape for node in exported.graph.nodes if "attention" in str(node.target)]
    assert shapes == [torch.Size([1, 16, 128])] * 2


class Both(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor):
        return self.function(*inputs)


@pytest.mark.parametrize("d", [64, 80])
def test_output_in_e4m3_is_the_other_rounded_and_ends_at_its_largest_number(d: int) -> None:
    torch.manual_seed(d)
    qkv, bias = torch.randn(2, 240, 3, 2, d).bfloat16(), torch.randn(3, 2, d).bfloat16()
    qkv[:, :, 2] *= 200
    qkv[0, 5, 2, 0, 0] = torch.nan
    whole, window = ([torch.zeros(2 * side - 1, d).bfloat16() for side in sides] for sides in ((15, 16), (14, 14)))
    for operator, inputs in ((global_attention, (qkv, *whole)), (window_attention, (qkv, bias, *window))):
        expected = operator(*inputs, 15, 16, 1.0).float()
        found = operator(*inputs, 15, 16, 1.0, float8=True)
        assert found.dtype == FLOAT8
        assert expected[1].abs().max() > LARGEST
        assert torch.equal(found[1].float(), expected[1].clamp(-LARGEST, LARGEST).to(FLOAT8).float())
        assert torch.equal(found.float().isnan(), expected.isnan())
        torch.library.opcheck(operator, (*inputs, 15, 16, 1.0, True), test_utils=("test_schema", "test_faketensor"))


def test_operators_pass_the_schema_checks() -> None:
    for operator in (relpos_global.global_attention, relpos_window.window_attention):
        schema = operator._opoverload._schema
        assert not schema.is_mutable
        assert [str(returned.type) for returned in schema.returns] == ["Tensor"]

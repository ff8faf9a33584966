"""The decoder's benchmark on one image with a click or two: its rows, and what it refuses to time."""

import copy
import gc
import math
from pathlib import Path

import pytest
import torch

from bench.decoder.__main__ import main, parse_arguments
from bench.decoder.measure import SCENARIOS, Bench, Options, make_scenes
from bench.decoder.original import Original
from bench.decoder.rows import ORIGINAL, Row
from bench.row_file import ResultsFile, read_rows
from bench.waterfall.timing import time_calls_on_host
from splitsam.common.checkpoints import load_model

CPU = torch.device("cpu")
MACHINE = {"gpu": "cpu-2-cores", "torch": "2", "triton": "", "commit": "abc", "command": "python"}


@pytest.fixture(scope="module")
def sam():
    return load_model(model=None, checkpoint=None, sha256=None, cache_dir=Path()).sam


@pytest.fixture(scope="module")
def encoded(sam):
    original = Original(copy.deepcopy(sam), CPU)
    with torch.no_grad():
        return original, make_scenes(original, 1, 1)


def options(deadline=math.inf):
    return Options(SCENARIOS, ("fp32",), 1, 1, 2, 4, CPU, 0.0, 1, deadline)


def run(sam, encoded, chosen):
    said = []
    with torch.no_grad():
        return list(Bench(chosen, MACHINE, said.append, sam, *encoded).run()), said


def test_every_scenario_has_a_row_of_the_original_and_one_of_ours(sam, encoded, tmp_path):
    rows, said = run(sam, encoded, options())
    assert [(row.scenario, row.decoder) for row in rows] == [
        (scenario, decoder) for scenario in SCENARIOS for decoder in (ORIGINAL, "splitsam fp32")
    ]
    assert said == []
    for original, ours in zip(rows[::2], rows[1::2], strict=True):
        assert original.x_original == 1
        assert ours.x_original == pytest.approx(ours.prompts_s / original.prompts_s)
        assert ours.prompts_s == pytest.approx(1e3 * ours.prompts / ours.ms_p50)
        assert ours.mask_miou >= 0.9995
        if ours.scenario != "logits of the best":
            assert ours.masks == original.masks
    file = ResultsFile(tmp_path / "decoder.csv", Row)
    for row in rows:
        file.add(row)
    assert sorted((row.scenario, row.decoder) for row in read_rows(Row, tmp_path / "decoder.csv")) == sorted(
        (row.scenario, row.decoder) for row in rows
    )


def test_a_decoder_with_other_masks_is_not_timed(sam, encoded):
    other = copy.deepcopy(sam)
    with torch.no_grad():
        for mlp in other.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[2].bias += 3.0
    rows, said = run(other, encoded, options())
    assert {row.decoder for row in rows} == {ORIGINAL}
    assert len(said) == 1
    assert "WrongAnswerError" in said[0]


def test_rows_that_would_end_too_late_are_left_out_and_said(sam, encoded):
    rows, said = run(sam, encoded, options(deadline=0.0))
    assert rows == []
    assert len(said) == len(SCENARIOS)


def test_bad_arguments_get_one_clear_line(capsys):
    for arguments in (["--images", "0"], ["--scenarios", "clicks"], ["--precisions", "fp8"]):
        with pytest.raises(SystemExit) as exit_info:
            parse_arguments(arguments)
        assert exit_info.value.code == 2
    with pytest.raises(SystemExit, match="error: "):
        main(["--device", "cuda:99"])
    capsys.readouterr()


def test_what_was_there_before_is_not_looked_through_while_calls_are_timed():
    frozen: list[int] = []
    time_calls_on_host(lambda: frozen.append(gc.get_freeze_count()), CPU, 0.01, 4)
    assert min(frozen[1:]) > 10_000
    assert gc.get_freeze_count() == 0

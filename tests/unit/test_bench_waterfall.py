"""The waterfall measures what it says, keeps rows of other runs, and the documents show what the CSVs hold."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from bench.documents import write_sections
from bench.machine import describe_machine
from bench.pruning import Sources
from bench.row_file import ResultsFile, read_rows, results_path, select_rows
from bench.waterfall.__main__ import measure, parse_arguments
from bench.waterfall.measure import Options, Waterfall
from bench.waterfall.pipelines import LADDERS, LoopDecoder, NestedDecoder
from bench.waterfall.rows import BASELINE, COLUMNS, Row
from bench.waterfall.subjects import (
    HeldOut,
    Subject,
    build_random,
    draw_clicks,
    draw_held_out,
    draw_noise,
    inject_outliers,
    relative_error,
)
from bench.waterfall.tables import build_tables, main
from splitsam.common.architectures import Architecture
from splitsam.encoder_service.mask_reference import measure_iou
from training.evaluate import Example

CPU = torch.device("cpu")
TINY = Architecture("tiny", width=64, depth=1, heads=1, global_blocks=())
MACHINE = {"gpu": "cpu-2-cores", "torch": "2", "triton": "", "commit": "abc", "command": "python"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for one another on a busy machine would take five times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny():
    return build_random(TINY)


@pytest.fixture(scope="module")
def held():
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (640, 1024, 3), dtype=np.uint8),
        rng.integers(0, 256, (1024, 480, 3), dtype=np.uint8),
    ]
    return HeldOut(images, [torch.tensor([[300.0, 200.0], [700.0, 500.0]]), torch.tensor([[100.0, 900.0]])])


def options(**changes):
    quick = Options("encoder", (1,), ("fp32", "bf16"), CPU, seconds=0.01, calls=2)
    return dataclasses.replace(quick, **changes)


def limit_rungs(monkeypatch, able):
    monkeypatch.setattr("bench.waterfall.measure.unsupported", lambda rung, _: None if rung in able else "not here")


def a_row(**changes):
    figures = dict.fromkeys(("ms_p50", "ms_p99", "img_s", "x_fp32", "compile_s", "embedding_error"), 1.0)
    row = Row(
        scope="encoder",
        model="vit_b",
        weights="random",
        batch=1,
        rung="fp32",
        x_prev=1.0,
        peak_mib=None,
        mask_miou=None,
        index_flips=None,
        **figures,
        **MACHINE,
    )
    return dataclasses.replace(row, **changes)


@pytest.fixture(scope="module")
def encoder_rows(tiny, held, tmp_path_factory):
    path = tmp_path_factory.mktemp("waterfall") / "waterfall-cpu.csv"
    waterfall = Waterfall(
        Subject("tiny", "trained", tiny), Sources(tiny, (), CPU), held, options(batches=(1, 2)), MACHINE
    )
    return measure(waterfall, ResultsFile(path, Row), (1, 2)), path


def test_a_run_gives_one_row_for_each_rung_and_batch(encoder_rows):
    rows, path = encoder_rows
    assert [(row.batch, row.rung) for row in rows] == [
        (1, BASELINE),
        (1, "fp32"),
        (1, "bf16"),
        (2, "fp32"),
        (2, "bf16"),
    ]
    assert (
        path.read_text().splitlines()[0]
        == ",".join(COLUMNS)
        == (
            "scope,model,weights,batch,rung,ms_p50,ms_p99,img_s,x_prev,x_fp32,peak_mib,compile_s,embedding_error,"
            "mask_miou,index_flips,gpu,torch,triton,commit,command"
        )
    )
    assert [(row.batch, row.rung) for row in read_rows(Row, path)] == [(row.batch, row.rung) for row in rows]


def test_ratios_are_those_of_throughput(encoder_rows):
    rows, _ = encoder_rows
    baseline, fp32, bf16, fp32_of_two, bf16_of_two = rows
    assert baseline.x_fp32 == 1
    assert baseline.x_prev is None
    assert fp32_of_two.x_prev is None
    for row, before in ((fp32, baseline), (bf16, fp32), (bf16_of_two, fp32_of_two)):
        assert row.x_prev == pytest.approx(row.img_s / before.img_s)
    for row in rows:
        assert row.img_s == pytest.approx(1e3 * row.batch / row.ms_p50)
        assert row.x_fp32 == pytest.approx(row.img_s / baseline.img_s)
        assert row.ms_p99 >= row.ms_p50 > 0


def test_errors_and_masks_tell_bf16_from_fp32(encoder_rows):
    rows, _ = encoder_rows
    for row in rows:
        assert 0 <= row.embedding_error < (1e-5 if row.rung != "bf16" else 0.1)
        assert row.mask_miou == pytest.approx(1, abs=1e-3) if row.rung != "bf16" else 0.5 < row.mask_miou < 1
        assert 0 <= row.index_flips <= 3
    assert all(row.embedding_error > 1e-4 for row in rows if row.rung == "bf16")


def test_a_wrong_rung_is_not_timed_and_the_next_goes_on(tiny, monkeypatch, capsys):
    from bench.waterfall import pipelines

    def spoilt(image_encoder, rungs, device):
        if rungs[-1] == "fp32":
            image_encoder.pos_embed += 1
        return build_rungs(image_encoder, rungs, device)

    build_rungs = pipelines.build_rungs
    monkeypatch.setattr(pipelines, "build_rungs", spoilt)
    rows = list(Waterfall(Subject("tiny", "random", tiny), Sources(tiny, (), CPU), None, options(), MACHINE).run())
    assert [row.rung for row in rows] == [BASELINE, "bf16"]
    assert "left out: fp32 at batch 1: WrongAnswerError: embedding error" in capsys.readouterr().out


def test_a_rung_beside_the_ladder_takes_the_place_of_another_and_all_after_it(tiny, monkeypatch):
    built = []

    def build_rungs(image_encoder, rungs, device):
        built.append(list(rungs))
        return image_encoder

    monkeypatch.setattr("bench.waterfall.pipelines.build_rungs", build_rungs)
    able = ("fp32", "fused", "int8", "sparse", "sparse_mlp", "fp8")
    limit_rungs(monkeypatch, able)
    waterfall = Waterfall(Subject("tiny", "random", tiny), Sources(tiny, (), CPU), None, options(rungs=able), MACHINE)
    _, _, fused, int8, sparse, sparse_mlp, fp8 = waterfall.run()
    to_int8 = ["fp32", "fused", "int8"]
    assert built[1:] == [to_int8[:2], to_int8, [*to_int8, "sparse"], [*to_int8, "sparse_mlp"], ["fp32", "fused", "fp8"]]
    assert sparse.x_prev == pytest.approx(sparse.img_s / int8.img_s)
    assert sparse_mlp.x_prev == pytest.approx(sparse_mlp.img_s / int8.img_s)
    assert fp8.x_prev == pytest.approx(fp8.img_s / fused.img_s)


def test_an_unsupported_rung_says_why_and_random_weights_have_no_mask_figures(tiny, capsys):
    waterfall = Waterfall(
        Subject("tiny", "random", tiny), Sources(tiny, (), CPU), None, options(rungs=("fp32", "triton")), MACHINE
    )
    rows = list(waterfall.run())
    assert [row.rung for row in rows] == [BASELINE, "fp32"]
    assert {(row.mask_miou, row.index_flips) for row in rows} == {(None, None)}
    assert "left out: triton at batch 1: " in capsys.readouterr().out


def test_a_run_out_of_time_says_what_it_left_out(tiny, capsys):
    waterfall = Waterfall(Subject("tiny", "random", tiny), Sources(tiny, (), CPU), None, options(deadline=0.0), MACHINE)
    assert [row.rung for row in waterfall.run()] == [BASELINE]
    assert capsys.readouterr().out.count("the time limit leaves no time") == 2


def test_end_to_end_measures_the_nested_decoder_and_writes_a_trace(tiny, held, tmp_path, capsys, monkeypatch):
    able = ("fp32", "bf16", "sdpa")  # compiling would take a minute
    limit_rungs(monkeypatch, able)
    trace = tmp_path / "trace.json"
    changes = options(scope="end_to_end", rungs=("fp32", "nested", "sparse"), prompts=2, trace=trace, profile_top=3)
    rows = list(Waterfall(Subject("tiny", "trained", tiny), Sources(tiny, (), CPU), held, changes, MACHINE).run())
    assert [row.rung for row in rows] == [BASELINE, "fp32", "nested"]
    assert rows[1].mask_miou == pytest.approx(1, abs=1e-3)
    assert 0.5 < rows[2].mask_miou < 1
    assert json.loads(trace.read_text())["traceEvents"]
    assert "Self CPU time total" in capsys.readouterr().out


def test_both_decoders_answer_alike(tiny):
    clicks = [torch.tensor([[300.0, 200.0], [700.0, 500.0]]), torch.tensor([[100.0, 900.0]])]
    embeddings = torch.randn(2, 256, 64, 64, generator=torch.Generator().manual_seed(1))
    answers = []
    with torch.inference_mode():
        for decoder in (LoopDecoder(tiny, CPU, torch.float32), NestedDecoder(tiny, CPU, torch.float32)):
            answers.append(decoder.read(decoder.decode(embeddings, clicks)))
    for loop, nested in zip(*answers, strict=True):
        torch.testing.assert_close(loop.predicted_iou, nested.predicted_iou, rtol=1e-3, atol=1e-4)
        assert relative_error(nested.logits, loop.logits) < 1e-4


def test_outliers_leave_the_embedding_as_it_was():
    plain, changed = build_random(TINY), build_random(TINY)
    inject_outliers(changed)
    image = draw_noise(1)
    with torch.inference_mode():
        assert not torch.equal(plain.image_encoder.blocks[0].norm1.weight, changed.image_encoder.blocks[0].norm1.weight)
        assert relative_error(changed.image_encoder(image), plain.image_encoder(image)) < 1e-5


def test_random_weights_have_relative_positions_and_a_seed():
    first, second = build_random(TINY), build_random(TINY)
    assert all(block.attn.rel_pos_h.std() > 0.1 for block in first.image_encoder.blocks)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_relative_error_is_of_the_worst_image_and_infinite_for_nan():
    expected = torch.ones(2, 4)
    actual = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 3]])
    assert relative_error(actual, expected) == 1
    assert relative_error(actual.fill_(torch.nan), expected) == float("inf")


def test_clicks_are_ragged_with_the_mean_asked_for():
    counts = [len(points) for points in draw_clicks(64, 8)]
    assert counts[0] == 8
    assert 1 <= min(counts) < 5 < 11 < max(counts) <= 15
    assert 6 < np.mean(counts) < 10


def test_held_out_scenes_are_drawn_once_and_clicked_in_the_middle(tmp_path, monkeypatch):
    mask = np.zeros((1, 40, 60), bool)
    mask[0, 10:31, 20:41] = True
    drawn = []

    def draw_held(scenes, objects, pool, device):
        drawn.append(scenes)
        return [Example(f"scene{i}", np.full((40, 60, 3), i, np.uint8), mask) for i in range(scenes)]

    monkeypatch.setattr("bench.waterfall.subjects.draw_held", draw_held)
    cache = tmp_path / "kept" / "held.npz"
    for scenes in (2, 1, 2, 3):
        held = draw_held_out(scenes, cache)
        assert [int(image.max()) for image in held.images] == list(range(scenes))
        assert [clicks.tolist() for clicks in held.clicks] == [[[30, 20]]] * scenes
    assert drawn == [2, 3]


def test_empty_masks_agree():
    nothing, something = torch.zeros(1, 2, 2, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.bool)
    assert measure_iou(nothing, nothing).tolist() == [1]
    assert measure_iou(nothing, something).tolist() == [0]


def test_results_replace_only_what_the_run_measures_again(tmp_path):
    path = tmp_path / "waterfall-x.csv"
    earlier = ResultsFile(path, Row)
    others = [
        a_row(batch=4),
        a_row(model="vit_h"),
        a_row(scope="end_to_end"),
        a_row(weights="random+outliers"),
        a_row(command="python -m bench.waterfall --image a.jpg"),
        a_row(gpu="another"),
    ]
    for row in (a_row(), a_row(rung="bf16"), *others):
        earlier.add(row)
    assert len(read_rows(Row, path)) == 8
    later = ResultsFile(path, Row)
    later.add(a_row(img_s=2.0, mask_miou=0.5, index_flips=0))
    later.add(a_row(rung="sdpa"))
    rows = read_rows(Row, path)
    assert sorted(rows, key=str) == sorted(
        [a_row(img_s=2.0, mask_miou=0.5, index_flips=0), a_row(rung="sdpa"), *others], key=str
    )
    assert [row.rung for row in rows if row.key == a_row().key] == ["fp32", "sdpa"]


def test_a_csv_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "waterfall-x.csv"
    path.write_text("scope,model\nencoder,vit_b\n")
    with pytest.raises(ValueError, match="has not the columns scope, model"):
        ResultsFile(path, Row).add(a_row())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rungs", "fp32", "quick"], "no rung of the scope encoder is called 'quick'"),
        (["--rungs", "nested"], "no rung of the scope encoder is called 'nested'"),
        (["--batches", "0"], "'0' is not a whole number above 0"),
        (["--batches", "-1"], "-1"),
        (["--model", "vit_x"], "invalid choice: 'vit_x'"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(["--model", "vit_t", *arguments])
    assert exit_info.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_rungs_are_put_in_the_order_of_the_ladder():
    parsed = parse_arguments(["--model", "vit_t", "--scope", "end_to_end", "--rungs", "nested", "fp32", "bf16"])
    assert parsed.rungs == ["fp32", "bf16", "nested"]
    assert parse_arguments(["--model", "vit_t"]).rungs == list(LADDERS["encoder"])


def test_the_published_command_has_no_paths_of_this_machine():
    arguments = ["--model", "vit_t", "--commit", "abc", "--results=/tmp/x", "--held-out", "h.npz", "--batches", "1"]
    machine = describe_machine("bench.waterfall", CPU, "abc", arguments)
    assert machine["command"] == "python -m bench.waterfall --model vit_t --batches 1"
    assert machine["commit"] == "abc"
    assert machine["gpu"] == f"cpu-{torch.get_num_threads()}-cores"


def test_results_are_named_after_the_gpu(tmp_path):
    assert results_path(tmp_path, "waterfall", "NVIDIA H100 80GB HBM3").name == "waterfall-nvidia-h100-80gb-hbm3.csv"


def test_sections_show_the_rows_they_ask_for_and_mark_the_losers():
    pruned = a_row(rung="sparse", img_s=3.0, command="python -m bench.waterfall --image a.jpg --image b.jpg")
    rows = [a_row(rung="int8", x_prev=0.8, peak_mib=10.0), pruned, a_row(model="vit_h"), a_row(batch=4)]
    document = "a\n<!-- waterfall: model=vit_b batch=1 -->\nold\n<!-- end of waterfall -->\nb\n"

    def build(filters):
        return build_tables(select_rows(Row, rows, filters))

    written = write_sections(document, "waterfall", build)
    assert "old" not in written
    assert "| 1 | int8 | 1 / 1 | 1 | **0.80** | 1.00 | 10 | 1.0 | 1.0e+00 |" in written
    assert "random weights (errors unverified on Meta's weights), cpu-2-cores, torch 2" in written
    assert "weights (errors unverified on Meta's weights), pruned on 2 images, cpu-2-cores" in written
    assert "vit_h" not in written
    assert "| 4 |" not in written
    assert write_sections(written, "waterfall", build) == written


def test_sections_without_rows_say_so():
    assert build_tables(select_rows(Row, [a_row()], "model=vit_l")) == "Not measured yet.\n"
    with pytest.raises(ValueError, match="'colour=red' is not column=value"):
        select_rows(Row, [], "colour=red")


def test_tables_command_writes_documents_and_charts_that_are_current_afterwards(tmp_path, capsys):
    document = tmp_path / "doc.md"
    document.write_text("<!-- waterfall: scope=encoder -->\n<!-- end of waterfall -->\n")
    results = ResultsFile(tmp_path / "waterfall-x.csv", Row)
    for row in (a_row(rung="a<b", img_s=10.0), a_row(batch=4), a_row(model="vit_h")):
        results.add(row)
    arguments = [str(document), "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match="run python -m bench"):
        main([*arguments, "--check"])
    main(arguments)
    main([*arguments, "--check"])
    svg = ElementTree.fromstring((tmp_path / "waterfall-x-encoder.svg").read_text())  # noqa: S314  our own
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"vit_b", "vit_h", "a<b", "fp32", "batch 1", "batch 4"} <= set(texts)
    assert "not current" in capsys.readouterr().out

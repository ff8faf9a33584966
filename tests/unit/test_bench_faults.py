"""The rows of the fault table: kept, judged and written into the document."""

import dataclasses

import pytest
import torch

from bench.faults.__main__ import FAULTS, NAMES
from bench.faults.failing_device import FAULT_FOLDER, FailingDecoder, FailingEncoder
from bench.faults.load import NAMES as PHOTOGRAPHS
from bench.faults.load import PHOTOGRAPHS as FOLDER
from bench.faults.load import KnownImage
from bench.faults.rows import Row
from bench.faults.tables import build_table
from bench.row_file import RESULTS, ResultsFile, read_rows
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.encoder_service.preprocess import ImageLimits, prepare_image
from splitsam.encoder_service.settings import EncoderSettings

GOOD = Row(
    fault="redis-killed",
    fault_s=4.0,
    calls=40,
    wrong_masks=0,
    least_iou=1.0,
    hangs=0,
    crashes=0,
    library_errors="",
    raw_errors="CACHE_UNAVAILABLE 3",
    slowest_s=2.5,
    normal_s=0.5,
    device="cpu-2-cores",
    torch="2",
    redis="6",
    commit="abc",
    command="python -m bench.faults",
)


def test_every_published_fault_was_survived():
    published = [row for path in RESULTS.glob("faults-*.csv") for row in read_rows(Row, path)]
    assert {row.fault for row in published} == set(NAMES)
    assert [row.fault for row in published if not row.is_survived] == []


def test_names_are_unique():
    assert len(set(NAMES)) == len(FAULTS)


def test_rows_are_kept_and_replaced(tmp_path):
    path = tmp_path / "faults-x.csv"
    later = dataclasses.replace(GOOD, fault="decoder-killed", least_iou=None)
    for row in (later, GOOD, dataclasses.replace(later, calls=7)):
        ResultsFile(path, Row).add(row)
    assert read_rows(Row, path) == [dataclasses.replace(later, calls=7), GOOD]


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "faults-x.csv"
    path.write_text("fault,calls\n")
    with pytest.raises(ValueError, match="has not the columns"):
        read_rows(Row, path)


@pytest.mark.parametrize(
    "change",
    [{"wrong_masks": 1}, {"hangs": 1}, {"crashes": 1}, {"normal_s": 10.1}],
    ids=lambda change: next(iter(change)),
)
def test_row_that_does_not_hold_is_bold(change):
    assert "| redis-killed |" in build_table([GOOD])
    assert "**redis-killed**" in build_table([dataclasses.replace(GOOD, **change)])


def test_an_error_of_the_library_does_not_hold_in_a_rolling_restart_alone():
    noticed = dataclasses.replace(GOOD, library_errors="CACHE_UNAVAILABLE 1")
    assert noticed.is_survived
    assert not dataclasses.replace(noticed, fault="decoder-rolling-restart").is_survived


def test_fresh_file_has_the_same_pixels():
    content = (FOLDER / f"{PHOTOGRAPHS[0]}.jpg").read_bytes()
    limits = ImageLimits(max_bytes=10**8, max_pixels=10**8)
    first, second = (KnownImage(content, ()).fresh(number) for number in (1, 2))
    assert len({content, first, second}) == 3
    assert (prepare_image(first, limits).pixels == prepare_image(content, limits).pixels).all()


async def test_devices_fail_on_a_thread_and_on_the_event_loop(tmp_path, monkeypatch, metrics):
    monkeypatch.setenv(FAULT_FOLDER, str(tmp_path))
    encoder, _ = FailingEncoder(EncoderSettings.load(["--device", "cpu", "--port", "1"]), metrics)._load()
    decoder, _ = FailingDecoder(DecoderSettings.load(["--device", "cpu", "--port", "2"]), metrics)._load()
    assert await decoder.decode_on_loop([]) == decoder.decode([]) == []
    for port in (1, 2):
        (tmp_path / str(port)).write_text("lost")
    for run in (encoder.encode, decoder.decode):
        with pytest.raises(torch.AcceleratorError):
            run([])
    for run in (encoder.encode_on_loop, decoder.decode_on_loop):
        with pytest.raises(torch.AcceleratorError):
            await run([])

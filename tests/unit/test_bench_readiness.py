"""The readiness benchmark starts the real service, and its rows become a table."""

import dataclasses

import pytest

from bench.readiness.__main__ import main
from bench.readiness.rows import Row
from bench.readiness.tables import build_tables
from bench.row_file import read_rows

OPTIONS = ("--models", "vit_t", "--device", "cpu", "--commit", "abc")


def test_service_is_started_cold_and_warm_and_encodes(tmp_path, capsys):
    main([*OPTIONS, "--precisions", "fp32", "--results", str(tmp_path)])
    [path] = tmp_path.iterdir()
    cold, warm = read_rows(Row, path)
    assert (cold.cache, warm.cache) == ("cold", "warm")
    assert (cold.model, cold.precision, cold.rungs) == ("vit_t", "fp32", "fp32")
    assert min(cold.ready_s, cold.first_encode_ms, cold.second_encode_ms) > 0
    assert "--results" not in cold.command
    assert "vit_t fp32 warm: ready in" in capsys.readouterr().out


def test_precision_that_the_device_cannot_do_is_refused_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: precision: seed .*"):
        main([*OPTIONS, "--precisions", "seed", "--results", str(tmp_path)])


def test_start_that_fails_ends_with_the_services_own_words(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)error: .*exited with status 2 while starting.*batch_sizes"):
        main([*OPTIONS, "--precisions", "fp32", "--batch-sizes", "none", "--results", str(tmp_path)])


def test_table_has_a_line_for_a_cold_start_and_the_warm_one_after_it():
    cold = Row("vit_b", "bf16", "1,4,16", "cold", "fp32 bf16", 61.25, 30, 9, "H100", "2", "3", "abc", "python -m x")
    warm = dataclasses.replace(cold, cache="warm", ready_s=12.3, first_encode_ms=20, second_encode_ms=8)
    assert "| vit_b | bf16 | 1,4,16 | 61.2 | 12.3 | 20 / 8 |" in build_tables([cold, warm])
    assert build_tables([]) == "Not measured yet.\n"

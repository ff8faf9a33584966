"""The tables and charts in the documents are those that the published results make."""

import pytest

from bench.attention import tables as attention
from bench.codecs import tables as codecs
from bench.datasets import tables as datasets
from bench.decoder import tables as decoder
from bench.documents import DOCUMENTS
from bench.elementwise import tables as elementwise
from bench.encode import tables as encode
from bench.faults import tables as faults
from bench.fuzz import tables as fuzz
from bench.gateway import tables as gateway
from bench.load import tables as load
from bench.loop import tables as loop
from bench.page import tables as page
from bench.readiness import tables as readiness
from bench.row_file import RESULTS
from bench.waterfall import tables as waterfall

BENCHMARKS = (
    attention,
    codecs,
    datasets,
    decoder,
    elementwise,
    encode,
    faults,
    fuzz,
    gateway,
    load,
    loop,
    page,
    readiness,
    waterfall,
)


@pytest.mark.parametrize("tables", BENCHMARKS, ids=lambda tables: tables.__name__)
def test_published_tables_and_charts_are_current(tables):
    stale = [path for path, text in tables.collect_files(DOCUMENTS, RESULTS).items() if path.read_text() != text]
    assert not stale, f"run python -m {tables.__name__}"


def test_every_benchmark_with_results_has_tables():
    published = {path.name.partition("-")[0] for path in RESULTS.glob("*.csv")}
    assert published <= {tables.__name__.split(".")[1] for tables in BENCHMARKS}

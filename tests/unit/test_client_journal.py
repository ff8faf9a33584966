"""What a long run leaves behind, and who may go on with it; damage is tested where rows are, in test_bench_coco.py."""

import pytest

from splitsam.client.journal import Journal, JournalError


def lines(journal):
    return [line for _, line in journal.read()]


def test_lines_can_be_read_and_added_in_turns(tmp_path):
    with Journal(tmp_path / "j", "test/1", {"a": 1}) as journal:
        assert lines(journal) == []
        journal.append({"n": 1})
        assert lines(journal) == [{"n": 1}]
        journal.append({"n": 2})
    with Journal(tmp_path / "j", "test/1", {"a": 1}) as journal:
        assert lines(journal) == [{"n": 1}, {"n": 2}]


def test_an_unfinished_line_is_written_anew(tmp_path):
    path = tmp_path / "j"
    with Journal(path, "test/1", {}) as journal:
        journal.append({"n": 1})
    path.write_bytes(path.read_bytes() + b'{"n": 2')
    with Journal(path, "test/1", {}) as journal:
        assert lines(journal) == [{"n": 1}]
        journal.append({"n": 3})
        assert lines(journal) == [{"n": 1}, {"n": 3}]


def test_an_unfinished_first_line_is_nobodys(tmp_path):
    (tmp_path / "j").write_bytes(b'{"format": "te')
    with pytest.raises(JournalError, match="is not a file of test/1"):
        Journal(tmp_path / "j", "test/1", {})

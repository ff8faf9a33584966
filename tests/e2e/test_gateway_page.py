"""The labeling page's files, as the gateway serves them; tests/e2e/web uses them in a browser."""

import re
from pathlib import Path

import pytest
from gateway_support import running_gateway

PAGE = Path(__file__).resolve().parents[2] / "gateway" / "page"


@pytest.fixture(scope="module")
def gateway(open_stack, tmp_path_factory):
    """One that asks for tokens: none is needed for the page itself."""
    folder = tmp_path_factory.mktemp("gateway-page")
    (folder / "tokens").write_text("anna anna-token-0123456789\n")
    arguments = ("--tokens-file", str(folder / "tokens"))
    with running_gateway(open_stack.encoder, open_stack.decoder, folder, *arguments) as running:
        yield running


def test_page_and_its_files_are_served_under_a_strict_policy(gateway):
    kinds = {".js": "javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    files = [file for file in PAGE.iterdir() if file.is_file()]
    assert {file.suffix for file in files} == kinds.keys()
    for path, file in [("/", PAGE / "index.html"), *((f"/assets/{file.name}", file) for file in files)]:
        answer = gateway.call(path)
        assert (answer.status, answer.body) == (200, file.read_bytes())
        assert kinds[file.suffix] in answer.headers["content-type"]
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert not re.search(r"unsafe|\*|https?:|data:", policy)
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_file_that_the_browser_has_is_not_sent_again(gateway):
    first = gateway.call("/assets/main.js")
    again = gateway.call("/assets/main.js", if_none_match=first.headers["etag"])
    assert (again.status, again.body) == (304, b"")


@pytest.mark.parametrize("name", ["none.js", "..", "%2e%2e%2fapp.py", "..%2f..%2fapp.py", "%00", "page"])
def test_nothing_else_is_served(gateway, name):
    answer = gateway.call(f"/assets/{name}")
    assert (answer.status, answer.error["reason"]) == (404, "NO_SUCH_ROUTE")


def test_page_names_no_other_host():
    for file in PAGE.iterdir():
        addresses = re.findall(
            r"(?:https?:|wss?:)?//[\w.-]+\.\w+\S*", re.sub(r"^\s*//.*$", "", file.read_text(), flags=re.M)
        )
        assert [each for each in addresses if "www.w3.org/2000/svg" not in each] == []

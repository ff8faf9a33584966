"""A web server on loopback that answers as it is told, and remembers what it was asked."""

import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Mapping[str, str], bytes] | Callable[[BaseHTTPRequestHandler], None]


class WebServer:
    """Serves while it is a context; paths that it does not know are answered 404.

    Args:
        answers: by path without the query: status, headers and body, or what writes the whole response.
    """

    def __init__(self, answers: Mapping[str, Answer], host: str = "127.0.0.1"):
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                served.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                answer = answers.get(self.path.partition("?")[0], (404, {"content-type": "text/html"}, b"nothing here"))
                if callable(answer):
                    answer(self)
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in {"content-length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def place(self) -> str:
        """host:port"""
        return "{}:{}".format(*self._server.server_address[:2])

    @property
    def url(self) -> str:
        return f"http://{self.place}"

    def headers_of(self, path: str) -> list[dict[str, str]]:
        """Of all requests for a path."""
        return [headers for asked, headers, _ in self.requests if asked.partition("?")[0] == path]

    def __enter__(self) -> "WebServer":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

"""The page of a record that grows, served to browsers of this machine.

The server answers GET and HEAD of four paths and nothing else, writes nothing, and is bound to 127.0.0.1. A web page of
elsewhere cannot read it either: requests under another host's name are refused, as a name that is made to point here
(DNS rebinding) has, and no answer allows another origin.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from vlearn.report_page.page import packed, packed_examples, page
from vlearn.report_page.report import THUMBNAILS, default_title, open_source, read, version

ADDRESS = "127.0.0.1"
FILES = ("memory.json", "averages.npz")  # replaced as wholes when there is something new
TYPES = {"/": "text/html; charset=utf-8", "/version": "text/plain; charset=utf-8"}
TYPES |= dict.fromkeys(("/contents", "/examples"), "application/octet-stream")


class Watched:
    """A record and what is shown of it, packed anew when it has grown.

    Args:
        run: folder of the record, which need not be there yet.
        dataset, labels, names, title, score, thumbnails: see `vlearn.report`.
    """

    def __init__(
        self,
        run: Path,
        dataset: Any = None,
        *,
        labels: Any = None,
        names: Sequence[str] | None = None,
        title: str | None = None,
        score: str | None = None,
        thumbnails: int = THUMBNAILS,
    ):
        self.run, self._dataset, self._labels, self._names = Path(run), dataset, labels, names
        self.title, self._score, self._thumbnails = title or default_title(run), score, thumbnails
        self._blocks: tuple[str, dict[str, bytes]] = ("", {})
        self._lock = threading.Lock()

    def version(self) -> str:
        """What changes whenever the record does.

        Raises:
            FileNotFoundError: if there is no record yet.
        """
        if not (self.run / FILES[0]).exists():
            raise FileNotFoundError(f"{self.run.name} holds no record yet.")
        times = [(self.run / name).stat().st_mtime_ns for name in FILES if (self.run / name).exists()]
        return "-".join(map(str, times))

    def block(self, name: str) -> bytes:
        """ "contents" or "examples", packed.

        Raises:
            ValueError: if nothing is recorded yet, or the record does not fit the data.
        """
        with self._lock:
            now = self.version()
            if self._blocks[0] != now:
                shown, contents = read(open_source(self.run), self._dataset, self._labels, score=self._score)
                if not contents.columns:
                    raise ValueError("nothing of the examples is recorded yet.")
                names = list(self._names or shown.names or [])
                described = packed(contents, shown, self.title, names, None, version())
                blocks = {"contents": described, "examples": packed_examples(contents, shown, self._thumbnails)}
                self._blocks = now, blocks
            return self._blocks[1][name]


def make_server(watched: Watched, port: int = 0, every: float = 3.0) -> ThreadingHTTPServer:
    """A server of the page, bound but not running.

    Args:
        port: 0 takes a free one.
        every: seconds between two looks of the page at the record.

    Raises:
        OSError: if the port is taken.
    """
    document = page(watched.title, {}, every).encode("utf-8", "replace")
    answers: dict[str, Callable[[], bytes]] = {
        "/": lambda: document,
        "/version": lambda: watched.version().encode(),
        "/contents": lambda: watched.block("contents"),
        "/examples": lambda: watched.block("examples"),
    }

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "vlearn", ""

        def do_GET(self) -> None:  # noqa: N802, D102
            own = server.server_port
            if self.headers.get("Host", "") not in (f"{ADDRESS}:{own}", f"localhost:{own}"):
                return self._answer(HTTPStatus.FORBIDDEN, b"This server answers under its own address alone.")
            path = self.path.partition("?")[0]
            if path not in answers:
                return self._answer(HTTPStatus.NOT_FOUND, b"There is no such page.")
            try:
                content = answers[path]()
            except (OSError, ValueError, ImportError) as error:
                return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode())
            self._answer(HTTPStatus.OK, content, TYPES[path])

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, status: HTTPStatus, content: bytes, kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": kind,
                "Content-Length": str(len(content)),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Referrer-Policy": "no-referrer",
                "Cross-Origin-Resource-Policy": "same-origin",
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer((ADDRESS, port), Handler)
    server.daemon_threads = True
    return server


def serve(watched: Watched, port: int = 8080, every: float = 3.0) -> None:
    """Serve until Ctrl-C."""
    try:
        with make_server(watched, port, every) as server:
            sys.stdout.write(f"http://{ADDRESS}:{server.server_port} shows {watched.run}; Ctrl-C ends it.\n")
            sys.stdout.flush()
            server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        sys.stdout.write("\n")

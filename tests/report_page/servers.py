"""A server of a page in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vlearn.report_page.server import Watched, make_server


@contextmanager
def running(watched: Watched, every: float = 1.0) -> Iterator[str]:
    """Its address, while it runs."""
    with make_server(watched, every=every) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()

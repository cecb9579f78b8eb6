"""The server of a record that grows: what it answers, and whom it does not."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report_page.records import recorded
from tests.report_page.servers import running
from vlearn.report_page.server import Watched


def ask(address: str, path: str, method: str = "GET", host: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    own = address.removeprefix("http://")
    connection = http.client.HTTPConnection(own, timeout=30)
    try:
        connection.request(method, path, headers={"Host": host or own})
        answer = connection.getresponse()
        return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


def test_it_serves_the_page_and_what_is_new(tmp_path: Path) -> None:
    with running(Watched(tmp_path / "run", title="<b>run</b>")) as address:
        status, content, headers = ask(address, "/")
        assert status == 200 and b"connect-src 'self'" in content and b"&lt;b&gt;run" in content
        assert headers["x-content-type-options"] == "nosniff" and "access-control-allow-origin" not in headers
        status, content, _ = ask(address, "/version")
        assert status == 503 and b"no record yet" in content
        recorded(tmp_path / "run", num_data=30, epochs=1)
        first, contents = ask(address, "/version")[1], ask(address, "/contents")[1]
        assert ask(address, "/contents")[1] == contents and contents[:2] == b"\x1f\x8b"
        recorded(tmp_path / "run", num_data=30, epochs=2)
        assert ask(address, "/version")[1] != first and ask(address, "/contents")[1] != contents
        assert ask(address, "/", "HEAD")[1] == b"" and ask(address, "/examples")[0] == 200


def test_it_answers_nothing_else_and_nobody_else(tmp_path: Path) -> None:
    recorded(tmp_path / "run", num_data=10, epochs=1)
    (tmp_path / "secret").write_text("secret")
    with running(Watched(tmp_path / "run")) as address:
        assert address.startswith("http://127.0.0.1:")
        port = address.rpartition(":")[2]
        for path in (
            "/memory.json",
            "/../secret",
            "/%2e%2e/secret",
            "//etc/passwd",
            "/contents/../version",
            "contents",
        ):
            assert ask(address, path)[0] in (400, 404), path
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port}.evil.example"):
            status, content, _ = ask(address, "/contents", host=host)
            assert status == 403 and b"\x1f\x8b" not in content, host
        assert ask(address, "/version", host=f"localhost:{port}")[0] == 200
        for method in ("POST", "PUT", "DELETE"):
            assert ask(address, "/", method)[0] == 501


@pytest.mark.slow
def test_control_c_ends_it_quietly(tmp_path: Path) -> None:
    # A run in the background of a shell ignores the signal, and so would what it starts.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import vlearn.__main__ as m; m.main()"
    )
    command = [sys.executable, "-c", code, "watch", str(tmp_path), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert "Ctrl-C ends it" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0 and process.stderr.read() == ""
        finally:
            process.kill()

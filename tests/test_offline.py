"""The guard that `make test` runs under bites, and lets pass what stays on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

GUARD = Path(__file__).parent / "offline"


def guarded(code: str, record: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(GUARD), "ICD_OFFLINE_RECORD": str(record)}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "socket.getaddrinfo('huggingface.co', 443)",
        "socket.gethostbyname('huggingface.co')",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        "urllib.request.urlopen('https://huggingface.co/api/telemetry', timeout=1)",
    ],
)
def test_what_leaves_the_machine_is_refused_and_noted_even_if_swallowed(
    tmp_path: Path, attempt: str
) -> None:
    record = tmp_path / "record"
    raised = guarded(f"import socket, urllib.request\n{attempt}", record)
    assert raised.returncode and "offline guard" in raised.stderr
    record.unlink()
    code = f"import socket, urllib.request\ntry:\n    {attempt}\nexcept Exception:\n    pass"
    assert guarded(code, record).returncode == 0
    assert record.read_text().startswith("socket.")


def test_what_stays_on_the_machine_passes(tmp_path: Path) -> None:
    code = (
        "import asyncio, socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname(), timeout=5).close()\n"
        "socket.create_connection(('localhost', server.getsockname()[1]), timeout=5).close()\n"
        "socket.socketpair()\nasyncio.run(asyncio.sleep(0))"
    )
    done = guarded(code, tmp_path / "record")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "record").exists()


def test_the_guard_reaches_the_kernels_of_notebooks(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    cell = nbformat.v4.new_code_cell(
        "import urllib.request\nurllib.request.urlopen('https://example.org', timeout=1)"
    )
    env = {**os.environ, "PYTHONPATH": str(GUARD), "ICD_OFFLINE_RECORD": str(tmp_path / "record")}
    with pytest.raises(CellExecutionError, match="offline guard"):
        NotebookClient(nbformat.v4.new_notebook(cells=[cell])).execute(env=env)
    assert (tmp_path / "record").is_file()

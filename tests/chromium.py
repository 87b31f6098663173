"""A real Chromium for the tests that look at a page: no network, and skipped where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
WAIT = 60_000  # ms: cores may be busy with a training


@contextmanager
def chromium(*hosts: str) -> Iterator[Browser]:
    """A browser that finds these hosts alone."""
    if not CHROMIUM:
        pytest.skip("no browser found: install Chromium (Debian, Ubuntu: apt-get install chromium)")
    sync_api = pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is missing: pip install -c constraints.txt -e '.[lab,test]'",
    )
    rules = ["MAP * ~NOTFOUND", *(f"EXCLUDE {host}" for host in hosts)]
    args = ["--no-proxy-server", f"--host-resolver-rules={' , '.join(rules)}"]
    if getattr(os, "geteuid", lambda: 1)() == 0:
        args.append("--no-sandbox")  # root, as in a container, has no sandbox
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=args, timeout=WAIT)
        yield browser
        browser.close()

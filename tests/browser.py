"""A real browser, where there is one: Chromium, driven by its own flags, and a server of a folder for it."""

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # a container's root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)


class Browser:
    """Skips the test where there is no browser."""

    def __init__(self, profile: Path):
        self.profile = profile
        self.path = next(filter(None, map(shutil.which, BROWSERS)), "")
        if not self.path:
            pytest.skip(f"no Chromium here (looked for {', '.join(BROWSERS)})")

    def __call__(self, page: Path, *flags: str) -> tuple[str, str, list[str]]:
        """What Chromium writes to stdout and stderr, and what it asks the server of the page's folder for."""
        asked: list[str] = []
        with serving(page.parent, asked) as address:
            command = [self.path, *FLAGS, f"--user-data-dir={self.profile}", *flags, f"{address}/{page.name}"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return result.stdout, result.stderr, asked


@contextlib.contextmanager
def serving(folder: Path, asked: list[str]) -> Iterator[str]:
    """A server of a folder on this machine, which notes what it is asked for; its address."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, form, *values):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()

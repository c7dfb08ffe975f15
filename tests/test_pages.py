"""The report and the site, opened by a real browser where there is one."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine import cli

ROOT = Path(__file__).resolve().parents[1]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


def opened(url: str, size: str, picture: Path) -> tuple[str, list[str]]:
    """The page's DOM after its scripts, and what it complained of; a screenshot goes to `picture`.

    No host but this one can be reached: a page that asks for another says so on its console.
    """
    words = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--window-size={size}",
        "--virtual-time-budget=3000", f"--user-data-dir={picture.parent / 'profile'}",
    ]  # fmt: skip
    dom = subprocess.run([*words, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    subprocess.run([*words, f"--screenshot={picture}", url], capture_output=True, timeout=120)
    said = [line for line in dom.stderr.splitlines() if "CONSOLE" in line]
    return dom.stdout, said


@needs_browser
@pytest.mark.parametrize("size", ["1280,900", "390,844"], ids=["desktop", "phone"])
def test_the_report_opens_without_a_complaint(tmp_path, size):
    run = tmp_path / "run"
    words = ["train", "quickstart", "--optim.epochs", "1", "--run-dir", str(run), "--json"]
    words += ["--evaluation.examples", "20", "--evaluation.autoattack", "none"]
    assert cli.run([*words, "--evaluation.pgd_steps", "2", "--evaluation.pgd_restarts", "1"]) == 0
    dom, said = opened((run / "report.html").as_uri(), size, tmp_path / "report.png")
    assert said == []
    assert "quickstart" in dom
    assert dom.count("<svg") >= 3
    assert (tmp_path / "report.png").stat().st_size > 20_000


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (make docs)")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_asks_no_other_host(site):
    for page in site.glob("*.html"):
        for tag in re.findall(r"<(?:script|img|link)[^>]*>", page.read_text(encoding="utf-8")):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), (page.name, tag)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("page", ["index", "api", "results"])
def test_the_site_opens_without_a_complaint(site, page, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/{page}.html"
        dom, said = opened(url, "1280,900", tmp_path / "site.png")
    finally:
        server.shutdown()
    assert said == []
    assert "robust-engine" in dom
    assert (tmp_path / "site.png").stat().st_size > 20_000

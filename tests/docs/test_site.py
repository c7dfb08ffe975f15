"""The report and the site, opened in a real browser if one is installed."""

from __future__ import annotations

import functools
import html
import http.server
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import engine
from engine import cli

ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


# Width and height; a headless window is never narrower than 500 pixels, a frame may be.
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
FRAMES = """<!doctype html><body style="margin:0">
{frames}<pre id="said"></pre>
<script>onload = () => {{
  said.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    return {{
      width: root.clientWidth, needed: root.scrollWidth, text: page.body.innerText,
      drawings: page.querySelectorAll("svg").length,
      missing: [...page.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
    }};
  }}));
}}</script>"""


def look(folder: Path, page: str, picture: Path) -> str:
    """Open a page of `folder` at all sizes at once, check it, and return its text.

    Checks: no message on the console, no missing picture, no page wider than its window. The
    browser
    can reach no other host; a page that asks for one causes a message on the console.
    """

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/frames":
                return super().do_GET()
            frame = '<iframe src="{}" style="border:0;width:{}px;height:{}px"></iframe>'
            frames = "".join(frame.format(page, *size) for size in SIZES.values())
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(FRAMES.format(frames=frames).encode())
            return None

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1700,1000",
        "--virtual-time-budget=3000", f"--user-data-dir={picture.parent / 'profile'}",
        f"--screenshot={picture}", "--dump-dom", f"http://127.0.0.1:{server.server_address[1]}/frames",
    ]  # fmt: skip
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
    # The browser asks for an icon, which the page with the frames does not have.
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert [line for line in messages if "favicon.ico" not in line] == []
    measured = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert measured, done.stderr
    found = dict(zip(SIZES, json.loads(html.unescape(measured[1])), strict=True))
    for size, seen in found.items():
        assert seen["missing"] == [], size
        assert seen["needed"] <= seen["width"] <= SIZES[size][0], f"wider than the {size}'s window"
        assert seen["drawings"] >= 3, size
    assert picture.stat().st_size > 20_000
    return found["desktop"]["text"]


@needs_browser
def test_the_report_opens_without_a_complaint(tmp_path):
    run = tmp_path / "run"
    words = ["train", "quickstart", "--optim.epochs", "1", "--run-dir", str(run), "--json"]
    words += ["--evaluation.examples", "20", "--evaluation.autoattack", "none"]
    assert cli.run([*words, "--evaluation.pgd_steps", "2", "--evaluation.pgd_restarts", "1"]) == 0
    assert "quickstart" in look(run, "report.html", tmp_path / "report.png")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (make docs)")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
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
def test_every_link_within_the_site_leads_somewhere(site):
    pages = {
        page: page.read_text(encoding="utf-8") for page in site.glob("*.html") if page.stem != "404"
    }
    names = {page: set(re.findall(r' (?:id|name)="([^"]+)"', text)) for page, text in pages.items()}
    dead = []
    for page, text in pages.items():
        for target in re.findall(r'<a [^>]*href="([^"]+)"', text):
            if target.startswith(("http", "mailto:", "javascript:")):
                continue
            path, _, anchor = html.unescape(target).partition("#")
            leads = (site / path).resolve() if path not in ("", ".") else page
            if not leads.exists() or (anchor and leads in names and anchor not in names[leads]):
                dead.append(f"{page.name}: {target}")
    assert dead == []


@pytest.mark.slow
def test_the_api_page_shows_every_public_name_with_its_docstring(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    text = plain(re.sub(r"<[^>]+>", "", page))
    for name in engine.__all__:
        assert f'id="engine.{name}"' in page, name
        doc = inspect.getdoc(getattr(engine, name))
        assert plain(doc.split("\n\n")[0].replace("`", "")) in text, name
    # Fields have descriptions with units; results and errors are sections.
    for field in vars(engine.Attack)["__pydantic_fields__"].values():
        assert plain(field.description) in text
    for section in ("Parameters:", "Attributes:", "Returns:", "Raises:"):
        assert f">{section}<" in page, section
    assert "Annotated[" not in text


def plain(text: str) -> str:
    return " ".join(html.unescape(text).split())


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("page", ["index", "api", "results", "kernels", "troubleshooting"])
def test_the_site_opens_without_a_complaint(site, page, tmp_path):
    assert "robust-engine" in look(site, f"{page}.html", tmp_path / "site.png")


@pytest.mark.slow
@needs_browser
def test_the_search_works_where_pages_are_opened_as_files(site):
    """A search for a word of the index, in a page of which no server knows."""
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    words += ["--virtual-time-budget=20000", f"{(site / 'index.html').as_uri()}?q=adversary"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("md-search-result__item") >= 3
    assert re.search(r"\d+ matching documents", done.stdout)

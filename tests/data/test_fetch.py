"""`fetch` from every source, and from every source failing; nothing here leaves this machine."""

import contextlib
import functools
import http.server
import importlib
import io
import lzma
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import requests

from engine import data
from engine.data import datasets
from engine.errors import EngineError

from . import official

fetching = importlib.import_module("engine.data.fetch")  # the package has the function by that name
DPKG_DEB = shutil.which("dpkg-deb")


@pytest.fixture
def mirror(tmp_path):
    return tmp_path / "a mirror"


@pytest.fixture(autouse=True)
def no_apt(monkeypatch):
    monkeypatch.setattr(fetching.shutil, "which", lambda name: None)


def fails(name: str, root: Path) -> str:
    with pytest.raises(EngineError) as caught:
        data.fetch(name, root, progress=False)
    assert "\n" not in str(caught.value)
    assert_nothing_landed(root / name)
    return str(caught.value)


def assert_nothing_landed(folder: Path) -> None:
    assert not folder.exists() or not list(folder.iterdir())


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@contextlib.contextmanager
def served(folder: Path, handler: type | None = None):
    """The address of an HTTP server of `folder`, and the paths that were asked of it."""
    asked: list[str] = []

    class Handler(handler or http.server.SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            asked.append(f"{self.command} {self.path}")

        def log_message(self, *args): ...

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("scheme", ["file", "http"])
def test_a_mirror(root, monkeypatch, mirror, name, scheme):
    published = official.publish(monkeypatch, mirror, name)
    with served(mirror) as (address, asked):
        base = mirror.as_uri() + "/" if scheme == "file" else address
        monkeypatch.setenv("ENGINE_MIRROR", base)
        assert data.fetch(name, root, progress=False) == root / name
        assert files_in(root / name) == published
        assert len(data.load(name, "train", root).images) == 30
        # a second time asks nobody
        asked.clear()
        monkeypatch.setenv("ENGINE_MIRROR", "http://127.0.0.1:1")
        assert data.fetch(name, root, progress=False) == root / name
        assert asked == []


def test_only_what_is_missing_or_damaged_is_fetched(root, monkeypatch, mirror):
    published = official.publish(monkeypatch, mirror, "mnist")
    kept, damaged, *_ = published
    official.write(root / "mnist", {kept: published[kept], damaged: published[damaged][:-3]})
    with served(mirror) as (address, asked):
        monkeypatch.setenv("ENGINE_MIRROR", address)
        data.fetch("mnist", root, progress=False)
    assert {line.removeprefix("GET /mnist/") for line in asked if "GET" in line} == {
        *published.keys() - {kept}
    }
    assert files_in(root / "mnist") == published


def test_files_are_as_readable_as_others(root, monkeypatch, mirror):
    official.publish(monkeypatch, mirror, "mnist")
    monkeypatch.setenv("ENGINE_MIRROR", mirror.as_uri())
    for file in data.fetch("mnist", root, progress=False).iterdir():
        assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
@pytest.mark.parametrize("scheme", ["file", "http"])
def test_a_wrong_checksum_is_refused(root, monkeypatch, mirror, name, scheme):
    official.publish(monkeypatch, mirror, name)
    # sound files with other pixels
    arrays = official.random_arrays(name, 30, 8), official.random_arrays(name, 20, 9)
    official.write(mirror / name, official.files(name, *arrays))
    with served(mirror) as (address, _):
        monkeypatch.setenv("ENGINE_MIRROR", mirror.as_uri() if scheme == "file" else address)
        message = fails(name, root)
    assert "its content has SHA-256" in message
    assert f"/{name}/{next(iter(datasets.find_spec(name).files))}" in message


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda content: b"", "empty"),
        (lambda content: content[:-20], "truncated"),
        (lambda content: content + b"x", "after the end"),
        (lambda content: content[:40] + b"????" + content[44:], "damaged gzip|SHA-256"),
        (lambda content: b"<html>log in first</html>", "begins with 3c68746d"),
        (lambda content: bytes(3_000_000), "3,000,000 bytes|more than"),
    ],
)
@pytest.mark.parametrize("scheme", ["file", "http"])
def test_a_damaged_file_of_a_mirror_is_refused(root, monkeypatch, mirror, damage, fault, scheme):
    published = official.publish(monkeypatch, mirror, "mnist")
    first = next(iter(published))
    official.write(mirror / "mnist", {first: damage(published[first])})
    with served(mirror) as (address, _):
        monkeypatch.setenv("ENGINE_MIRROR", mirror.as_uri() if scheme == "file" else address)
        with pytest.raises(EngineError, match=fault):
            data.fetch("mnist", root, progress=False)
    assert_nothing_landed(root / "mnist")


def test_a_connection_cut_in_the_middle(root, monkeypatch, mirror):
    published = official.publish(monkeypatch, mirror, "cifar10")

    class Cut(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile):
            outputfile.write(source.read(20_000))

    with served(mirror, Cut) as (address, _):
        monkeypatch.setenv("ENGINE_MIRROR", address)
        with pytest.raises(
            EngineError, match=r"the connection broke; 16,384 bytes are kept"
        ) as caught:
            data.fetch("cifar10", root, progress=False)
    assert "\n" not in str(caught.value)
    (part,) = (root / "cifar10").iterdir()
    (content,) = published.values()
    assert part.read_bytes() == content[:16_384]


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Answers a Range as the publishers' servers do."""

    ranges: ClassVar[list] = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.ranges.append(wanted)
        if wanted is None:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        first = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if first >= len(content):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[first:])


@pytest.mark.parametrize("kept", [1, 1_000, "all"])
def test_a_download_goes_on_where_it_was_cut(root, monkeypatch, mirror, kept):
    published = official.publish(monkeypatch, mirror, "cifar10")
    (file,) = published
    size = len(published[file]) if kept == "all" else kept
    (root / "cifar10").mkdir(parents=True)
    (root / "cifar10" / f".{file}.part").write_bytes(published[file][:size])
    Ranges.ranges = []
    with served(mirror, Ranges) as (address, _):
        monkeypatch.setenv("ENGINE_MIRROR", address)
        data.fetch("cifar10", root, progress=False)
    assert Ranges.ranges == [f"bytes={size}-"]
    assert files_in(root / "cifar10") == published


@pytest.mark.parametrize("handler", [Ranges, http.server.SimpleHTTPRequestHandler])
def test_a_beginning_of_another_file_is_thrown_away(root, monkeypatch, mirror, handler):
    """So is one that a server without ranges cannot go on from."""
    published = official.publish(monkeypatch, mirror, "cifar10")
    (file,) = published
    (root / "cifar10").mkdir(parents=True)
    (root / "cifar10" / f".{file}.part").write_bytes(b"something else" * 20)
    with served(mirror, handler) as (address, _):
        monkeypatch.setenv("ENGINE_MIRROR", address)
        data.fetch("cifar10", root, progress=False)
    assert files_in(root / "cifar10") == published


def test_a_wrong_checksum_leaves_nothing_to_go_on_from(root, monkeypatch, mirror):
    official.publish(monkeypatch, mirror, "cifar10")
    (file,) = (mirror / "cifar10").iterdir()
    arrays = [official.random_arrays("cifar10", n, seed=9) for n in (30, 20)]
    (wrong,) = official.files("cifar10", *arrays).values()
    file.write_bytes(wrong)
    with served(mirror, Ranges) as (address, _):
        monkeypatch.setenv("ENGINE_MIRROR", address)
        assert "SHA-256" in fails("cifar10", root)


def test_an_endless_file_is_not_followed(root, monkeypatch, mirror):
    official.publish(monkeypatch, mirror, "mnist")

    class Endless(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                while True:
                    self.wfile.write(bytes(1 << 16))

    with served(mirror, Endless) as (address, _):
        monkeypatch.setenv("ENGINE_MIRROR", address)
        assert "all it may have" in fails("mnist", root)


def test_a_mirror_without_the_files(root, monkeypatch, mirror):
    mirror.mkdir()
    with served(mirror) as (address, _):
        monkeypatch.setenv("ENGINE_MIRROR", address)
        assert "404 File not found" in fails("mnist", root)
    monkeypatch.setenv("ENGINE_MIRROR", mirror.as_uri())
    assert "No such file or directory" in fails("mnist", root)


@pytest.mark.parametrize("address", ["ftp://host/", "/some/folder", "http://[", "http://", "x"])
def test_a_mirror_that_is_no_address(root, monkeypatch, address):
    monkeypatch.setenv("ENGINE_MIRROR", address)
    assert address.rstrip("/") in fails("mnist", root)


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist", "cifar10", "cifar100"])
def test_without_a_network_one_line_says_what_to_place_where(root, monkeypatch, name):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]  # bound but not listening: refuses every connection
        monkeypatch.setenv("ENGINE_MIRROR", f"http://127.0.0.1:{port}")
        start = time.perf_counter()
        message = fails(name, root)
    assert time.perf_counter() - start < 10
    assert "cannot connect" in message
    assert f"place {', '.join(data.info(name).files)} in {root / name}" in message
    assert data.info(name).homepage in message


def test_a_server_that_never_answers_costs_less_than_ten_seconds(root, monkeypatch):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("ENGINE_MIRROR", f"http://127.0.0.1:{mute.getsockname()[1]}")
        start = time.perf_counter()
        message = fails("cifar10", root)
    assert time.perf_counter() - start < 10
    assert "no answer within 4 s" in message


def test_a_request_that_times_out_before_our_own_clock_is_named_alike(root, monkeypatch):
    def head(*args, **kwargs):
        raise requests.ConnectTimeout

    monkeypatch.setattr(requests, "head", head)
    monkeypatch.setenv("ENGINE_MIRROR", "http://127.0.0.1:1")
    assert "no answer within 4 s" in fails("cifar10", root)


def test_a_folder_that_cannot_be_made(root, monkeypatch, tmp_path):
    root.write_text("in the way")
    monkeypatch.setenv("ENGINE_MIRROR", tmp_path.as_uri())
    with pytest.raises(EngineError, match="cannot make the folder"):
        data.fetch("mnist", root, progress=False)


def test_a_full_disk(root, monkeypatch, mirror):
    official.publish(monkeypatch, mirror, "mnist")
    monkeypatch.setenv("ENGINE_MIRROR", mirror.as_uri())

    class Full(io.BytesIO):
        def write(self, chunk):
            raise OSError(28, "No space left on device")

    sink = fetching.Sink.__init__
    monkeypatch.setattr(
        fetching.Sink, "__init__", lambda self, file, *rest: sink(self, Full(), *rest)
    )
    assert "cannot write train-images-idx3-ubyte.gz: No space left on device" in fails(
        "mnist", root
    )


def test_data_of_the_users_own_are_never_replaced(root, monkeypatch, mirror):
    official.publish(monkeypatch, mirror, "mnist")
    monkeypatch.setenv("ENGINE_MIRROR", mirror.as_uri())
    folder = official.install(root, "mnist", train=5, test=5)
    before = files_in(folder)
    assert data.fetch("mnist", root, progress=False) == folder
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(EngineError, match="has a SHA256SUMS of its own, and t10k-labels"):
        data.fetch("mnist", root, progress=False)
    del before["t10k-labels-idx1-ubyte.gz"]
    assert files_in(folder) == before


def test_an_interrupt_leaves_nothing_half_written(root, monkeypatch, mirror):
    published = official.publish(monkeypatch, mirror, "mnist")
    monkeypatch.setenv("ENGINE_MIRROR", mirror.as_uri())
    write, calls = fetching.Sink.write, iter(range(99))

    def interrupted(self, chunk):
        write(self, chunk[: len(chunk) // 2])
        if next(calls) == 1:
            raise KeyboardInterrupt
        return write(self, chunk[len(chunk) // 2 :])

    monkeypatch.setattr(fetching.Sink, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.fetch("mnist", root, progress=False)
    first = next(iter(published))
    assert files_in(root / "mnist") == {first: published[first]}
    data.fetch("mnist", root, progress=False)
    assert files_in(root / "mnist") == published


def test_two_processes_at_once(root, monkeypatch, mirror):
    published = official.publish(monkeypatch, mirror, "mnist", train=300)
    monkeypatch.setenv("ENGINE_MIRROR", mirror.as_uri())
    write = fetching.Sink.write

    def slowly(self, chunk):
        write(self, chunk[: len(chunk) // 2])
        time.sleep(0.05)
        return write(self, chunk[len(chunk) // 2 :])

    monkeypatch.setattr(fetching.Sink, "write", slowly)
    fork = multiprocessing.get_context("fork")  # a child must know the data set made up here
    barrier = fork.Barrier(3)
    results = fork.SimpleQueue()

    def child():
        barrier.wait()
        try:
            results.put(str(data.fetch("mnist", root, progress=False)))
        except BaseException as e:
            results.put(repr(e))

    children = [fork.Process(target=child) for _ in range(2)]
    for process in children:
        process.start()
    barrier.wait()
    seen = []
    while any(process.is_alive() for process in children):
        # whatever bears a final name is whole at every moment
        for file, content in published.items():
            with contextlib.suppress(FileNotFoundError):
                seen.append((root / "mnist" / file).read_bytes() == content)
    for process in children:
        process.join()
    assert [results.get() for _ in children] == [str(root / "mnist")] * 2
    assert files_in(root / "mnist") == published
    assert all(seen)


def test_debians_folder_is_used_where_it_lies(root, monkeypatch, tmp_path):
    share = tmp_path / "share" / "datasets"
    published = official.publish(monkeypatch, share, "fashion-mnist")
    assert data.fetch("fashion-mnist", root, progress=False) == share / "fashion-mnist"
    assert not root.exists()
    # unless the root has some of the files already: then it gets the others
    first = next(iter(published))
    official.write(root / "fashion-mnist", {first: b"damaged"})
    assert data.fetch("fashion-mnist", root, progress=False) == root / "fashion-mnist"
    assert files_in(root / "fashion-mnist") == published


def test_a_damaged_debian_folder_is_passed_over(root, monkeypatch, tmp_path, mirror):
    share = tmp_path / "share" / "datasets"
    published = official.publish(monkeypatch, share, "fashion-mnist")
    official.write(mirror / "fashion-mnist", published)
    official.write(share / "fashion-mnist", {next(iter(published)): b"damaged"})
    monkeypatch.setenv("ENGINE_MIRROR", mirror.as_uri())
    assert data.fetch("fashion-mnist", root, progress=False) == root / "fashion-mnist"
    assert len(data.load("fashion-mnist", "train", root).images) == 30


def deb(contents: dict[str, bytes], compression: str = "xz") -> bytes:
    """A Debian package with the files at usr/share/datasets/fashion-mnist."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": lzma.compress(b"odd"),  # of odd length, perhaps: ar pads it
        f"data.tar.{compression}": lzma.compress(packed.getvalue(), preset=0),
    }
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out


@pytest.fixture
def apt(monkeypatch, tmp_path):
    """A function that puts an `apt-get` of the given shell script first in PATH."""

    def install(script: str, dpkg: bool = False) -> None:
        tool = tmp_path / "bin" / "apt-get"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
        found = {"apt-get": str(tool)}
        if dpkg:
            found["dpkg-deb"] = "dpkg-deb"
        monkeypatch.setattr(fetching.shutil, "which", found.get)

    return install


@pytest.fixture
def no_site(monkeypatch):
    """No publisher's site: a fetch that gets past apt fails at once, and says so."""

    def refuse(url):
        raise EngineError("no site")

    monkeypatch.setattr(fetching, "await_answer", refuse)


@pytest.mark.parametrize("dpkg", [False, True])
def test_apt(root, monkeypatch, tmp_path, mirror, apt, no_site, dpkg):
    if dpkg and not DPKG_DEB:
        pytest.skip("dpkg-deb is not on this machine")
    published = official.publish(monkeypatch, mirror, "fashion-mnist")
    package = tmp_path / "it.deb"
    package.write_bytes(deb(published))
    apt(
        f'for last; do :; done; test "$last" = dataset-fashion-mnist || exit 9\n'
        f"cp '{package}' dataset-fashion-mnist_1.0_all.deb; pwd > '{tmp_path}/where'",
        dpkg=dpkg,
    )
    assert data.fetch("fashion-mnist", root, progress=True) == root / "fashion-mnist"
    assert files_in(root / "fashion-mnist") == published
    assert not Path((tmp_path / "where").read_text().strip()).exists()


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        (
            "echo 'E: Unable to locate package x' >&2; exit 100",
            "apt-get: Unable to locate package x",
        ),
        ("exit 1", "apt-get: no dataset-fashion-mnist"),
        ("exec sleep 9", "apt-get: no dataset-fashion-mnist within 1 s"),
        ("echo junk > dataset-fashion-mnist_1_all.deb", "not a .deb"),
        ("printf '!<arch>\\n' > dataset-fashion-mnist_1_all.deb", "no data in it"),
        ("cp '{cut}' dataset-fashion-mnist_1_all.deb", "damaged"),
        ("cp '{zst}' dataset-fashion-mnist_1_all.deb", "need dpkg-deb, which is missing"),
        ("cp '{lacking}' dataset-fashion-mnist_1_all.deb", "t10k-labels-idx1-ubyte.gz is missing"),
        ("cp '{other}' dataset-fashion-mnist_1_all.deb", "its content has SHA-256"),
    ],
)
def test_apt_fails_and_the_next_source_is_tried(
    root, monkeypatch, tmp_path, mirror, apt, no_site, script, fault
):
    published = official.publish(monkeypatch, mirror, "fashion-mnist")
    arrays = [official.random_arrays("fashion-mnist", n, 7) for n in (30, 20)]
    packages = {
        "cut": deb(published)[:-50],
        "zst": deb(published, "zst"),
        "lacking": deb({k: v for k, v in published.items() if "t10k-labels" not in k}),
        "other": deb(official.files("fashion-mnist", *arrays)),
    }
    official.write(tmp_path / "debs", packages)
    monkeypatch.setattr(fetching, "_APT_SECONDS", 1)
    apt(script.format(**{name: tmp_path / "debs" / name for name in packages}))
    message = fails("fashion-mnist", root)
    assert fault in message
    assert "; no site): place train-images-idx3-ubyte.gz" in message


def test_load_and_import_use_no_network_library():
    code = (
        "import sys, engine.data as d; d.load('digits', 'test');"
        "sys.exit(sorted({'requests', 'urllib3'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

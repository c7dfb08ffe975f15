import pytest

from engine.data import datasets


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No data set of the machine's own, no mirror, no apt: each test says what there is."""
    for name in (
        "ENGINE_DATA",
        "ENGINE_MIRROR",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "share"))
    monkeypatch.setattr(datasets.sys, "prefix", str(tmp_path / "prefix"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"

"""Which backend runs, on which device, and outputs that start as NaN."""

from pathlib import Path

import pytest
import torch

from engine.device import precision
from engine.kernels import backends


def runs_on_the_device(path: Path, params: dict) -> bool:
    """Whether a test in here launches Triton's kernels; where there is a GPU, they run on it."""
    return params.get("backend") == "triton" or path.name == "test_triton.py"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        return
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if Path(__file__).parent in item.path.parents and runs_on_the_device(item.path, params):
            item.add_marker(pytest.mark.gpu)


_EMPTY, _EMPTY_LIKE, _NEW_EMPTY = torch.empty, torch.empty_like, torch.Tensor.new_empty


def _poisoned(allocate):
    def allocate_poisoned(*args, **kwargs):
        t = allocate(*args, **kwargs)
        if t.is_floating_point():
            t.fill_(float("nan"))
        elif t.dtype in (torch.int8, torch.int32, torch.int64):
            t.fill_(77)
        return t

    return allocate_poisoned


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory is NaN, so an element that a kernel forgets to write shows."""
    monkeypatch.setattr(torch, "empty", _poisoned(_EMPTY))
    monkeypatch.setattr(torch, "empty_like", _poisoned(_EMPTY_LIKE))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(_NEW_EMPTY))


@pytest.fixture(autouse=True)
def exact_products():
    """By itself PyTorch rounds in a GPU's convolutions; ops are held against sums in float64."""
    with precision.arithmetic("fp32", torch.device("cuda")):
        yield


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request, poison):
    """Every op in the test runs on this backend; a missing one is a skip that says why."""
    module, reason = backends.load(request.param)
    if module is None:
        pytest.skip(f"{request.param} is not available: {reason}")
    with backends.use(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def interpreted(backend):
    """Triton without a GPU: slow, and without bfloat16."""
    return backend == "triton" and not torch.cuda.is_available()

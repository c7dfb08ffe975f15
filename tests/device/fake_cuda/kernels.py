"""Which of PyTorch's operators have a CUDA kernel, by the table that PyTorch is generated from."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

# Kernels under these keys serve every device.
_EVERYWHERE = {
    "CompositeImplicitAutograd",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
}
_KEYS = re.compile(r"^    ([\w, ]+): ", re.M)
_DELEGATE = re.compile(r"^  structured_delegate: (\S+)", re.M)


@cache
def _table() -> dict[str, bool]:
    spec = importlib.util.find_spec("torchgen")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    served: dict[str, bool] = {}
    delegates: dict[str, str] = {}
    for entry in path.read_text().split("\n- func: ")[1:]:
        name = entry[: entry.index("(")]
        _, _, dispatch = entry.partition("\n  dispatch:\n")
        # The block ends where the indentation does.
        block = re.split(r"^(?!    )", dispatch, maxsplit=1, flags=re.M)[0]
        keys = {key for keys in _KEYS.findall(block) for key in keys.split(", ")}
        if delegate := _DELEGATE.search(entry):
            delegates[name] = delegate[1]
        # Without a table of its own an operator is made of others, on any device; with an inner
        # loop alone its kernels are generated, CUDA's too.
        anywhere = not dispatch or "\n  ufunc_inner_loop:" in entry or bool(keys & _EVERYWHERE)
        served[name] = anywhere or "CUDA" in keys
    return served | {name: served[other] for name, other in delegates.items()}


def has_cuda_kernel(name: str) -> bool:
    """Return whether `name`, such as "aten::add.Tensor", runs on CUDA tensors.

    Operators that are not in the table were generated from ones that are, or are not PyTorch's:
    True.
    """
    namespace, _, rest = name.partition("::")
    return namespace != "aten" or _table().get(rest.removesuffix(".default"), True)

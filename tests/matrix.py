"""Run the suite, or a part of it, with every supported PyTorch: `make matrix`.

    python -m tests.matrix [--torch 2.11.0,2.14.1] [--triton 3.6.0] [--python python3.12,python3.13]
                           [PYTEST WORD ...]

Each version gets a virtual environment of its own under build/matrix, made once. A wheel of PyTorch
for CUDA takes some 5 GB there; with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu pip
takes the small ones for CPUs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# PyTorch's releases, each with the Triton that its CUDA wheel asks for. The oldest and the newest
# are the ends of the ranges in pyproject.toml.
PAIRS = {"2.11.0": "3.6.0", "2.12.1": "3.7.1", "2.13.0": "3.7.1", "2.14.1": "3.8.0"}
# What constraints.txt pins beside PyTorch and goes with one version of it alone.
_OF_TORCH = re.compile(
    r"(torch|triton|sympy|setuptools|nvidia-(?!dali|libnvcomp|nvimgcodec|nvjpeg|nvtiff))"
)


def constraints(torch: str, triton: str) -> str:
    """Return the text of constraints.txt with another PyTorch and another Triton."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if not _OF_TORCH.match(line)]
    if triton.startswith("3.6."):
        # Its interpreter makes numbers of arrays of one element, which NumPy 2.4 refuses.
        kept = [line for line in kept if not line.startswith("numpy==")] + ["numpy<2.4"]
    return "\n".join([*kept, f"torch=={torch}", f"triton=={triton}", ""])


def version(python: str) -> str:
    """Return the version of a Python program, as 3.12.

    Raises:
        OSError: where there is no such program.
    """
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def environment(base: str, torch: str, triton: str) -> Path:
    """Make the virtual environment of one set, or bring it up to date; return its Python.

    An editable install knows the packages that were there when it was made, so it is made each
    time.

    Args:
        base: the Python program that makes it.
    Raises:
        subprocess.CalledProcessError: where pip finds no such release.
    """
    name = f"python-{version(base)}-torch-{torch}-triton-{triton}"
    folder = ROOT / "build" / "matrix" / name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([base, "-m", "venv", folder], check=True)
    pinned = folder / "constraints.txt"
    pinned.write_text(constraints(torch, triton))
    tree = f"{ROOT}[gpu,dali,test,tensorboard,models]"
    words = [python, "-m", "pip", "install", "-q", "-c", pinned, "-e", tree]
    # Two builds in one folder break each other.
    subprocess.run([*words, "-C", f"build-dir={folder / 'native'}"], check=True)
    return python


def run(base: str, torch: str, triton: str, words: list[str]) -> int:
    """Run pytest with one set, print a line, and return pytest's exit status."""
    name = f"{Path(base).name}, torch {torch}, triton {triton}"
    try:
        name = f"python {version(base)}, torch {torch}, triton {triton}"
        python = environment(base, torch, triton)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{name}: not installed ({error})", flush=True)
        return 1
    log = python.parents[1] / "pytest.log"
    with log.open("w") as out:
        done = subprocess.run(
            [python, "-m", "pytest", *words],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
    last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "")
    print(f"{name}: {last} ({log.relative_to(ROOT)})", flush=True)
    return done.returncode


def main() -> int:
    """Run every set that was asked for; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--torch", default=",".join(PAIRS), metavar="VERSION,...")
    parser.add_argument("--triton", metavar="VERSION", help="in place of the pair's own")
    parser.add_argument("--python", default=sys.executable, metavar="PROGRAM,...")
    options, words = parser.parse_known_args()
    words = words or ["-m", "not slow", "-n", "2", "--dist", "loadfile"]
    failed = 0
    for torch in options.torch.split(","):
        triton = options.triton or PAIRS.get(torch)
        if triton is None:
            parser.error(f"which Triton goes with torch {torch}? Say --triton VERSION")
        for python in options.python.split(","):
            failed += run(python, torch, triton, words) != 0
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

"""Stand in for Triton's driver where there is no device: compile kernels, hand launches on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from . import backends


class Launched(NamedTuple):
    """Hold one launch that did not happen.

    Attributes:
        kernel: Triton's compiled kernel; `kernel.asm` has its PTX and the forms before it.
        grid: programs along x, y and z.
        warps: of a program; shared: bytes of shared memory of a program.
        arguments: type in Triton's signature ("*fp32", "i32", "constexpr") and value of each.
    """

    kernel: Any
    grid: tuple[int, int, int]
    warps: int
    shared: int
    arguments: list[tuple[str, Any]]


class _Driver:
    """Answer what Triton asks of a device driver."""

    def __init__(self, arch: str, most_shared: int, launched: Callable[[Launched], None]):
        from triton.backends.compiler import GPUTarget

        self._arch = arch
        self._target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        self._most_shared = most_shared
        self.launched = launched
        self.utils = self

    def get_current_device(self) -> str:
        return self._arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self):
        return self._target

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": self._most_shared}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: str):
        # Module, function, registers, spills, threads allowed in a block. Triton passes the
        # function on to every launch; registers and spills are read from the machine code.
        return cubin, cubin, 0, 0, 1024

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        from triton.runtime import driver

        types = list(source.signature.values())
        arch = self._arch

        def launch(grid_x, grid_y, grid_z, stream, cubin, *rest):
            compiled = source.fn.device_caches[arch][0].values()
            launched = Launched(
                next(k for k in compiled if k.kernel == cubin),
                (grid_x, grid_y, grid_z),
                metadata.num_warps,
                metadata.shared,
                list(zip(types, rest[-len(types) :], strict=True)),
            )
            # A compiled kernel keeps its launcher, and outlives the driver that made it.
            driver.active.launched(launched)

        return launch


@contextlib.contextmanager
def standing_in(
    arch: str, most_shared: int, launched: Callable[[Launched], None]
) -> Iterator[None]:
    """Serve ops by Triton's launchers, compiled for `arch`; call `launched` in place of a launch.

    Args:
        arch: "sm_90".
        most_shared: bytes of shared memory that a program may have.
    """
    from triton.runtime import driver

    from .triton import launch

    before = driver._active
    driver.set_active(_Driver(arch, most_shared, launched))
    launch.recording = True
    try:
        with backends.use("triton"):
            yield
    finally:
        launch.recording = False
        driver._active = before

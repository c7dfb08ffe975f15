"""Execute, on the CPU, what Triton's compiler makes of the kernels.

`machine.execute` runs PTX text on host memory and needs NumPy alone. `driver.executing` runs each
op's own launch code that way. `run.rows` runs all kernels.
"""

from .lanes import Grid
from .machine import execute
from .memory import Fault, GlobalMemory

__all__ = ["Fault", "GlobalMemory", "Grid", "execute"]

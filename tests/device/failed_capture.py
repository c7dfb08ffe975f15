"""Train on a GPU with a step that no graph can hold, and look at what is left: for test_gpu.

python -m tests.device.failed_capture
"""

from __future__ import annotations

import torch

from engine import LocalBall
from engine.device.capture import CudaGraphs

from .test_gpu import DEVICE, assert_close, make, network, train


class Reads(LocalBall):
    """Read a value on the host, which a capture does not allow."""

    def compute(self, *args, **options):
        outcome = super().compute(*args, **options)
        float(outcome.loss)
        return outcome


def main() -> None:
    torch.backends.cudnn.deterministic = True
    before = torch.cuda.current_stream(DEVICE)
    with CudaGraphs(DEVICE) as graphs:
        broken = train(make(network(), recorder=graphs, objective=Reads(global_weight=0.5)))
    assert "the capture failed" in str(broken.why_eager), broken.why_eager
    assert "previous error" not in str(broken.why_eager), broken.why_eager
    assert torch.cuda.current_stream(DEVICE) == before
    assert_close(broken, train(make(network())))


if __name__ == "__main__":
    main()

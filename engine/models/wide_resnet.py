"""WideResNet (Zagoruyko and Komodakis, arXiv 1605.07146), in TRADES' and RobustBench's form."""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from .network import Network


class _Block(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = (
            None
            if channels == out_channels
            else nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        active = self.bn1(x).relu_()
        out = self.conv2(self.bn2(self.conv1(active)).relu_())
        out += x if self.convShortcut is None else self.convShortcut(active)
        return out


class WideResNet(Network):
    """Build a WideResNet of width 10 for any image size (32 in the literature).

    Names and initialisation are RobustBench's. Checkpoints of RobustBench entries with
    `sub_block1=True` (such as Zhang2019Theoretically) hold a block that no forward pass uses.
    Remove
    that block to load a checkpoint:

        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("sub_block1.")})

    Attributes:
        depth: number of layers; a subclass sets it.
    """

    depth: ClassVar[int]

    def __init__(self, in_channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        blocks, widths = (self.depth - 4) // 6, (160, 320, 640)
        channels = 16
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        for number, width in enumerate(widths, start=1):
            first = _Block(channels, width, 1 if number == 1 else 2)
            rest = (_Block(width, width, 1) for _ in range(blocks - 1))
            # The inner name gives the keys of the state dict: block1.layer.0...
            stage = nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))
            self.add_module(f"block{number}", stage)
            channels = width
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def body(self, h: Tensor) -> Tensor:
        for name in ("block1", "block2", "block3"):
            h = self.get_submodule(name)(h)
        return self.fc(self.bn1(h).relu_().mean((2, 3)))


class WideResNet34x10(WideResNet):
    """Build WRN-34-10, the large network of most comparisons."""

    depth = 34


class WideResNet28x10(WideResNet):
    """Build WRN-28-10, the network of the comparisons with extra images."""

    depth = 28

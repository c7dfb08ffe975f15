"""ResNet-18 and pre-activation ResNet-18 for small images: 3x3 stem, no first pooling (He et al.,
arXiv 1512.03385 and 1603.05027). Parameter names are RobustBench's (its `ResNet` and
`PreActResNet`).
"""

from __future__ import annotations

from torch import Tensor, nn

from .network import Network

# Of RobustBench's networks.
_WIDTH = 64


def _conv3x3(channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False)


class _BasicBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out_channels:
            self.shortcut.append(nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return out.relu_()


class _PreActBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = _conv3x3(channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out_channels:
            self.shortcut.append(nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.bn1(x).relu_())
        out = self.conv2(self.bn2(out).relu_())
        # The shortcut starts at x, not at its activation: see `PreActResNet18`.
        out += self.shortcut(x)
        return out


class _Residual18(Network):
    """Hold conv1, four stages of two blocks, the mean over the image, and a linear layer.

    Each stage has twice the channels of the stage before it.
    """

    stages = 4

    def __init__(
        self,
        block: type[_BasicBlock] | type[_PreActBlock],
        in_channels: int,
        classes: int,
        width: int,
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width)
        channels = width
        for stage in range(self.stages):
            wider = width * 2**stage
            first = block(channels, wider, 1 if stage == 0 else 2)
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, block(wider, wider, 1)))
            channels = wider
        self.linear = nn.Linear(channels, classes)

    def body(self, h: Tensor) -> Tensor:
        for number in range(1, self.stages + 1):
            h = self.get_submodule(f"layer{number}")(h)
        return self.linear(h.mean((2, 3)))


class ResNet18(_Residual18):
    """RobustBench's `ResNet18` at width 64; any image size (32 in the literature)."""

    def __init__(
        self, in_channels: int, size: tuple[int, int], classes: int, width: int = _WIDTH
    ) -> None:
        super().__init__(_BasicBlock, in_channels, classes, width)
        self.bn1 = nn.BatchNorm2d(width)

    def body(self, h: Tensor) -> Tensor:
        return super().body(self.bn1(h).relu_())


class PreActResNet18(_Residual18):
    """Hold RobustBench's `PreActResNet(PreActBlock, [2, 2, 2, 2])` at width 64, for any image size.

    Of the variants in use this one takes the shortcut from a block's input and has no batch norm
    before the linear layer, as Wong2020Fast and Andriushchenko2020Understanding.
    Rice2020Overfitting's (`PreActBlockV2`: shortcut from the activated input, final batch norm) is
    another network; its checkpoints have keys `bn.*` and do not load here.
    """

    def __init__(
        self, in_channels: int, size: tuple[int, int], classes: int, width: int = _WIDTH
    ) -> None:
        super().__init__(_PreActBlock, in_channels, classes, width)

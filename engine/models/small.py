"""Small networks for images of 8x8 to 32x32, which train in minutes on a CPU."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from ..errors import EngineError
from .dropout import Dropout
from .flat_linear import FlatLinear
from .network import Network


class Chain(Network):
    """Apply layers one after the other to the stem's output."""

    @property
    def layers(self) -> list[nn.Module]:
        """The layers after the stem, in their order."""
        raise NotImplementedError

    def body(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return h


class TinyCnn(Network):
    """Stack two convolutions and two linear layers, for images of any size.

    The network is meant for scikit-learn's 8x8 digits.
    """

    def __init__(self, in_channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        height, width = ((side + 1) // 2 for side in size)
        self.fc1 = FlatLinear(32 * height * width, 64)
        self.fc2 = nn.Linear(64, classes)

    def body(self, h: Tensor) -> Tensor:
        h = self.conv2(h.relu()).relu()
        return self.fc2(self.fc1(h).relu())


class FastAtMnist(Chain):
    """Build the MNIST network of "Fast is better than free" (Wong, Rice, Kolter, arXiv 2001.03994).

    The original is an nn.Sequential, so the layers' names are numbers. Height and width must be
    divisible by 4.
    """

    stem_name = "0"

    def __init__(self, in_channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        height, width = size
        if height % 4 or width % 4:
            raise EngineError(
                f"fast-at-mnist needs an image size divisible by 4, got {height}x{width}; "
                "pad the images or take tiny-cnn"
            )
        layers = (
            nn.Conv2d(in_channels, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Identity(),  # flattens in the original
            FlatLinear(32 * (height // 4) * (width // 4), 100),
            nn.ReLU(),
            nn.Linear(100, classes),
        )
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.children())[1:]


class SmallCnn(Chain):
    """Build the MNIST network of TRADES (Zhang et al., arXiv 1901.08573), for 16x16 or more.

    The initialisation is the original's: Kaiming-normal convolutions and a last layer of zeros. So
    an untrained network gives every class the same logit, and its first input gradient is zero. In
    training mode, dropout sets half of the units before fc2 to zero.
    """

    stem_name = "feature_extractor.conv1"

    def __init__(self, in_channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        height, width = (((side - 4) // 2 - 4) // 2 for side in size)
        if min(height, width) < 1:
            raise EngineError(
                f"small-cnn needs images of 16x16 or more, got {size[0]}x{size[1]}; take tiny-cnn"
            )
        self.feature_extractor = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, 32, 3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 32, 3),
                # Max-pooling commutes with ReLU, and leaves it a quarter of the elements.
                maxpool1=nn.MaxPool2d(2),
                relu2=nn.ReLU(),
                conv3=nn.Conv2d(32, 64, 3),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(64, 64, 3),
                maxpool2=nn.MaxPool2d(2),
                relu4=nn.ReLU(),
            )
        )
        last = nn.Linear(200, classes)
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=FlatLinear(64 * height * width, 200),
                relu1=nn.ReLU(),
                drop=Dropout(0.5),
                fc2=nn.Linear(200, 200),
                relu2=nn.ReLU(),
                fc3=last,
            )
        )
        for layer in self.feature_extractor:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    @property
    def layers(self) -> list[nn.Module]:
        return [*list(self.feature_extractor)[1:], *self.classifier]

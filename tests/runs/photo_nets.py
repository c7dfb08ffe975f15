"""Two small networks for photographs, as `--import` brings them: one of convolutions, one ViT."""

from __future__ import annotations

import torch
from torch import nn

from engine import models

_PATCH, _WIDTH = 16, 32


@models.register("photo-conv")
def photo_conv(in_channels: int, size: tuple[int, int], classes: int) -> nn.Module:
    """Build three convolutions, each with BatchNorm, and a linear layer."""
    layers: list[nn.Module] = []
    channels = in_channels
    for wider in (8, 16, 32):
        layers += [nn.Conv2d(channels, wider, 5, stride=4, padding=2, bias=False)]
        layers += [nn.BatchNorm2d(wider), nn.ReLU()]
        channels = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


@models.register("photo-vit")
class PhotoVit(nn.Module):
    """Classify images by the mean of two transformer layers over patches of 16x16 pixels."""

    def __init__(self, in_channels: int, size: tuple[int, int], classes: int) -> None:
        super().__init__()
        patches = (size[0] // _PATCH) * (size[1] // _PATCH)
        self.embed = nn.Conv2d(in_channels, _WIDTH, _PATCH, stride=_PATCH)
        self.places = nn.Parameter(0.02 * torch.randn(patches, _WIDTH))
        layer = nn.TransformerEncoderLayer(
            _WIDTH, nhead=2, dim_feedforward=2 * _WIDTH, dropout=0.0, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(_WIDTH, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.layers(tokens).mean(1))

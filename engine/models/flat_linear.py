"""A linear layer on feature maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FlatLinear(nn.Linear):
    """Flatten feature maps and apply a linear layer: [B, C, H, W] to [B, out_features].

    The parameters are those of `nn.Linear` after `nn.Flatten`, in the order of C, H, W. Maps in
    channels_last keep their layout: the layer permutes its weight in place of the maps. So the
    gradient reaches the convolution before it in channels_last as well. After `nn.Flatten` the
    gradient arrives in the other layout, and each layer of the backward pass converts it.
    """

    def forward(self, maps: Tensor) -> Tensor:
        if maps.is_contiguous() or not maps.is_contiguous(memory_format=torch.channels_last):
            return super().forward(maps.flatten(1))
        weight = self.weight.view(-1, *maps.shape[1:]).permute(0, 2, 3, 1)
        return F.linear(maps.permute(0, 2, 3, 1).flatten(1), weight.flatten(1), self.bias)

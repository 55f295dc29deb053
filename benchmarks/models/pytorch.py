# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""The benchmark's models in PyTorch: the same layers, on random parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


def _norm_relu(conv: nn.Conv2d, relu: bool = True) -> nn.Sequential:
    layers = [conv, nn.BatchNorm2d(conv.out_channels)]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """A basic block of 3x3 convs, or with ``expansion`` 4 a bottleneck."""

    def __init__(self, inputs: int, features: int, stride: int, expansion: int):
        super().__init__()
        outputs = features * expansion
        if expansion == 1:
            first = [_norm_relu(_conv(inputs, features, 3, stride))]
            last = _conv(features, outputs, 3)
        else:
            first = [
                _norm_relu(_conv(inputs, features, 1)),
                _norm_relu(_conv(features, features, 3, stride)),
            ]
            last = _conv(features, outputs, 1)
        self.body = nn.Sequential(*first, _norm_relu(last, relu=False))
        self.shortcut = nn.Identity()
        if inputs != outputs or stride > 1:
            conv = _conv(inputs, outputs, 1, stride)
            self.shortcut = _norm_relu(conv, relu=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.shortcut(x) + self.body(x))


def resnet(stages: Sequence[int], expansion: int, width: int = 64) -> nn.Module:
    layers: list[nn.Module] = [
        _norm_relu(nn.Conv2d(3, width, 7, 2, 3, bias=False)),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = width
    for stage, blocks in enumerate(stages):
        features = width << stage
        for index in range(blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(Block(inputs, features, stride, expansion))
            inputs = features * expansion
    return nn.Sequential(*layers, *_head(inputs))


def vgg(stages: Sequence[tuple[int, int]], image: int, hidden: int) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for convs, features in stages:
        for _ in range(convs):
            layers += [nn.Conv2d(inputs, features, 3, padding=1), nn.ReLU()]
            inputs = features
        layers.append(nn.MaxPool2d(2))
    size = inputs * (image >> len(stages)) ** 2
    layers.append(nn.Flatten())
    for _ in range(2):
        layers += [nn.Linear(size, hidden), nn.ReLU()]
        size = hidden
    return nn.Sequential(*layers, nn.Linear(hidden, 1000))


def repvgg(
    stages: Sequence[int], widths: Sequence[int], activation: Callable[[], nn.Module]
) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for blocks, width in zip((1, *stages), (widths[0], *widths), strict=True):
        for index in range(blocks):
            stride = 2 if index == 0 else 1
            layers += [nn.Conv2d(inputs, width, 3, stride, 1), activation()]
            inputs = width
    return nn.Sequential(*layers, *_head(inputs))


def _head(inputs: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]


_A0 = (2, 4, 14, 1), (48, 96, 192, 1280)
_VGG16 = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
# name, as in models.MEASURED -> the pixels per side of an image -> the module
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda image: resnet((2, 2, 2, 2), 1),
    "resnet50": lambda image: resnet((3, 4, 6, 3), 4),
    "vgg16": lambda image: vgg(_VGG16, image, 4096),
    "repvgg_a0": lambda image: repvgg(*_A0, nn.ReLU),
    "repvgg_a0_hard_swish": lambda image: repvgg(*_A0, nn.Hardswish),
}


def build(name: str, image: int) -> nn.Module:
    """Of random parameters that keep activations of order one, for inference."""
    torch.manual_seed(0)
    model = MODELS[name](image).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model.to(memory_format=torch.channels_last)

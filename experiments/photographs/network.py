"""Wide residual networks whose skip connections halve the image by 2x2 convolutions.

Source: Zagoruyko and Komodakis 2016; the 2x2 convolutions: Botev 2020, 5.2.4.
"""

from __future__ import annotations

from torch import Tensor, nn

from laplace_kf.reports import private_rng

__all__ = ["Residual", "wide_residual"]


class Residual(nn.Module):
    """Two 3x3 convolutions, each after normalisation and ReLU, added to the input or to a convolution of it.

    Args:
        fan_in, fan_out: channels.
        stride: 1, or 2 to halve the image; the skip connection then is a 2x2 convolution, without overlap, so that
            unlike a 1x1 one it sees every pixel.
        dropout: rate between the convolutions; 0 for none.
    """

    def __init__(self, fan_in: int, fan_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.BatchNorm2d(fan_in), nn.ReLU())
        middle = [nn.Dropout(dropout)] if dropout else []
        self.body = nn.Sequential(
            nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU(),
            *middle, nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False),
        )  # fmt: skip
        same = stride == 1 and fan_in == fan_out
        self.skip = None if same else nn.Conv2d(fan_in, fan_out, stride, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, fan_in, S, S)`` to ``(N, fan_out, S / stride, S / stride)``."""
        active = self.start(x)
        return self.body(active) + (x if self.skip is None else self.skip(active))


def wide_residual(classes: int, *, blocks: int, factor: int, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Three groups of ``blocks`` residual blocks with 16, 32 and 64 times ``factor`` channels, for RGB images.

    Args:
        classes: outputs.
        blocks: repetitions in each group.
        factor: of the widths.
        dropout: rate inside of every block; 0 leaves the dropout modules out.
        seed: decides the initial weights (normal, scaled by fan-out).
    """
    with private_rng(seed):
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
        width = 16
        for group in range(3):
            for block in range(blocks):
                wider = 16 * 2**group * factor
                layers.append(Residual(width, wider, 2 if group and not block else 1, dropout))
                width = wider
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
        model = nn.Sequential(*layers)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model

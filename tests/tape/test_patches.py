"""Patches of images, gathered in either order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from laplace_kf.layers import conv


@pytest.mark.parametrize("channels", [3, 32, 40])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_patches_are_those_of_unfold(channels: int, stride: int, dilation: int) -> None:
    x = torch.randn(2, channels, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = F.pad(x, (1, 0, 2, 1)).contiguous()
    found = conv.patches(x, (3, 2), (stride, stride), (dilation, dilation))
    expected = F.unfold(x, (3, 2), dilation, 0, stride).transpose(1, 2)
    assert found.is_contiguous() and found.shape[2:] == (channels, 6)
    assert torch.equal(found.flatten(2), expected)


@pytest.mark.parametrize("sizes", [(7,), (5, 6), (4, 5, 3)])
def test_both_orders_give_the_same_in_every_dimension(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5, *sizes, generator=torch.Generator().manual_seed(0))
    given = (2,) * len(sizes), (1,) * len(sizes), (1,) * len(sizes)
    one = conv.patches(x, *given)
    turned: list[int] = []
    monkeypatch.setattr(conv, "CHANNELS_LAST", 5)
    monkeypatch.setattr(torch.Tensor, "movedim", _counted(turned))
    assert torch.equal(one, conv.patches(x, *given)) and turned


def _counted(calls: list[int]):
    original = torch.Tensor.movedim

    def movedim(self: torch.Tensor, *given: int) -> torch.Tensor:
        calls.append(1)
        return original(self, *given)

    return movedim

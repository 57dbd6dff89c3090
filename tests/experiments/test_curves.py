"""The CURVES generator: its curves go where they must, its strokes have the stated profile, seeds decide."""

import math

import pytest
import torch

from experiments.autoencoders.curves import MARGIN, SIDE, WIDTH, curves, points_on, render


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_a_curve_passes_its_three_points_in_order():
    points = torch.rand(5, 3, 2, generator=seeded(0), dtype=torch.float64)
    way = points_on(points, 9)
    torch.testing.assert_close(way[:, [0, 4, 8]], points)


def test_a_curve_is_a_parabola():
    way = points_on(torch.rand(5, 3, 2, generator=seeded(1), dtype=torch.float64), 12)
    third = way[:, 3:] - 3 * way[:, 2:-1] + 3 * way[:, 1:-2] - way[:, :-3]
    assert float(third.abs().max()) < 1e-12
    assert float((way[:, 2:] - 2 * way[:, 1:-1] + way[:, :-2]).abs().max()) > 1e-3


def test_a_straight_stroke_has_the_stated_profile():
    # along y = 14, between rows: distances of the rows' centres are 0.5, 1.5, ...
    image = render(torch.tensor([[[6.0, 14.0], [14.0, 14.0], [22.0, 14.0]]])).reshape(SIDE, SIDE)
    depth = [min(1.0, max(0.0, WIDTH / 2 + 0.5 - distance)) for distance in (0.5, 1.5)]
    assert depth == [1.0, 0.0]
    middle = image[:, 10]
    assert middle[13] == middle[14] == 1.0 and middle[12] == middle[15] == 0.0
    # half a pixel lower the middle of the stroke is on a row's centre, and both neighbours are half grey
    lower = render(torch.tensor([[[6.0, 14.5], [14.0, 14.5], [22.0, 14.5]]])).reshape(SIDE, SIDE)[:, 10]
    torch.testing.assert_close(lower[12:17], torch.tensor([0.0, 0.5, 1.0, 0.5, 0.0]))


def test_pixels_are_as_dark_as_their_distance_says():
    points = torch.tensor([[[6.0, 7.0], [20.0, 9.0], [15.0, 21.0]]], dtype=torch.float64)
    image = render(points, segments=200).reshape(SIDE, SIDE)
    way = points_on(points, 20_001)[0]
    for row, column in [(7, 6), (9, 19), (12, 20), (20, 15), (3, 3), (16, 19), (8, 12)]:
        gaps = way - torch.tensor([column + 0.5, row + 0.5], dtype=torch.float64)
        nearest = math.sqrt(float(gaps.square().sum(-1).min()))
        assert float(image[row, column]) == (pytest.approx(min(1.0, max(0.0, WIDTH / 2 + 0.5 - nearest)), abs=1e-3))


def test_the_pieces_of_a_curve_are_short_enough():
    points = MARGIN + (SIDE - 2 * MARGIN) * torch.rand(50, 3, 2, generator=seeded(2))
    assert float((render(points) - render(points, segments=256)).abs().max()) < 0.12
    assert float((render(points) - render(points, segments=256)).abs().mean()) < 1e-3


def test_images_are_decided_by_the_seed_and_stay_inside():
    images = curves(600, seeded(3))
    assert images.shape == (600, 784) and images.dtype == torch.float32
    assert torch.equal(images, curves(600, seeded(3)))
    assert not torch.equal(images, curves(600, seeded(4)))
    assert float(images.min()) == 0.0 and float(images.max()) == 1.0
    square = images.reshape(-1, SIDE, SIDE)
    assert max(float(square[:, edge].max()) for edge in (0, -1)) == 0.0
    assert float(square[:, :, [0, -1]].max()) == 0.0
    assert bool((images.sum(1) > 3).all()), "every image has a stroke"
    grey = ((images > 0) & (images < 1)).float().mean()
    assert 0.02 < float(grey) < 0.2

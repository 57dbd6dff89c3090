"""The FACES generator: turned, enlarged and reduced as stated, and split by people."""

from __future__ import annotations

import pytest
import torch

from experiments.autoencoders import faces
from experiments.autoencoders import run as autoencoders


def one(rotation, scale):
    return torch.tensor([[rotation, scale]])


def test_pairs_are_in_the_published_ranges():
    found = faces.pairs(2000, torch.Generator().manual_seed(0))
    rotations, scales = found.T
    assert -90 <= rotations.min() < -88 and 88 < rotations.max() <= 90
    assert 1.4 <= scales.min() < 1.41 and 1.79 < scales.max() <= 1.8
    assert torch.equal(found, faces.pairs(2000, torch.Generator().manual_seed(0)))


def test_a_photograph_is_enlarged_around_its_middle():
    """A ramp from left to right stays a ramp, and ``scale`` of it is cut away."""
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    image = faces.augmented(ramp, one(0.0, 1.6)).view(25, 25)
    torch.testing.assert_close(image, image[:1].expand(25, 25), rtol=0, atol=1e-5)
    centres = (torch.arange(25) + 0.5) / 25 - 0.5  # of pixels, in widths of the crop
    expected = 0.5 + centres / 1.6 * 64 / 63
    torch.testing.assert_close(image[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rotation", [90.0, -90.0])
def test_a_quarter_turn_is_a_transposition(rotation):
    photograph = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    upright = faces.augmented(photograph, one(0.0, 1.5)).view(2, 25, 25)
    turned = faces.augmented(photograph, one(rotation, 1.5)).view(2, 25, 25)
    quarter = torch.rot90(upright, 1 if rotation > 0 else -1, (1, 2))
    other = torch.rot90(upright, -1 if rotation > 0 else 1, (1, 2))
    distances = [float((turned - way).abs().max()) for way in (quarter, other)]
    assert min(distances) < 1e-4 < 0.1 < max(distances)


def test_what_is_reduced_does_not_alias():
    """A chequerboard of single pixels becomes grey."""
    rows = torch.arange(64)
    board = ((rows[:, None] + rows) % 2).float().view(1, 1, 64, 64)
    image = faces.augmented(board, one(0.0, 1.4))
    assert float((image - 0.5).abs().mean()) < 0.2


def test_the_people_of_the_test_are_not_in_training(monkeypatch):
    people = (torch.arange(400) // 10).float().view(400, 1, 1, 1).expand(400, 1, 64, 64) / 40
    monkeypatch.setattr(autoencoders.data, "images", lambda name, split: (people, None))
    monkeypatch.setattr(faces, "PAIRS", 2)
    train, test = autoencoders.PROBLEMS["faces"].load(0)
    assert train.shape == (500, 625) and test.shape == (200, 625)
    assert set((train.mean(1) * 40).round().int().tolist()) == set(range(25))
    assert set((test.mean(1) * 40).round().int().tolist()) == set(range(30, 40))
    assert autoencoders.PROBLEMS["faces"].widths[0] == faces.SIDE**2 == 625

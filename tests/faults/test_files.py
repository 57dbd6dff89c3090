"""A file that was cut, altered or never one of ours is refused by name, and nothing else happens."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import laplace_kf as lk
from laplace_kf import files
from tests.cases import rng
from tests.test_unchanged import data, make


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "posterior"
    lk.LaplacePosterior(make(), "categorical").fit(data(), generator=rng(0)).save(path)
    return path


def mutated(content: bytes, chance: random.Random) -> bytes:
    """One of: a bit flipped, a byte replaced, a stretch cut out, repeated or zeroed, the end cut off or added to."""
    found, at = bytearray(content), chance.randrange(len(content))
    length = chance.randrange(1, 64)
    kind = chance.randrange(7)
    if kind == 0:
        found[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        found[at] = chance.randrange(256)
    elif kind == 2:
        del found[at : at + length]
    elif kind == 3:
        found[at:at] = found[at : at + length]
    elif kind == 4:
        found[at : at + length] = bytes(len(found[at : at + length]))
    elif kind == 5:
        del found[at:]
    else:
        found += bytes(chance.randrange(256) for _ in range(length))
    return bytes(found)


def test_altered_files_are_refused(whole: Path, tmp_path: Path) -> None:
    content, chance = whole.read_bytes(), random.Random(0)
    tensors, header = files.read(whole, files.POSTERIOR)
    path, refused = tmp_path / "altered", 0
    for number in range(1_000):
        path.write_bytes(found := mutated(content, chance))
        try:
            others, told = files.read(path, files.POSTERIOR)
        except lk.errors.CorruptFile:
            refused += 1
            continue
        # What can still be read says the same: the bytes did not change, or only JSON's white space did.
        assert told == header, number
        assert others.keys() == tensors.keys() and all(torch.equal(others[k], tensors[k]) for k in tensors), number
        assert found == content or len(found) >= len(content), number
    assert refused > 950


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 200])
def test_what_a_killed_copy_leaves(whole: Path, tmp_path: Path, length: int) -> None:
    path = tmp_path / "short"
    path.write_bytes(whole.read_bytes()[:length])
    with pytest.raises(lk.errors.CorruptFile, match="short"):
        lk.LaplacePosterior.load(path, make())


def test_a_header_of_many_gigabytes_is_not_believed(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "long"
    for claimed in (2**31, 2**40, 2**63):
        path.write_bytes(struct.pack("<Q", claimed) + whole.read_bytes()[8:])
        with pytest.raises(lk.errors.CorruptFile):
            lk.LaplacePosterior.load(path, make())


def test_foreign_files(whole: Path, tmp_path: Path) -> None:
    """Pickles are not opened: what they would run does not run."""
    marker, path = tmp_path / "ran", tmp_path / "foreign"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (marker,))  # type: ignore[return-value]

    torch.save(Trap(), path)
    with pytest.raises(lk.errors.CorruptFile):
        lk.LaplacePosterior.load(path, make())
    assert not marker.exists()
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(lk.errors.CorruptFile, match="not one of a laplace_kf posterior"):
        lk.LaplacePosterior.load(path, make())


def rewritten(whole: Path, path: Path, **changes: object) -> None:
    """A file with a true checksum whose header says something else."""
    tensors, header = files.read(whole, files.POSTERIOR)
    files.write(path, tensors, json.loads(json.dumps({**header, **changes})), files.POSTERIOR)


@pytest.mark.parametrize(
    "changes",
    [
        {"structure": "unheard-of"},
        {"estimator": "unheard-of"},
        {"damping": "unheard-of"},
        {"likelihood": {"name": "unheard-of"}},
        {"method": "unheard-of"},
        {"n_data": -1.0},
        {"prior_precision": -1.0},
        {"statistics": {}},
        {"options": {"unheard-of": 1}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_headers_that_say_what_cannot_be(whole: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "edited"
    rewritten(whole, path, **changes)
    with pytest.raises(lk.errors.LaplaceKFError):
        lk.LaplacePosterior.load(path, make())


def test_tensors_that_do_not_fit_their_header(whole: Path, tmp_path: Path) -> None:
    tensors, header = files.read(whole, files.POSTERIOR)
    path = tmp_path / "edited"
    for name, tensor in tensors.items():
        for other in (None, tensor.flatten()[:-1].clone() if tensor.numel() > 1 else torch.ones(3)):
            kept = {k: v for k, v in tensors.items() if k != name}
            files.write(path, kept if other is None else {**kept, name: other}, header, files.POSTERIOR)
            with pytest.raises(lk.errors.LaplaceKFError):
                lk.LaplacePosterior.load(path, make())

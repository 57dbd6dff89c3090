"""A file that was cut, altered or never one of ours is refused by name, and nothing else happens."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import laplace_kf as lk
from laplace_kf import files
from laplace_kf.evaluate import read_file
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


def nowhere(folder: Path) -> dict[str, tuple[object, type[Exception], str]]:
    """Paths that cannot be written to or read from: how they are refused to a writer, and with which words."""
    (folder / "file").write_text("")
    (folder / "folder").mkdir()
    missing, errors = folder / "none" / "x", lk.errors
    return {
        "no folder": (missing, errors.MissingFile, f"os.makedirs({str(missing.parent)!r}, exist_ok=True)"),
        "a folder": (folder / "folder", errors.UnusableFile, "is a folder"),
        "inside a file": (str(folder / "file" / "x"), errors.UnusableFile, "is a file"),
        "no path": (None, errors.InvalidType, "got NoneType"),
        "bytes": (b"x", errors.InvalidType, "got bytes"),
        "open file": (io.BytesIO(), errors.InvalidType, "got BytesIO"),
    }


def writers(posterior: lk.LaplacePosterior) -> dict[str, Callable[[Any], object]]:
    scores = lk.attribution.Attribution([posterior])
    scores.influence(data(), data())
    return {
        "posterior": posterior.save,
        "mixture": lk.Mixture([posterior]).save,
        "attribution": scores.save,
        "fit": lambda path: lk.LaplacePosterior(make(), "categorical").fit(data(), checkpoint=path),
        "tune": lambda path: posterior.tune(data(), checkpoint=path),
    }


def test_every_writer_refuses_a_path_by_name(whole: Path, tmp_path: Path) -> None:
    posterior = lk.LaplacePosterior.load(whole, make())
    for name, (path, kind, words) in nowhere(tmp_path).items():
        for writer, write in writers(posterior).items():
            if path is None and writer in {"fit", "tune"}:  # no checkpoint
                continue
            with pytest.raises(kind) as caught:
                write(path)
            assert isinstance(caught.value, lk.errors.LaplaceKFError)
            assert words in str(caught.value), (writer, name, str(caught.value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"] and not any(
        (tmp_path / "folder").iterdir()
    )


def test_every_reader_refuses_a_path_by_name(tmp_path: Path) -> None:
    readers: dict[str, Callable[[Any], object]] = {
        "posterior": lambda path: lk.LaplacePosterior.load(path, make()),
        "mixture": lambda path: lk.Mixture.load(path, [make()]),
        "attribution": lk.attribution.Attribution.load,
        "command": read_file,
    }
    cases = nowhere(tmp_path)
    cases["no folder"] = (*cases["no folder"][:2], "no ")
    cases["inside a file"] = (tmp_path / "file" / "x", lk.errors.MissingFile, "no ")
    for name, (path, kind, words) in cases.items():
        for reader, read in readers.items():
            with pytest.raises(kind) as caught:
                read(path)
            assert isinstance(caught.value, lk.errors.LaplaceKFError)
            assert words in str(caught.value), (reader, name, str(caught.value))
    with pytest.raises(lk.errors.MissingFile, match="looked for in"):
        lk.LaplacePosterior.load("p.safetensors", make())


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")])
def test_what_the_system_refuses_names_the_path(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    posterior, target = lk.LaplacePosterior.load(whole, make()), tmp_path / "kept"
    target.write_bytes(whole.read_bytes())

    def refuse(*_: object, **__: object) -> None:
        raise error

    for broken in ("save_file", "os.replace", "Path.touch"):
        with monkeypatch.context() as now:
            now.setattr(f"laplace_kf.files.{broken}", refuse)
            with pytest.raises(lk.errors.UnusableFile, match=f"kept cannot be written: {error.strerror}"):
                posterior.save(target)
        assert target.read_bytes() == whole.read_bytes() and [path.name for path in tmp_path.iterdir()] == ["kept"]
    with monkeypatch.context() as now:
        now.setattr("pathlib.Path.open", refuse)
        with pytest.raises(lk.errors.UnusableFile, match=f"kept cannot be read: {error.strerror}"):
            lk.LaplacePosterior.load(target, make())
        (tmp_path / "x.pt").touch()
        with pytest.raises(lk.errors.UnusableFile, match=f"x.pt cannot be read: {error.strerror}"):
            read_file(tmp_path / "x.pt")

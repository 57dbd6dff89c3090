"""Reading data sets: images, regression tables and text.

Images come as float32 in [0, 1], shaped ``(N, 1, 28, 28)`` or ``(N, 3, 32, 32)``; labels as int64. Where the files
are looked for is said in :mod:`experiments.common.files`.
"""

from __future__ import annotations

import functools
import gzip
import io
import lzma
import math
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io.matlab import MatReadError, loadmat
from torch import Tensor

from experiments.common.files import DATA_SETS, MissingData, fetch, folders, locate
from laplace_kf.errors import CorruptFile, UnknownName
from laplace_kf.registry import Registry
from laplace_kf.reports import missing_extra

__all__ = [
    "DATA_SETS",
    "IMAGE_SETS",
    "MissingData",
    "Regression",
    "fetch",
    "images",
    "regression",
    "splits",
    "tables",
    "text",
]


def images(name: str, split: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a data set.

    Args:
        name: ``mnist``, ``fashion-mnist``, ``notmnist``, ``svhn``, ``cifar10``, ``cifar100`` (fine labels), ``digits``,
            ``olivetti`` (labels are people).
        split: ``train`` or ``test`` (``digits`` and ``olivetti`` have ``train`` only, ``notmnist`` has ``test`` only).

    Returns:
        Images ``(N, 1, 28, 28)``, ``(N, 3, 32, 32)``, ``(N, 1, 8, 8)`` or ``(N, 1, 64, 64)``, float32 in [0, 1], and
        int64 labels ``(N,)``, in the original order. CIFAR-100's provided training file holds the first 10,000 images
        only.

    Raises:
        UnknownName: for a name or split that is not listed above.
        MissingData: if a file is not there.
        CorruptFile: if a file is not of the expected format.
    """
    reader = IMAGE_SETS[name]
    if split not in splits(name):
        raise UnknownName(f"split of data set {name!r}:", split, splits(name))
    pixels, labels = reader(name, split)
    scaled = torch.from_numpy(pixels.astype(np.float32)).div_(16 if name == "digits" else 255)
    return scaled, torch.from_numpy(labels.astype(np.int64))


def splits(name: str) -> tuple[str, ...]:
    """The splits that :func:`images` knows of a data set."""
    return {"digits": ("train",), "olivetti": ("train",), "notmnist": ("test",)}.get(name, ("train", "test"))


Pixels: TypeAlias = NDArray[np.uint8]


def _idx(name: str, split: str) -> tuple[Pixels, Pixels]:
    prefix = {"train": "train", "test": "t10k"}[split]
    pixels = _read_idx(locate(f"{name}/{prefix}-images-idx3-ubyte.gz", name))
    labels = _read_idx(locate(f"{name}/{prefix}-labels-idx1-ubyte.gz", name))
    return pixels[:, None], labels


def _read_idx(path: Path) -> Pixels:
    """A gzip-compressed IDX file of unsigned bytes: zeros, type 8, rank, big-endian sizes, row-major values."""
    try:
        found = path.stat()
    except OSError as error:
        raise CorruptFile(f"{path.name} is not a gzip-compressed IDX file: {error}") from error
    return _read_idx_once(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=4)  # the images and labels of two splits, as bytes: runs of several seeds read them again
def _read_idx_once(path: Path, _changed: int, _size: int) -> Pixels:
    """The contents of a file as it was last changed; nobody writes into them."""
    try:
        raw = gzip.decompress(path.read_bytes())
        zeros, kind, rank = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise CorruptFile(f"{path.name} is not a gzip-compressed IDX file: {error}") from error
    if (zeros, kind) != (0, 8) or len(raw) != 4 + 4 * rank + math.prod(shape):
        raise CorruptFile(f"{path.name} is not an IDX file of unsigned bytes, or it is cut short.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


@dataclass(frozen=True)
class _CifarPart:
    """Where one split is: files of the original archive (or its unpacked folder), or losslessly coded npz files."""

    archive: str
    records: tuple[str, ...]
    coded: tuple[str, ...]
    label_bytes: int


_FIVE = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR_PARTS = {
    ("cifar10", "train"): _CifarPart("cifar-10-binary", tuple(f"cifar-10-batches-bin/{part}.bin" for part in _FIVE),
                                     tuple(f"cifar10/{part}.npz" for part in _FIVE), 1),
    ("cifar10", "test"): _CifarPart("cifar-10-binary", ("cifar-10-batches-bin/test_batch.bin",),
                                    ("cifar10/test_batch.npz",), 1),
    ("cifar100", "train"): _CifarPart("cifar-100-binary", ("cifar-100-binary/train.bin",),
                                      ("cifar100/train_first_10000.npz",), 2),
    ("cifar100", "test"): _CifarPart("cifar-100-binary", ("cifar-100-binary/test.bin",), ("cifar100/test.npz",), 2),
}  # fmt: skip


def _cifar(name: str, split: str) -> tuple[Pixels, Pixels]:
    part = _CIFAR_PARTS[name, split]
    if _all_present(part.records):
        parts = [_records((locate(path, name)).read_bytes(), path, part.label_bytes) for path in part.records]
    elif _all_present(part.coded):
        parts = [_read_coded(locate(path, name)) for path in part.coded]
    else:
        archive = locate(f"{part.archive}.tar.gz", name)
        try:
            with tarfile.open(archive) as members:
                raw = [(members.extractfile(path) or io.BytesIO()).read() for path in part.records]
        except (OSError, EOFError, KeyError, zlib.error, tarfile.TarError) as error:
            raise CorruptFile(f"{archive.name} is not the archive of {name}: {error}") from error
        parts = [_records(content, path, part.label_bytes) for content, path in zip(raw, part.records, strict=True)]
    pixels, labels = zip(*parts, strict=True)
    return np.concatenate(pixels), np.concatenate(labels)


def _all_present(paths: tuple[str, ...]) -> bool:
    return all(any((folder / path).is_file() for folder in folders()) for path in paths)


def _records(content: bytes, path: str, label_bytes: int) -> tuple[Pixels, Pixels]:
    """The binary version of CIFAR: per image its label bytes (the last is the fine label) and 3072 pixel bytes."""
    size = label_bytes + 3 * 32 * 32
    if not content or len(content) % size:
        raise CorruptFile(f"{path} has {len(content)} bytes, not a multiple of {size}: it is cut short.")
    rows = np.frombuffer(content, np.uint8).reshape(-1, size)
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1]


def _read_coded(path: Path) -> tuple[Pixels, Pixels]:
    """CIFAR images stored as residuals ``(3, N, 32, 32)`` of the planes G, R-G, B-G to their LOCO-I prediction."""
    try:
        with np.load(path) as part:
            residual, labels = part["residual"], part["labels" if "labels" in part.files else "fine_labels"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, lzma.LZMAError) as error:
        raise CorruptFile(f"{path.name} is not a coded CIFAR file: {error}") from error
    coded = np.ascontiguousarray(residual.transpose(2, 3, 0, 1)).astype(np.int16)
    plane = np.zeros_like(coded)
    for i, j in np.ndindex(*coded.shape[:2]):
        left = plane[i, j - 1] if j else 0
        up = plane[i - 1, j] if i else 0
        if i and j:  # the median of left, up and left + up - corner
            guess = np.clip(left + up - plane[i - 1, j - 1], np.minimum(left, up), np.maximum(left, up))
        else:
            guess = left if j else up
        plane[i, j] = (coded[i, j] + guess) & 255
    green, red, blue = plane.astype(np.uint8).transpose(2, 3, 0, 1)
    return np.stack([green + red, green, green + blue], axis=1), labels


def _matlab(name: str, split: str) -> tuple[Pixels, Pixels]:
    """The cropped house numbers: ``X`` (32, 32, 3, N), and ``y`` (N, 1) in which 10 stands for the digit 0."""
    pixels, labels = _fields(locate(f"{name}/{split}_32x32.mat", name), "cropped house numbers", "X", "y")
    return np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)), labels[:, 0] % 10


def _fields(path: Path, of: str, *names: str) -> list[Pixels]:
    """Arrays of a MATLAB file by name."""
    try:
        found = loadmat(path)
        return [found[name] for name in names]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error, MatReadError) as error:
        raise CorruptFile(f"{path.name} is not a file of {of}: {error}") from error


def _faces(name: str, split: str) -> tuple[Pixels, Pixels]:
    """Ten photographs of each of 40 people; ``faces`` (4096, 400) holds one a column, columns of pixels first."""
    path = locate(f"{name}/olivettifaces.mat", name)
    (pixels,) = _fields(path, "photographs of faces", "faces")
    if pixels.shape != (64 * 64, 400):
        raise CorruptFile(f"{path.name} holds faces {pixels.shape}, not (4096, 400)")
    upright = pixels.T.reshape(400, 1, 64, 64).transpose(0, 1, 3, 2)
    return np.ascontiguousarray(upright), np.repeat(np.arange(40, dtype=np.uint8), 10)


def _bundled_digits(name: str, split: str) -> tuple[Pixels, Pixels]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("scikit-learn") from error
    data = load_digits()
    return data.images[:, None].astype(np.uint8), data.target.astype(np.uint8)


IMAGE_SETS: Registry[Callable[[str, str], tuple[Pixels, Pixels]]] = Registry("image data set")
for _name in ("mnist", "fashion-mnist", "notmnist"):
    IMAGE_SETS.register(_name)(_idx)
for _name in ("cifar10", "cifar100"):
    IMAGE_SETS.register(_name)(_cifar)
IMAGE_SETS.register("svhn")(_matlab)
IMAGE_SETS.register("olivetti")(_faces)
IMAGE_SETS.register("digits")(_bundled_digits)


@dataclass(frozen=True)
class Regression:
    """A regression table: ``features (N, D)``, ``target (N, 1)`` (float64, not normalised) and its index splits."""

    features: Tensor
    target: Tensor
    splits: tuple[tuple[Tensor, Tensor], ...]


def tables() -> list[str]:
    """Names of the UCI regression sets."""
    return [Path(file.path).stem for file in DATA_SETS["uci-regression"].files]


def regression(name: str) -> Regression:
    """A UCI regression set with its standard train-test splits, by file name (``yacht``, ``concrete``, ...).

    Raises:
        UnknownName: lists the sets.
        MissingData: if its file is not there.
    """
    if name not in tables():
        raise UnknownName("UCI regression set", name, tables())
    path = locate(f"uci-regression/{name}.npz", "uci-regression")
    try:
        with np.load(path) as table:
            data = torch.from_numpy(table["data"])
            rows = [[torch.from_numpy(table[f"index_{part}_{i}"]).long() for part in ("train", "test")]
                    for i in range(table["n_splits"].item())]  # fmt: skip
            columns = [torch.from_numpy(table[f"index_{part}"]).long() for part in ("features", "target")]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CorruptFile(f"{path.name} is not a regression table: {error}") from error
    return Regression(data[:, columns[0]], data[:, columns[1]], tuple((train, test) for train, test in rows))


def text() -> str:
    """Tiny Shakespeare, one string of 1,115,394 characters.

    Raises:
        MissingData: if the file is not there.
    """
    return locate("tinyshakespeare/input.txt", "tinyshakespeare").read_text(encoding="utf-8")

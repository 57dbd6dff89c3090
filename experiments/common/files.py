"""Data sets by name: where their files are, and what they must contain. :mod:`experiments.common.data` reads them.

A file is looked for in the folder that ``$LAPLACE_KF_DATA`` names, then in the user cache. Nothing is downloaded
unless asked for (``python -m experiments data fetch NAME``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from laplace_kf.errors import LaplaceKFError
from laplace_kf.registry import Registry
from laplace_kf.reports import missing_extra

__all__ = ["DATA_SETS", "DataSet", "File", "MissingData", "fetch", "folders", "locate"]

ROOT_VARIABLE = "LAPLACE_KF_DATA"


class MissingData(LaplaceKFError, FileNotFoundError):
    """A data file that is in none of the folders looked at, or could not be downloaded; says how to provide it."""


@dataclass(frozen=True)
class File:
    """One file of a data set: its path inside the data folder, sha256, and public address (empty: there is none)."""

    path: str
    sha256: str
    url: str = ""


@dataclass(frozen=True)
class DataSet:
    """A data set: its title, its files, and remarks that belong into every result that uses it."""

    title: str
    files: tuple[File, ...]
    remark: str = ""


def _idx_files(folder: str, base: str, hashes: dict[str, str]) -> tuple[File, ...]:
    return tuple(File(f"{folder}/{name}-ubyte.gz", sha, f"{base}/{name}-ubyte.gz") for name, sha in hashes.items())


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
_FASHION = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"
_LETTERS = "https://github.com/davidflanagan/notMNIST-to-MNIST/raw/17823f4d4a3acd8317c07866702d2eb2ac79c7a0"
_CIFAR = "https://www.cs.toronto.edu/~kriz"
_SHAKESPEARE = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"

DATA_SETS: Registry[DataSet] = Registry("data set")
for _name, _data_set in {
    "mnist": DataSet(
        "MNIST handwritten digits",
        _idx_files("mnist", _MNIST, {
            "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        }),
    ),
    "fashion-mnist": DataSet(
        "Fashion-MNIST clothes",
        _idx_files("fashion-mnist", _FASHION, {
            "train-images-idx3": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        }),
    ),
    "notmnist": DataSet(
        "notMNIST letters A to J",
        _idx_files("notmnist", _LETTERS, {
            "t10k-images-idx3": "70ae9e06201f2827e5b0a3781a3169d735dd2efc69996b9eeaee7f10ed4044d7",
            "t10k-labels-idx1": "1fa03836e01c862542f8eb83463bb951bebec6fcb3efa28dad748c6b38a9021b",
        }),
        "test part only: 1,000 images of each letter sampled from the hand-cleaned notMNIST_small",
    ),
    "svhn": DataSet(
        "SVHN cropped house numbers (ufldl.stanford.edu/housenumbers)",
        tuple(File(f"svhn/{split}_32x32.mat", sha) for split, sha in {
            "train": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            "test": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        }.items()),
    ),
    "olivetti": DataSet(
        "Olivetti faces, 1992 to 1994 (AT&T Laboratories Cambridge)",
        (File("olivetti/olivettifaces.mat", "b1988d02c72fe5b8ee82b5ef3bb7982eafc74f1e1ff0ae0ade35061ad0af534d"),),
    ),
    "cifar10": DataSet(
        "CIFAR-10 photographs",
        (File("cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
              f"{_CIFAR}/cifar-10-binary.tar.gz"),),
    ),
    "cifar100": DataSet(
        "CIFAR-100 photographs",
        (File("cifar-100-binary.tar.gz", "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
              f"{_CIFAR}/cifar-100-binary.tar.gz"),),
    ),
    "uci-regression": DataSet(
        "nine UCI regression sets with 20 splits (protein: 5), one npz file each",
        tuple(File(f"uci-regression/{name}.npz", sha) for name, sha in {
            "bostonHousing": "20ef76bfb2a3224af581fbc383e9a62a56d83f8936196ea99128a31c7121fd60",
            "concrete": "67ab31b0d6a78f6ef7636ab35630b5da6a53ce22ab8d4cfb231c5f602cecf42a",
            "energy": "f8b116be45bf31f45a936b581c71050acb02fc86e6e657134f92c4f821b0eec2",
            "kin8nm": "7ac8a199b4b1d1ea98b95dcf6b3c2de9fda3fed50230aaab22bb3f57eaba1281",
            "naval-propulsion-plant": "e4ace4794ddf44b493005e85fcaf54953fb24407fec11ca5d41c81e8adb9f5a1",
            "power-plant": "0ae937c1d50f1228352ee41d5bf3e6409dbd790b48b03fad62f4f8e3358e33a7",
            "protein-tertiary-structure": "2fff6061a2809935075780a45dadc435707840982401888ca3c7ebab7f3b51fb",
            "wine-quality-red": "4aa7cfa3d3a57d9e55b67fa609909c91bf5f8cd9fe212977f65369a24f6b9db8",
            "yacht": "c0bd9ae82a489d852b8df6fe27c22fb6b209b9ee2732a7a4c37043bb00322d25",
        }.items()),
    ),
    "tinyshakespeare": DataSet(
        "tiny Shakespeare, 1.1 million characters",
        (File("tinyshakespeare/input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
              _SHAKESPEARE),),
    ),
    "digits": DataSet("8x8 handwritten digits that come with scikit-learn", ()),
}.items():  # fmt: skip
    DATA_SETS.register(_name)(_data_set)


def folders() -> list[Path]:
    """The folders that are searched, in order: ``$LAPLACE_KF_DATA`` if it is set, then the user cache."""
    named = os.environ.get(ROOT_VARIABLE)
    return [*([Path(named).expanduser()] if named else []), _cache()]


def _cache() -> Path:
    return Path(_pooch().os_cache("laplace_kf"))


def _pooch() -> ModuleType:
    try:
        import pooch
    except ImportError as error:
        raise missing_extra(error.name) from error
    return pooch


def locate(path: str, name: str) -> Path:
    """The first existing file ``path`` of data set ``name``.

    Raises:
        MissingData: if no folder has it; names the folders and the command or the file that provides it.
    """
    for folder in folders():
        if (folder / path).is_file():
            return folder / path
    raise MissingData(_advice(path, name))


def _advice(path: str, name: str) -> str:
    """Where ``path`` was looked for, and how to provide it."""
    listed = " or ".join(str(folder) for folder in folders())
    variable = "" if os.environ.get(ROOT_VARIABLE) else f" (${ROOT_VARIABLE} can name another folder; it is not set)"
    if any(file.path == path and file.url for file in DATA_SETS[name].files):
        way = f"Run 'python -m experiments data fetch {name}', or place the file {path} in"
    else:
        way = f"There is no public address for it in this form: place the file {path} in"
    return f"Data set {name!r}: {path} was not found. {way} {listed}{variable}."


def fetch(name: str) -> list[Path]:
    """Download the public originals of a data set into the user cache, checked by sha256; what is there already stays.

    Returns:
        The files, wherever they are.

    Raises:
        UnknownName: for a data set that is not in :data:`DATA_SETS`.
        MissingData: if a file has no public address or could not be downloaded; says which file to place where.
    """
    found = []
    for file in DATA_SETS[name].files:
        try:
            found.append(locate(file.path, name))
            continue
        except MissingData:
            if not file.url:
                raise
        pooch = _pooch()
        target = _cache() / file.path
        try:
            pooch.retrieve(
                file.url,
                known_hash=f"sha256:{file.sha256}",
                fname=target.name,
                path=target.parent,
            )
        except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors); or another hash
            place = " or ".join(str(folder) for folder in folders())
            raise MissingData(
                f"{file.url} could not be downloaded ({_first_line(error)}). "
                f"Place the file {file.path} (sha256 {file.sha256}) in {place}."
            ) from error
        found.append(target)
    return found


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__

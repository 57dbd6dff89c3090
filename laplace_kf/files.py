"""One safetensors file for whatever is kept: tensors plus a JSON header, with a schema version and a checksum.

No pickle. The metadata of a file are ``format`` (what it holds), ``version`` (of the schema), ``package`` (the release
that wrote it), ``header`` (JSON) and ``sha256`` (of header, tensors and release). A file is replaced only by a
whole one: written beside it, brought to the disk, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laplace_kf.errors import CorruptFile, InvalidType, LaplaceKFError, MissingFile, UnusableFile
from laplace_kf.version import __version__

__all__ = [
    "ATTRIBUTION", "FIT", "MIXTURE", "POSTERIOR", "TUNING", "VERSION", "read", "require_file", "require_folder",
    "require_room", "usable_path", "write",
]  # fmt: skip

log = logging.getLogger(__name__)
POSTERIOR = "laplace_kf posterior"
MIXTURE = "laplace_kf mixture"
ATTRIBUTION = "laplace_kf attribution scores"
FIT = "laplace_kf checkpoint of a fit"
TUNING = "laplace_kf checkpoint of tune"
KINDS = (POSTERIOR, MIXTURE, ATTRIBUTION, FIT, TUNING)
VERSION = 1
"""Of the schema. A release reads its own version and all before it (tests/posterior/golden has a file of each)."""


def _checksums(tensors: Mapping[str, Tensor], header: str, package: str) -> tuple[str, str]:
    """Of header, tensors and the release that wrote them, and without the latter, as older files have it."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # the memory itself, no copy
    older = digest.hexdigest()
    digest.update(package.encode())
    return digest.hexdigest(), older


def _path(path: Any) -> Path:
    """What names a file, as a path."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(named := os.fspath(path), bytes):
        raise InvalidType(
            f"a file is named by a str or a pathlib.Path, such as 'posterior.safetensors', got {type(path).__name__}"
        )
    return Path(named)


def require_folder(path: str | os.PathLike[str]) -> Path:
    """The path of a file to write, whose folder is there.

    Raises:
        MissingFile: if it is not.
        UnusableFile: if the path is one of a folder, or its folder is a file.
        InvalidType: if it is no path.
    """
    target = _path(path)
    if target.is_dir():
        raise UnusableFile(f"{target} is a folder, and a file is to be written; name one: {target / 'FILE'}")
    folder = target.parent
    if folder.exists() and not folder.is_dir():
        raise UnusableFile(f"{folder} is a file, so that {target.name} cannot be written into it; give another path")
    if not folder.is_dir():
        raise MissingFile(
            f"no folder {folder} to write {target.name} into; make it first: "
            f"os.makedirs({str(folder)!r}, exist_ok=True)"
        )
    return target


def require_room(path: str | os.PathLike[str]) -> Path:
    """The path of a folder to write files into, which may have to be made.

    Raises:
        UnusableFile: if it, or what it would stand in, is a file.
        InvalidType: if it is no path.
    """
    folder = _path(path)
    there = next((one for one in (folder, *folder.parents) if one.exists()), folder)
    if there.exists() and not there.is_dir():
        raise UnusableFile(f"{there} is a file, so that the folder {folder} cannot be written into; give another path")
    return folder


def require_file(path: str | os.PathLike[str], what: str = "") -> Path:
    """The path of a file to read.

    Args:
        path: file name.
        what: it holds, in words.

    Raises:
        MissingFile: if there is no such file.
        UnusableFile: if it is a folder.
        InvalidType: if it is no path.
    """
    source = _path(path)
    if source.is_dir():
        raise UnusableFile(f"{source} is a folder, and a file is to be read; name one in it: {source / 'FILE'}")
    if not source.exists():
        here = "" if source.is_absolute() else f" (looked for in {Path.cwd()})"
        raise MissingFile(f"no {what} file at {source}{here}".replace("  ", " "))
    return source


@contextmanager
def usable_path(path: Path, doing: str) -> Iterator[None]:
    """Around what reads or writes at a path; what the system refuses there is said of it.

    Args:
        path: of the file or folder.
        doing: what is done with it, in words: "read", "written".

    Raises:
        UnusableFile: in place of the system's own errors.
    """
    try:
        yield
    except LaplaceKFError:
        raise
    except OSError as error:
        why = error.strerror or str(error)
        raise UnusableFile(
            f"{path} cannot be {doing}: {why}; check its permissions and the space left, or give another path"
        ) from error


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any], kind: str) -> None:
    """Writes tensors and a JSON-able header; an existing file is replaced only once the new one is complete.

    Args:
        path: file name.
        tensors: any shapes, by name.
        header: JSON-able values.
        kind: what the file says that it holds.

    Raises:
        MissingFile: if there is no such folder.
        UnusableFile: if it cannot be written; what stood there before still does.
        InvalidType: if ``path`` is no path.
    """
    target = require_folder(path)
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(header)  # in the order given: of a prior's patterns the first match counts
    metadata = {
        "format": kind, "version": str(VERSION), "package": __version__, "header": text,
        "sha256": _checksums(kept, text, __version__)[0],
    }  # fmt: skip
    partial = target.with_name(target.name + f".{os.getpid()}.part")
    with usable_path(target, "written"):
        try:
            partial.touch()  # refused by the system in its own words; the writer below would say it in others
            save_file(kept, partial, metadata=metadata)
            with partial.open("rb+") as written:
                os.fsync(written.fileno())  # before the old file goes: a machine that stops keeps one of the two
            os.replace(partial, target)
            _to_disk(target.parent)
            log.info("wrote the %s %s", kind, target)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            partial.unlink(missing_ok=True)


def _to_disk(folder: Path) -> None:
    """Brings a rename to the disk, where folders can be opened for that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (any shapes, by name) and header of a file written by :func:`write` with this ``kind``.

    Raises:
        MissingFile: if there is no such file.
        CorruptFile: if it is truncated, altered, of a newer version, or not one of ours.
        UnusableFile: if it is a folder, or cannot be read at all.
        InvalidType: if ``path`` is no path.
    """
    path = require_file(path, kind.removeprefix("laplace_kf "))
    with usable_path(path, "read"):
        path.open("rb").close()  # as above: in the system's words
        return _read(path, kind)


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format")
            if found != kind:
                other = f": it holds a {found}" if found in KINDS else ""
                raise CorruptFile(f"{path} is a safetensors file, but not one of a {kind}{other}")
            if metadata.get("version") not in {str(version) for version in range(1, VERSION + 1)}:
                writer = f" (written by laplace_kf {metadata['package']})" if "package" in metadata else ""
                raise CorruptFile(
                    f"{path} has format version {metadata.get('version')}{writer}; this release, {__version__}, reads "
                    f"versions up to {VERSION}: update laplace_kf"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = metadata["header"]
        if metadata.get("sha256") not in _checksums(tensors, header, metadata.get("package", "")):
            raise CorruptFile(f"{path} was altered since it was saved: its checksum does not fit its content")
        loaded: dict[str, Any] = json.loads(header)
        log.info("read the %s %s", kind, path)
        return tensors, loaded
    except CorruptFile:
        raise
    except (SafetensorError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise CorruptFile(f"{path} cannot be read as a {kind}: {error}") from error

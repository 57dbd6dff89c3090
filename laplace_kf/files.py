"""One safetensors file for whatever is kept: tensors plus a JSON header, with a schema version and a checksum.

No pickle. The metadata of a file are ``format`` (what it holds), ``version`` (of the schema), ``package`` (the release
that wrote it), ``header`` (JSON) and ``sha256`` (of header and tensors). A file is replaced only by a whole one:
written beside it, brought to the disk, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laplace_kf.errors import CorruptFile
from laplace_kf.version import __version__

__all__ = ["ATTRIBUTION", "FIT", "MIXTURE", "POSTERIOR", "TUNING", "VERSION", "read", "require_folder", "write"]

log = logging.getLogger(__name__)
POSTERIOR = "laplace_kf posterior"
MIXTURE = "laplace_kf mixture"
ATTRIBUTION = "laplace_kf attribution scores"
FIT = "laplace_kf checkpoint of a fit"
TUNING = "laplace_kf checkpoint of tune"
KINDS = (POSTERIOR, MIXTURE, ATTRIBUTION, FIT, TUNING)
VERSION = 1
"""Of the schema. A release reads its own version and all before it (tests/posterior/golden has a file of each)."""


def _checksum(tensors: Mapping[str, Tensor], header: str) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # the memory itself, no copy
    return digest.hexdigest()


def require_folder(path: str | os.PathLike[str]) -> Path:
    """The path, whose folder is there.

    Raises:
        FileNotFoundError: if it is not.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} into")
    return target


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any], kind: str) -> None:
    """Writes tensors and a JSON-able header; an existing file is replaced only once the new one is complete.

    Args:
        path: file name.
        tensors: any shapes, by name.
        header: JSON-able values.
        kind: what the file says that it holds.

    Raises:
        FileNotFoundError: if there is no such folder.
        OSError: if it cannot be written; what stood there before still does.
    """
    target = Path(path)
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(header)  # in the order given: of a prior's patterns the first match counts
    metadata = {
        "format": kind, "version": str(VERSION), "package": __version__, "header": text,
        "sha256": _checksum(kept, text),
    }  # fmt: skip
    require_folder(target)
    partial = target.with_name(target.name + f".{os.getpid()}.part")
    try:
        save_file(kept, partial, metadata=metadata)
        with partial.open("rb+") as written:
            os.fsync(written.fileno())  # before the old file goes: a machine that stops keeps one of the two
        os.replace(partial, target)
        _to_disk(target.parent)
        log.info("wrote the %s %s", kind, target)
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
        FileNotFoundError: if there is no such file.
        CorruptFile: if it is truncated, altered, of a newer version, or not one of ours.
        OSError: if it cannot be read at all.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no {kind.removeprefix('laplace_kf ')} file at {path}; check the path, which is relative to {Path.cwd()}"
        )
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
        if _checksum(tensors, header) != metadata.get("sha256"):
            raise CorruptFile(f"{path} was altered since it was saved: its checksum does not fit its content")
        loaded: dict[str, Any] = json.loads(header)
        log.info("read the %s %s", kind, path)
        return tensors, loaded
    except CorruptFile:
        raise
    except (SafetensorError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise CorruptFile(f"{path} cannot be read as a {kind}: {error}") from error

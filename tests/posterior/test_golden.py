"""Files of every schema that was ever written load, and say what the release that wrote them said.

``golden/<release>-<structure>`` are posteriors, ``golden/<release>.json`` holds the numbers of that time. A release
that changes the schema adds its own: the network, the data and the calls are below.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import laplace_kf as lk
from laplace_kf import files

GOLDEN = Path(__file__).parent / "golden"
RELEASES = {path.name.removesuffix(".json"): path for path in sorted(GOLDEN.glob("*.json"))}
CASES = [(path, name) for path in RELEASES.values() for name in json.loads(path.read_text())]


def network() -> nn.Module:
    """What all of them are posteriors of; the data are ``cos(0), cos(1), ...`` as (10, 3), targets 0, 1, 0, 1, ..."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel(), dtype=torch.float64) + k).reshape(p.shape))
    return model


def test_there_are_files_of_several_releases() -> None:
    assert len(RELEASES) >= 3 and len(CASES) >= 15


@pytest.mark.parametrize(("numbers", "name"), CASES, ids=[f"{path.stem}-{name}" for path, name in CASES])
def test_loads_and_says_the_same(numbers: Path, name: str, tmp_path: Path) -> None:
    wanted: dict[str, Any] = json.loads(numbers.read_text())[name]
    path = numbers.with_name(f"{numbers.name.removesuffix('.json')}-{name}")
    for _ in range(2):  # as it was written, and as it is written now
        posterior = lk.LaplacePosterior.load(path, network())
        diagonal = torch.tensor(wanted["diag"], dtype=torch.float64)
        torch.testing.assert_close(posterior.precision.diag(), diagonal, rtol=1e-10, atol=1e-12)
        assert float(posterior.precision.logdet()) == pytest.approx(wanted["logdet"], rel=1e-10)
        assert float(posterior.log_evidence()) == pytest.approx(wanted["evidence"], rel=1e-10)
        path = tmp_path / "again"
        posterior.save(path)


def test_a_file_says_which_release_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "posterior"
    lk.LaplacePosterior.load(GOLDEN / "0.1.0-diag", network()).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["version"], metadata["package"]) == (str(files.VERSION), lk.__version__)


def test_a_newer_schema_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "posterior"
    with monkeypatch.context() as patch:
        patch.setattr(files, "VERSION", files.VERSION + 1)
        patch.setattr(files, "__version__", "7.8.9")
        lk.LaplacePosterior.load(GOLDEN / "0.1.0-diag", network()).save(path)
    with pytest.raises(lk.errors.CorruptFile, match=r"version 2 \(written by laplace_kf 7\.8\.9\).*update laplace_kf"):
        lk.LaplacePosterior.load(path, network())


# ------------------------------------------------------------------------------------------------ writing


def test_the_order_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file is on the disk before it takes the old one's place, and then the folder is brought there."""
    path, told = tmp_path / "posterior", []
    posterior = lk.LaplacePosterior.load(GOLDEN / "0.1.0-diag", network())
    save, sync, replace = files.save_file, files.os.fsync, files.os.replace

    def synced(handle: int) -> None:
        told.append("folder" if Path(f"/proc/self/fd/{handle}").resolve().is_dir() else "file")
        sync(handle)

    def replaced(one: Any, other: Any) -> None:
        told.append("rename")
        replace(one, other)

    monkeypatch.setattr(files, "save_file", lambda *a, **k: (told.append("write"), save(*a, **k)))
    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", replaced)
    posterior.save(path)
    if Path("/proc/self/fd").is_dir():
        assert told == ["write", "file", "rename", "folder"]


@pytest.mark.parametrize("stage", ["save_file", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "posterior"
    lk.LaplacePosterior.load(GOLDEN / "0.1.0-diag", network()).save(path)
    kept, posterior = path.read_bytes(), lk.LaplacePosterior.load(GOLDEN / "0.1.0-kron", network())

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files if stage == "save_file" else files.os, stage, fails)
    with pytest.raises(OSError, match="No space"):
        posterior.save(path)
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]


MEMORY = """
import os, resource, sys, torch
from laplace_kf import files
path = sys.argv[1]
torch.set_num_threads(1)
for what in ("write", "read"):
    if os.fork():  # a process for each: the most that one has taken does not fall again
        assert os.wait()[1] == 0
        continue
    tensors = {f"{k}": torch.ones(2**20) for k in range(24)} if what == "write" else {}
    files.read(sys.argv[2], "laplace_kf posterior")  # what the libraries take for themselves
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "write":
        files.write(path, tensors, {}, "laplace_kf posterior")
    else:
        files.read(path, "laplace_kf posterior")
    print(what, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, flush=True)
    os._exit(0)
"""


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes as Linux does")
def test_memory_is_at_most_twice_the_file(tmp_path: Path) -> None:
    """96 MiB: what writing takes beside the tensors themselves, and what reading takes in all."""
    path = tmp_path / "large"
    command = [sys.executable, "-c", MEMORY, str(path), str(GOLDEN / "0.1.0-diag")]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    taken = dict(line.split() for line in found.stdout.splitlines())
    assert list(taken) == ["write", "read"]
    for what, size in taken.items():
        assert 0.5 * path.stat().st_size < int(size) < 2.1 * path.stat().st_size, what

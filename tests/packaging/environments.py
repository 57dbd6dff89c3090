"""Virtual environments under ``.venvs``: what ``make dist`` and ``make test-matrix`` install into, by pip.

Run by the Python that the Makefile chose, which has neither torch nor the package.
"""

from __future__ import annotations

import glob
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venvs"


def python(version: str) -> str | None:
    """A Python of this version that runs: on the path, else of pyenv; ``None`` where there is none."""
    places = sorted(glob.glob(str(Path.home() / f".pyenv/versions/{version}.*/bin/python")))
    for found in (shutil.which(f"python{version}"), *places):
        if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return found  # a shim of pyenv is on the path for versions that are not chosen, and fails
    return None


def output(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout.strip()


def fresh(folder: Path, source: str = sys.executable, seeing: Path | None = None) -> Path:
    """The Python of a new environment, in place of one that was there.

    Args:
        folder: of the environment.
        source: the Python it is made of.
        seeing: an environment of the same Python whose packages it has as well, without copies of them.
    """
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([source, "-m", "venv", str(folder)], check=True)
    made = folder / "bin" / "python"
    if seeing is not None:
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        seen = output(seeing / "bin" / "python", "-c", where)
        Path(output(made, "-c", where), "seen.pth").write_text(seen + "\n", encoding="utf-8")
    return made


LIMIT = 3000  # seconds that pip may take: builds of torch with CUDA are gigabytes


def install(mine: Path, packages: Sequence[str], *options: str) -> bool:
    """Whether pip installed these packages in time."""
    command = [str(mine), "-m", "pip", "install", "--quiet", *options, *packages]
    try:
        return subprocess.run(command, check=False, timeout=LIMIT).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def kept(name: str, source: str, packages: Sequence[str]) -> Path | None:
    """The environment with these packages, of an earlier run if it has the same; ``None``: they cannot be had."""
    folder, wanted = FOLDER / name, "\n".join(packages)
    stamp = folder / ".installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        if not install(fresh(folder, source), packages):
            return None
        stamp.write_text(wanted, encoding="utf-8")
    return folder

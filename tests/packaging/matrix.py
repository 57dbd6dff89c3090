"""The quick part of the tests under the oldest and the newest Python and torch: ``make test-matrix``.

Every pair gets a virtual environment under ``.venvs``, which is kept. A Python that is not on this machine is named and
left out; anything else that fails fails the command.
"""

from __future__ import annotations

import glob
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAIRS = (("3.10", "torch==2.6.*"), ("3.11", "torch==2.13.*"), ("3.13", "torch"))
NEEDED = ("numpy", "scipy", "safetensors", "tqdm", "pytest>=8", "pytest-timeout", "hypothesis")
QUICK = (
    "tests/test_operators.py", "tests/test_engine.py", "tests/posterior/test_saving.py", "tests/optim/test_steps.py",
    "tests/posterior/test_golden.py", "tests/resuming/test_sequences.py", "tests/tape",
    "tests/contracts/test_curvature.py",
)  # fmt: skip


def python(version: str) -> str | None:
    """A Python of this version: on the path, else of pyenv."""
    found = shutil.which(f"python{version}")
    return found or next(iter(sorted(glob.glob(str(Path.home() / f".pyenv/versions/{version}.*/bin/python")))), None)


def tested(version: str, torch: str) -> str:
    """``passed``, ``failed``, or why it could not be run."""
    found = python(version)
    if found is None:
        return "no such Python here"
    folder = ROOT / ".venvs" / f"{version}-{torch.strip('=.*').replace('==', '-')}"
    mine = str(folder / "bin" / "python")
    if not (folder / ".installed").exists():
        subprocess.run([found, "-m", "venv", str(folder)], check=True)
        install = subprocess.run([mine, "-m", "pip", "install", "--quiet", torch, *NEEDED], check=False)
        if install.returncode:
            return "cannot be installed"
        (folder / ".installed").touch()
    done = subprocess.run([mine, "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUICK], cwd=ROOT, check=False)
    return "passed" if done.returncode == 0 else "failed"


def main() -> None:
    wanted = sys.argv[1:]
    verdicts = {pair: tested(*pair) for pair in PAIRS if not wanted or pair[0] in wanted}
    for (version, torch), what in verdicts.items():
        print(f"Python {version:5} {torch:14} {what}")
    sys.exit(any(what in ("failed", "cannot be installed") for what in verdicts.values()))


if __name__ == "__main__":
    main()

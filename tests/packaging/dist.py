"""sdist and wheel, built, looked into, installed afresh and run outside of the checkout: ``make dist``.

The wheel is built from the sdist, so that the sdist is whole. It is installed twice into a new environment that has
torch and nothing else: bare, for the three lines of the README, and with ``[experiments]``, for the demo. ``[all]`` is
only resolved, as pip would install it next to this torch.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.packaging.environments import FOLDER, ROOT, fresh, install, kept, output

DIST = ROOT / "dist"
DOCUMENTS = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE", "setup.cfg"}


def built() -> tuple[Path, Path]:
    """sdist and wheel, the wheel from the sdist."""
    shutil.rmtree(DIST, ignore_errors=True)
    tools = kept("build", sys.executable, ["build"])
    assert tools is not None, "`pip install build` failed"
    subprocess.run(
        [tools / "bin" / "python", "-m", "build", "--outdir", DIST, ROOT],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=FOLDER,
    )
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    return sdist, wheel


def modules() -> set[str]:
    """What of the package has to be in either: its modules and its marker of types."""
    found = [path for path in (ROOT / "laplace_kf").rglob("*.py") if "__pycache__" not in path.parts]
    return {str(path.relative_to(ROOT)) for path in [*found, ROOT / "laplace_kf" / "py.typed"]}


def look_into(sdist: Path, wheel: Path) -> None:
    """Everything that belongs in is in, nothing else is, and the metadata say what ``setup.cfg`` says."""
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames() if not name.endswith("/")}
    assert modules() | DOCUMENTS <= inside, sorted((modules() | DOCUMENTS) - inside)
    assert not any(name.startswith(("tests/", "results/", "docs/", ".venv")) for name in inside)

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (head,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(head).decode())
    own = {name for name in names if ".dist-info/" not in name}
    assert own == modules(), sorted(own ^ modules())
    assert {Path(name).name for name in names if ".dist-info/licenses/" in name} == {"LICENSE", "CITATION.cff"}
    assert metadata["Name"] == "laplace_kf" and metadata["Requires-Python"] == ">=3.10"
    assert "MIT" in (metadata["License-Expression"], metadata["License"])
    assert metadata["Description-Content-Type"] == "text/markdown" and "three lines" in str(metadata.get_payload())
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split(">")[0] for line in core} == {"torch", "numpy", "scipy", "safetensors", "tqdm"}, core
    print(f"{sdist.name}: {len(inside)} entries; {wheel.name}: {len(names)} files, {wheel.stat().st_size >> 10} KiB")


def main() -> None:
    torch = sys.argv[1:] or ["torch"]  # as pip takes it, with an index if it needs one
    look_into(*(parts := built()))
    wheel = parts[1]
    base = kept("torch", sys.executable, torch)
    assert base is not None, f"`pip install {' '.join(torch)}` failed"
    listed = output(base / "bin" / "python", "-m", "pip", "list")
    assert "laplace" not in listed and "scipy" not in listed, "the environment of torch alone has more in it"
    version = output(base / "bin" / "python", "-c", "from importlib.metadata import version; print(version('torch'))")
    pins = FOLDER / "constraints.txt"
    pins.write_text(f"torch=={version}\n", encoding="utf-8")

    mine = fresh(FOLDER / "dist", seeing=base)
    with tempfile.TemporaryDirectory() as empty:
        script = shutil.copy(ROOT / "tests" / "packaging" / "installed.py", FOLDER / "dist")
        for extra, part in (("", "example"), ("[experiments]", "demo")):
            assert install(mine, [f"{wheel}{extra}"], "--constraint", str(pins)), f"the wheel{extra} does not install"
            subprocess.run([mine, "-I", script, part], check=True, cwd=empty)
        assert not any(Path(empty).iterdir()), "the example or the demo wrote into the folder it was started in"
    if not install(mine, [f"{wheel}[all]"], "--constraint", str(pins), "--dry-run"):
        sys.exit("[all] does not resolve next to this torch")
    print(f"[all] resolves next to torch {version}")


if __name__ == "__main__":
    main()

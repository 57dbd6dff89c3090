"""What an installed wheel has to do, run by its own Python outside of the checkout: ``make dist``.

The package comes from site-packages with its marker of types, the three lines of the README work, every module imports
(bridges to libraries that are not there excepted), and the demo runs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import laplace_kf as lk


def main() -> None:
    folder = Path(lk.__file__).parent
    assert "site-packages" in folder.parts, f"{folder} is not an installed package"
    assert (folder / "py.typed").is_file(), "py.typed is not in the wheel"
    assert importlib.metadata.version("laplace_kf") == lk.__version__

    model, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(64, 3)
    posterior = lk.LaplacePosterior(model, "categorical").fit(x, (x[:, 0] > 0).long())
    prediction = posterior.predict(x[:4])
    assert prediction.probs.shape == (4, 2)

    modules = [info.name for info in pkgutil.walk_packages(lk.__path__, "laplace_kf.")]
    for name in modules:
        if not name.startswith("laplace_kf.bridges.") and not name.endswith("__main__"):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, "-m", "laplace_kf", "demo", "--out", out], check=True)
        made = sorted(path.name for path in Path(out).rglob("*") if path.is_file())
        assert "report.html" in made and "result.json" in made, made
    print(f"laplace_kf {lk.__version__} with torch {torch.__version__}: {len(modules)} modules, example and demo run")


if __name__ == "__main__":
    main()

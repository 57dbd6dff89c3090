"""What an installed wheel has to do, run by its own Python outside of the checkout: ``make dist``.

``installed.py example``, next to torch alone: the package comes from site-packages with its marker of types, every
module imports or names the package that it needs and how to install it, and the three lines of the README work, with a
file saved and loaded. ``installed.py demo``, with the extra ``experiments``: the demo runs and writes its report.
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


def example() -> None:
    """What the bare wheel can do."""
    modules = [info.name for info in pkgutil.walk_packages(lk.__path__, "laplace_kf.")]
    asking = []
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            asking.append(name)
            if name.split(".")[1] not in ("bridges", "reports") or "pip install" not in str(error):
                raise AssertionError(name) from error
    assert set(modules) > set(asking)

    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    train, val = (x[:200], y[:200]), (x[200:], y[200:])
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    posterior = lk.LaplacePosterior(model, "categorical", structure="kron").fit(train)
    posterior.tune(val)
    prediction = posterior.predict(val[0])
    assert prediction.probs.shape == (100, 2) and bool(prediction.entropy.isfinite().all())
    with tempfile.TemporaryDirectory() as out:
        posterior.save(Path(out, "posterior.safetensors"))
        again = lk.LaplacePosterior.load(Path(out, "posterior.safetensors"), model)
        one, other = (p.predict(val[0], generator=torch.Generator().manual_seed(1)) for p in (posterior, again))
        assert torch.equal(one.probs, other.probs)
    print(f"{len(modules) - len(asking)} modules import, {len(asking)} say what to install; the example runs")


def demo() -> None:
    """The demo from the command line."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, "-I", "-m", "laplace_kf", "demo", "--out", out], check=True)
        made = sorted(path.name for path in Path(out).rglob("*") if path.is_file())
        assert "report.html" in made and "result.json" in made, made
    print("the demo runs")


def main() -> None:
    folder = Path(lk.__file__).parent
    assert "site-packages" in folder.parts, f"{folder} is not an installed package"
    assert (folder / "py.typed").is_file(), "py.typed is not in the wheel"
    assert importlib.metadata.version("laplace_kf") == lk.__version__
    print(
        f"laplace_kf {lk.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}: ", end="", flush=True
    )
    {"example": example, "demo": demo}[sys.argv[1]]()


if __name__ == "__main__":
    main()

"""An exported posterior through ONNX, where its libraries are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laplace_kf as lk

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("likelihood", "parameters"), [("gaussian", "last_layer"), ("categorical", "all")])
def test_means_and_variances_are_those_of_the_module(likelihood: str, parameters: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 3)
    y = x[:, :2].sin() if likelihood == "gaussian" else (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    options: dict[str, Any] = {"structure": "kron", "parameters": parameters}
    module = lk.LaplacePosterior(model, likelihood, **options).fit(x, y).export(x[:4])
    path = str(tmp_path / "served.onnx")
    torch.onnx.export(module, (x[:4],), path, dynamo=True, verbose=False,
                      dynamic_shapes=({0: torch.export.Dim("n")},))  # fmt: skip
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    for count in (4, 7):
        mean, variance = session.run(None, {name: x[:count].numpy()})
        wanted = module(x[:count])
        torch.testing.assert_close(torch.tensor(mean), wanted[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(variance), wanted[1], rtol=1e-4, atol=1e-6)

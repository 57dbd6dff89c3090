"""The table and page of out-of-distribution scores, from Python and from the command line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import laplace_kf as lk
from laplace_kf.__main__ import main
from laplace_kf.evaluate import network, read_file
from tests.ood.networks import small

for extra in ("torchmetrics", "jinja2", "matplotlib"):
    pytest.importorskip(extra)
Report = importlib.import_module("laplace_kf.reports.html").Report

N = 60


def data(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def posterior() -> lk.LaplacePosterior:
    model = small()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    x, y = data(200, 1)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return lk.LaplacePosterior(model, "categorical").fit((x, y))


def far(seed: int = 4) -> Tensor:
    return data(50, seed)[0] * 3 + 4


def by_hand(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """The four numbers by loops."""
    pairs = [(float(o > i) + 0.5 * float(o == i)) for o in outside for i in inside]

    def precision(positive: Tensor, negative: Tensor) -> float:
        """Σ (R_k − R_{k−1}) P_k over thresholds from above; larger is positive."""
        total, before = 0.0, 0.0
        for t in sorted({float(v) for v in torch.cat([positive, negative])}, reverse=True):
            hits, alarms = int((positive >= t).sum()), int((negative >= t).sum())
            recall = hits / len(positive)
            total += (recall - before) * hits / (hits + alarms)
            before = recall
        return total

    false = [float((inside >= t).double().mean()) for t in outside if float((outside >= t).double().mean()) >= 0.95]
    return {
        "auroc": sum(pairs) / len(pairs),
        "aupr_in": precision(-inside, -outside),
        "aupr_out": precision(outside, inside),
        "fpr95": min(false),
    }


def test_numbers_of_the_table(tmp_path: Path) -> None:
    p = posterior().calibrate(data(80, 2), method="map")
    x, y = data()
    state = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 17)
    found = lk.reports.evaluate(p, loader, {"far": far(), "near": data(40, 9)}, tmp_path, layers="all", samples=10)
    assert torch.equal(state, torch.get_rng_state())
    assert set(found.metrics["ood"]) == {"far", "near"}
    assert set(found.metrics["ood"]["far"]) == {
        "auto", "direction", "entropy", "leverage", "max_prob", "mutual_information", "variance",
    }  # fmt: skip
    for kind in ("auto", "leverage", "variance", "max_prob"):
        near, away = p.ood_score(x, kind, layers="all").double(), p.ood_score(far(), kind, layers="all").double()
        wanted = by_hand(near, away)
        for name, value in wanted.items():
            assert found.metrics["ood"]["far"][kind][name] == pytest.approx(value, abs=1e-6), (kind, name)
    assert found.metrics["ood"]["far"]["auto"]["auroc"] > 0.9 > found.metrics["ood"]["near"]["auto"]["auroc"]
    right = p.predict(x, method="map").probs.argmax(1) == y
    row = found.metrics["selective"]["leverage"]
    order = p.ood_score(x, "leverage", layers="all").argsort()
    assert row["accuracy_1"] == pytest.approx(float(right.double().mean()), abs=0.05)
    assert row["accuracy_0.5"] == pytest.approx(float(right[order[:30]].double().mean()), abs=0.1)
    assert {"report.html", "result.json", "entropy.png", "risk_coverage.png"} <= {f.name for f in tmp_path.iterdir()}
    page = (tmp_path / "report.html").read_text()
    assert "AUPR-in" in page and "In-distribution against far" in page and "FPR95" in page
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["ood"]["far"]["auto"]["auroc"] > 0.9


def test_what_a_posterior_does_not_have_is_left_out_with_its_reason() -> None:
    x = torch.randn(30, 3, dtype=torch.float64)
    p = lk.LaplacePosterior(small(), "gaussian").fit((x, torch.randn(30, 4, dtype=torch.float64)))
    found = lk.reports.evaluate(p, x, {"far": x * 9}, samples=4)
    assert found.config["left_out"]["auto"] == "neither tuned nor calibrated"
    assert "class probabilities" in found.config["left_out"]["max_prob"]
    assert {"variance", "leverage"} <= set(found.metrics["ood"]["far"]) and not found.metrics["selective"]
    with pytest.raises(lk.errors.NotFitted):
        lk.reports.evaluate(p, x, {"far": x * 9}, kinds=["auto"])
    with pytest.raises(lk.errors.UnknownName):
        lk.reports.evaluate(p, x, {"far": x * 9}, kinds=["distance"])
    with pytest.raises(lk.errors.ShapeMismatch, match="empty"):
        lk.reports.evaluate(p, [], {"far": x * 9})


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    p = posterior()
    p.save(tmp_path / "p.safetensors")
    x, y = data()
    np.savez(tmp_path / "in.npz", x=x.numpy(), y=y.numpy())
    torch.save({"x": far()}, tmp_path / "far.pt")
    np.save(tmp_path / "near.npy", data(40, 9)[0].float().numpy())
    save_file({"x": data(80, 2)[0], "y": data(80, 2)[1]}, tmp_path / "val.safetensors")
    return {name: str(tmp_path / name) for name in ("p.safetensors", "in.npz", "far.pt", "near.npy", "val.safetensors")}


def command(files: dict[str, str], *more: str) -> list[str]:
    return [
        "evaluate", files["p.safetensors"], "--model", "tests.ood.networks:small", "--inside", files["in.npz"],
        "--outside", f"far={files['far.pt']}", "--outside", f"near={files['near.npy']}", "--samples", "5", *more,
    ]  # fmt: skip


def test_command_line(files: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(command(files, "--calibrate", files["val.safetensors"], "--out", str(out), "--batch-size", "32")) == 0
    text = capsys.readouterr().out
    assert "In-distribution against far (%)" in text and "AUPR-in" in text and "auto" in text and "Selective" in text
    found = json.loads((out / "result.json").read_text())["metrics"]["ood"]
    assert found["far"]["auto"]["auroc"] > 0.7 and set(found) == {"far", "near"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [*c, "--kinds", "distance"], "Unknown kind of score 'distance'"),
        (lambda c: [*c, "--kinds", "auto"], "call posterior.tune(val_loader)"),
        (lambda c: [*c, "--outside", "nowhere"], "NAME=FILE"),
        (lambda c: [*c, "--outside", "a=missing.npz"], "no file at missing.npz"),
        (lambda c: [w.replace(":small", ":nothing") for w in c], "made a int"),
        (lambda c: [w.replace(":small", "") for w in c], "MODULE:FUNCTION"),
        (lambda c: [w.replace("networks:", "nets:") for w in c], "No module named"),
        (lambda c: [w.replace(":small", ":large") for w in c], "large"),
        (lambda c: [*c, "--samples", "0"], "at least 1"),
    ],
)
def test_refusals_of_the_command_line(
    files: dict[str, str], capsys: Any, tmp_path: Path, change: Any, message: str
) -> None:
    out = tmp_path / "out"
    assert main(change(command(files, "--out", str(out)))) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(lk.errors.UnusableFile, match="file is a file"):
            lk.reports.evaluate(None, None, {}, out)  # type: ignore[arg-type]
    with pytest.raises(lk.errors.InvalidType, match="got int"):
        lk.reports.evaluate(None, None, {}, 3)  # type: ignore[arg-type]
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").mkdir()
    with pytest.raises(lk.errors.UnusableFile, match="cannot be written into"):
        Report("title", "summary", 0, {}, {}).save(tmp_path / "report")
    assert not (tmp_path / "report" / "result.json").exists()


def test_files(tmp_path: Path) -> None:
    x = torch.randn(4, 2)
    torch.save((x, torch.arange(4)), tmp_path / "pair.pt")
    assert set(read_file(tmp_path / "pair.pt")) == {"x", "y"}
    torch.save(x, tmp_path / "alone.pth")
    assert torch.equal(read_file(tmp_path / "alone.pth")["x"], x)
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    with pytest.raises(lk.errors.CorruptFile, match=r"broken.npz cannot be read"):
        read_file(tmp_path / "broken.npz")
    np.savez(tmp_path / "other.npz", images=x.numpy())
    with pytest.raises(lk.errors.ShapeMismatch, match=r"no inputs under 'x' \(it has \['images'\]\)"):
        read_file(tmp_path / "other.npz")
    np.savez(tmp_path / "uneven.npz", x=x.numpy(), y=np.arange(3))
    with pytest.raises(lk.errors.ShapeMismatch, match=r"differ in length"):
        read_file(tmp_path / "uneven.npz")
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(lk.errors.UnknownName, match=r"'.npz'"):
        read_file(tmp_path / "x.csv")


def test_odd_files(tmp_path: Path) -> None:
    x = data(4)[0].numpy()
    np.savez(tmp_path / "text.npz", x=np.array(["a", "b"]))
    with pytest.raises(lk.errors.CorruptFile, match=r"text\.npz cannot be read"):
        read_file(tmp_path / "text.npz")
    for name, odd in (("none", x[:0]), ("number", np.float64(1.0))):
        np.savez(tmp_path / f"{name}.npz", x=odd)
        with pytest.raises(lk.errors.ShapeMismatch, match=rf"{name}\.npz: x of shape .* has no examples"):
            read_file(tmp_path / f"{name}.npz")


def test_labels_of_classes_as_floats_are_not_left_out_silently(files: dict[str, str], capsys: Any) -> None:
    x, y = data()
    np.savez(files["in.npz"], x=x.numpy(), y=y.double().numpy())
    assert main(command(files)) == 1
    assert "labels y are torch.float64" in capsys.readouterr().err


def with_arguments(width: int) -> None:
    """A function that is no network's."""


def test_functions_with_arguments_are_refused() -> None:
    with pytest.raises(lk.errors.ShapeMismatch, match=r"takes arguments \(missing a required argument: 'width'\)"):
        network(f"{__name__}:with_arguments")

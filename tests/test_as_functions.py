"""What a forward pass does beside computing changes no number: every network here has a twin that only computes.

Segments that run again in the backward pass, hooks on tensors, parts under ``no_grad``, inputs that are changed and
rows that are renormalised in place, in every kind of call that puts other weights in or differentiates the network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import laplace_kf as lk
from laplace_kf.outputs.derivatives import one_jacobian
from laplace_kf.outputs.spread import covariance_root
from tests.checks import close, of_every

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randint(6, (5, 4), generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """Two layers, joined by ``how``."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], table: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Embedding(6, 4) if table else nn.Linear(3, 4)
        self.head, self.how = nn.Linear(4, 3), how
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def plain(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.body(x)))


def segment(net: Any, x: Tensor) -> Tensor:
    return net.head(checkpoint(lambda h: torch.tanh(net.body(h)), x, use_reentrant=False))


def hidden_segment(net: Any, x: Tensor) -> Tensor:
    return net.head(checkpoint(lambda h: torch.tanh(net.body(h)), x, use_reentrant=True))


def hooked(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.body(x))
    if h.requires_grad:
        with h.register_hook(lambda gradient: gradient * 0.5):
            pass
        h.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return net.head(h)


def in_place(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.body(x.mul_(2))))


def no_grad(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = torch.tanh(net.body(x))
    return net.head(h + torch.sin(net.body(x)))


def renormalised(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(F.embedding(x, net.body.weight, max_norm=1.0)).mean(1))


def within(net: Any, x: Tensor) -> Tensor:
    rows = F.embedding(x, net.body.weight)
    norms = rows.norm(dim=-1, keepdim=True)
    return net.head(torch.tanh(torch.where(norms > 1, rows / (norms + 1e-7), rows)).mean(1))


TWINS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "segment": (segment, plain),
    "hidden segment": (hidden_segment, plain),
    "hook": (hooked, plain),
    "in place": (in_place, lambda net, x: net.head(torch.tanh(net.body(x * 2)))),
    "no_grad": (no_grad, lambda net, x: net.head(torch.tanh(net.body(x)).detach() + torch.sin(net.body(x)))),
    "renormalised": (renormalised, within),
}


def moved(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3)
    return net


def loaded(new: Callable[[], Net], x: Tensor, path: Path) -> Iterator[Tensor]:
    """The mean of a file in a network whose own weights are others."""
    lk.LaplacePosterior(new(), "categorical", structure="full").fit([(x, Y)]).save(path / "posterior.st")
    posterior = lk.LaplacePosterior.load(path / "posterior.st", moved(new()))
    yield posterior.functional_covariance(x, joint=True)
    yield posterior.predict(x, method="mc", samples=2, generator=rng(), keep_samples=True).samples
    yield lk.attribution.influence(posterior, [(x, Y)], [(x, Y)])


def functions(new: Callable[[], Net], x: Tensor, path: Path) -> Iterator[Tensor]:
    posterior = lk.LaplacePosterior(new(), "categorical", structure="full").fit([(x, Y)])
    yield posterior.precision.dense()
    yield posterior.predict(x, method="linearized", samples=3, generator=rng(), keep_samples=True).samples
    yield lk.acquisition.bald(posterior, x, samples=3, generator=rng())
    yield posterior.derivatives(x).epistemic_variance
    leaf = x.clone().requires_grad_()
    posterior.predict(leaf, method="probit").probs[:, 0].sum().backward()
    assert leaf.grad is not None
    yield leaf.grad


def products(new: Callable[[], Net], x: Tensor, path: Path) -> Iterator[Tensor]:
    size = sum(p.numel() for p in new().parameters())
    vector = torch.linspace(-1, 1, size, dtype=torch.float64)
    yield lk.diagnostics.jacobian(new(), x)
    yield lk.curvature.ggn_vector_product(new(), "categorical", [(x, Y)], vector)
    yield lk.curvature.hessian_vector_product(new(), "categorical", [(x, Y)], vector)
    yield lk.diagnostics.quadratic_form(new(), "categorical", [(x, Y)], vector)


def steps(new: Callable[[], Net], x: Tensor, path: Path) -> Iterator[Tensor]:
    for make in (lk.optim.kflr, lk.optim.natural_gradient):
        net = new()
        optimizer = make(net, "categorical")
        for _ in range(2):
            yield optimizer.step(x, Y)
        yield from (p.detach() for p in net.parameters())


@pytest.mark.parametrize("call", [loaded, functions, products, steps])
def test_nothing_but_the_function_counts(call: Callable[..., Iterator[Tensor]], tmp_path: Path) -> None:
    def case(name: str) -> None:
        odd, even = TWINS[name]
        if name == "renormalised" and call in (loaded, functions):
            return  # its twin has the same draws in another order
        x = TOKENS if name == "renormalised" else X
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(hooks on tensors|script|less than a pair).*")
            mine = list(call(lambda: Net(odd, x is TOKENS), x, tmp_path))
            theirs = list(call(lambda: Net(even, x is TOKENS), x, tmp_path))
        for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert a.shape == b.shape, number
            close(a, b, 1e-8)

    before = X.clone()
    of_every(case, TWINS)
    assert torch.equal(X, before)


def test_graphs_are_of_the_function_alone() -> None:
    made = []
    for how in (in_place, segment):
        posterior = lk.LaplacePosterior(Net(how), "categorical", structure="full").fit([(X, Y)])
        made.append((posterior.export(X, dynamic=False)(X)[1], posterior.functional_covariance(X, diagonal_only=True)))
    of_every(lambda mine, theirs: close(mine, theirs, 1e-8), made)


def test_optimisers_say_that_hooks_on_tensors_are_left_out() -> None:
    with pytest.warns(UserWarning, match=r"hooks on tensors.*between optimizer\.backward\(x, y\) and step\(\)"):
        lk.optim.kfac(Net(hooked), "categorical").step(X, Y)


def test_forward_mode_is_compared_with_a_backward_pass() -> None:
    leaf, v = torch.ones(3, requires_grad=True), torch.tensor([1.0, 2.0, 3.0])
    values = [leaf.sin(), torch.zeros(2)]
    pushed = [v * torch.cos(torch.ones(3)), torch.zeros(2)]
    assert one_jacobian(values, [leaf], pushed, [v]) is True
    assert one_jacobian([leaf.sin()], [leaf], [1.02 * pushed[0]], [v]) is False
    assert one_jacobian([torch.zeros(3)], [leaf], [pushed[0]], [v]) is False
    assert one_jacobian([leaf.sin()], [leaf], [torch.zeros(3)], [v]) is False
    assert one_jacobian([leaf * 0], [leaf], [torch.zeros(3)], [v]) is None  # says nothing


def test_one_singular_covariance_has_a_root() -> None:
    root = torch.randn(6, 3, generator=rng(), dtype=torch.float64)
    found = covariance_root(root @ root.T)
    close(found @ found.T, root @ root.T, 1e-7)

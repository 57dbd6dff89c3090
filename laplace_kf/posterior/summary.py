"""The table that ``posterior.summary()`` prints: what every block became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from laplace_kf.estimators import Estimator
from laplace_kf.notebooks import html_table
from laplace_kf.operators import Blockwise, CurvatureBlock
from laplace_kf.operators.blockwise import prior_of
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.prior import PriorPrecision, plain, prior_tensors
from laplace_kf.structures import Structure
from laplace_kf.tape import Block

__all__ = ["BlockRow", "Summary", "summarise", "summary_of"]

HEAD = ("block", "parameters", "R x O x I", "structure", "condition numbers", "effective / all")


@dataclass(frozen=True)
class BlockRow:
    """One block of a posterior.

    Attributes:
        name: module path or parameter name.
        parameters: parameter names.
        shape: canonical shape ``(R, O, I)``.
        structure: what its curvature is kept as.
        condition: largest over smallest positive eigenvalue: of ``A`` and ``G`` for Kronecker blocks, else of all.
        effective: effective number of parameters ``tr(N C̄ (N C̄ + λ)⁻¹)``, between 0 and ``size``.
        size: number of parameters, without entries that are held constant (the padding row of an embedding).
        note: why it is kept as less than the structure promises, or not by a layer rule, and what a chain of tasks
            left out of it (``posterior.chain_errors``); mostly empty.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, int, int]
    structure: str
    condition: tuple[float, ...]
    effective: float
    size: int
    note: str = ""


class Summary(Sequence[BlockRow]):
    """Rows, one per block; prints as a table, and is one in a notebook."""

    def __init__(self, rows: Sequence[BlockRow], title: str) -> None:
        self.rows, self.title = list(rows), title

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def _cells(self) -> list[tuple[str, ...]]:
        """The rows as text, the total last."""
        body = [
            (
                row.name,
                ", ".join(row.parameters if len(row.parameters) < 4 else (*row.parameters[:2], "...")),
                " x ".join(map(str, row.shape)),
                row.structure,
                ", ".join(f"{value:.2g}" for value in row.condition),
                f"{row.effective:.1f} / {row.size}",
            )
            for row in self.rows
        ]
        total = sum(row.effective for row in self.rows), sum(row.size for row in self.rows)
        return [*body, ("total", "", "", "", "", f"{total[0]:.1f} / {total[1]}")]

    def _notes(self) -> list[str]:
        return [f"{row.name}: {row.note}" for row in self.rows if row.note]

    def __str__(self) -> str:
        body = self._cells()
        widths = [max(len(line[k]) for line in (HEAD, *body)) for k in range(len(HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in
                 (HEAD, *body)]  # fmt: skip
        rule = "-" * max(map(len, lines))
        return "\n".join([self.title, rule, lines[0], rule, *lines[1:-1], rule, lines[-1], *self._notes()])

    def _repr_html_(self) -> str:
        return html_table(self.title, HEAD, self._cells(), self._notes(), last=True)

    __repr__ = __str__


def summary_of(fitted: Fitted, n: float, prior: PriorPrecision, structure: Structure, estimator: Estimator) -> Summary:
    """The table of a fitted posterior at N and λ (a number, 0-dim, or by name pattern); which rules it came from."""
    note = "" if estimator.is_ggn else " (empirical Fisher: not the Gauss-Newton matrix)"
    chosen = f" (chosen: {structure.reason})" if structure.reason else ""
    title = (
        f"LaplacePosterior over {fitted.mean.shape[0]} parameters: structure {structure.name}{chosen}, "
        f"estimator {estimator.name}{note}, damping {fitted.damping}, N = {n:g}, λ = {plain(prior)}"
    )
    blocks = fitted.statistics.blocks
    failed = sorted({block.failed for block in blocks.values() if block.failed})
    title += f", layer rule {', '.join(failed)} failed its check (per-example gradients instead)" if failed else ""
    notes = {name: block.note for name, block in blocks.items() if block.note}
    notes |= fitted.statistics.structure.poorer(blocks)
    for name, said in fitted.statistics.structure.errors(fitted.curvature).items():
        notes[name] = f"{notes[name]}; {said}" if notes.get(name) else said
    for name, said in _lost(fitted.errors).items():
        notes[name] = f"{notes[name]}; {said}" if notes.get(name) else said
    factor, _ = fitted.rescaled()  # a noise scale that was set since the fit counts here as in the precision
    given = prior_tensors(prior, fitted.layout, fitted.like)
    return summarise(fitted.curvature.scaled(factor), n, given, title, notes)


def summarise(
    curvature: Blockwise,
    n: float,
    prior: Tensor | Mapping[str, Tensor],
    title: str,
    notes: Mapping[str, str] | None = None,
) -> Summary:
    """The rows of a curvature.

    Args:
        curvature: mean curvature.
        n: data count.
        prior: prior precision, 0-dim or one per parameter name.
        title: first line.
        notes: why blocks are kept as something else than the structure's own form, by block name.
    """
    prior = prior if isinstance(prior, Tensor) else dict(prior)
    rows = []
    for block, matrix in curvature.entries:
        constants = sum(curvature.layout.held_in(block))
        row = _row(block, matrix, n, prior, constants)  # type: ignore[arg-type]
        rows.append(replace(row, note=(notes or {}).get(row.name, "")))
    return Summary(rows, title)


def _lost(errors: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What a chain's updates approximated, by block name; nothing of blocks whose terms are all there."""
    found: dict[str, str] = {}
    for name in errors[-1] if errors else ():
        each = [step[name] for step in errors if name in step]
        lossy = [error for error in each if error > 0]
        if lossy:
            found[name] = (
                f"{len(lossy)} of {len(each)} updates approximated the sum of the terms; relative Frobenius error "
                f"at most {max(lossy):.2g}, of the last one {each[-1]:.2g}"
            )
    return found


def _row(block: Block, matrix: CurvatureBlock, n: float, prior: Tensor | dict[str, Tensor], constants: int) -> BlockRow:
    effective = matrix.effective(n, prior_of(block, prior).detach())
    condition = tuple(_condition(values) for values in matrix.leading())
    kind = matrix.kind + (f", {constants} held" if constants else "") + (", unused" if block.unused else "")
    kind += f" (layer rule {block.failed!r} failed its check)" if block.failed else ""
    return BlockRow(block.name, block.parameters, block.shape, kind, condition, effective, block.size - constants)


def _condition(values: Tensor) -> float:
    positive = values[values > 0]
    return float(positive.max() / positive.min()) if positive.numel() else float("inf")

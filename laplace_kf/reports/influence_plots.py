"""Pictures of which training examples helped and harmed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.reports.style import GAP, INK, SOFT, colour, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["influential"]

SIZE = 1.0  # inches of an image


def influential(
    scores: Tensor,
    train: Tensor,
    queries: Tensor,
    top: int = 5,
    *,
    train_names: Sequence[str] | None = None,
    query_names: Sequence[str] | None = None,
) -> Figure:
    """A row for every query: the query, its most helpful training images, then its most harmful ones.

    Args:
        scores: ``(Q, N)`` of :func:`laplace_kf.attribution.influence`, positive = helpful.
        train: images ``(N, H, W)``, ``(N, 1, H, W)`` or ``(N, 3, H, W)``; those of three channels in [0, 1].
        queries: images ``(Q, ...)`` of the same form.
        top: how many of either kind.
        train_names, query_names: a word or two for every image, such as its label; scores otherwise.

    Raises:
        ShapeMismatch: if there is not one score for every pair of images, or they are no images.
    """
    if scores.shape != (len(queries), len(train)):
        raise ShapeMismatch(
            f"{len(queries)} queries and {len(train)} training images need scores ({len(queries)}, {len(train)}), got "
            f"{tuple(scores.shape)}"
        )
    top = min(top, len(train))
    figure, axes = panels(len(queries), 1 + 2 * top, width=SIZE, height=1.25 * SIZE)
    for row, values in enumerate(scores):
        cells = axes[row * (1 + 2 * top) : (row + 1) * (1 + 2 * top)]
        _shown(cells[0], queries[row], query_names[row] if query_names else f"query {row}", INK)
        for side, (sign, ink) in enumerate(((1, colour("posterior")), (-1, GAP))):
            for place, index in enumerate((sign * values).topk(top).indices.tolist()):
                name = train_names[index] if train_names else f"{float(values[index]):+.2g}"
                _shown(cells[1 + side * top + place], train[index], name, ink)
    return figure


def _shown(axis: Axes, image: Tensor, name: str, ink: str) -> None:
    pixels = image[0] if image.dim() == 3 and image.shape[0] == 1 else image
    pixels = pixels.permute(1, 2, 0) if pixels.dim() == 3 and pixels.shape[0] == 3 else pixels
    if pixels.dim() not in (2, 3) or (pixels.dim() == 3 and pixels.shape[2] != 3):
        raise ShapeMismatch(f"an image must be (H, W), (1, H, W) or (3, H, W), got {tuple(image.shape)}")
    axis.imshow(pixels.detach().float().cpu().numpy(), cmap="gray_r")
    axis.set_title(name, fontsize=7.5, color=ink, pad=2)
    axis.grid(visible=False)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(True)
        spine.set_color(SOFT if ink == INK else ink)

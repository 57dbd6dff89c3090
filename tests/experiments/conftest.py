"""Settings shared by the tests of experiments."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from laplace_kf.reports.html import Picture

DRAWN: dict[tuple[str, str], bytes] = {}
ARRANGED = ("test_demo", "test_plots", "test_report")  # the tests of pictures, and one run as a user sees it


@pytest.fixture(autouse=True, scope="module")
def _unarranged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pictures of small runs are drawn, but not arranged: fitting their parts to each other costs most of a run.

    Nor are they drawn a first time to see how large they are, as ``savefig`` does, or again when a run is repeated or
    goes on: then the file is the first one's.
    """

    def png(self: Picture) -> bytes:
        if (drawn := DRAWN.get((self.name, self.caption))) is not None:
            return drawn
        self.figure.set_layout_engine("none")
        buffer = io.BytesIO()
        FigureCanvasAgg(self.figure).print_png(buffer)
        return DRAWN.setdefault((self.name, self.caption), buffer.getvalue())

    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.module.__name__.split(".")[-1] not in ARRANGED:
            monkeypatch.setattr(Picture, "png", png)
        yield

"""What the code and the pages point at is there: sections of the methods page, files, headings."""

from __future__ import annotations

import re
from pathlib import Path

from tests.checks import of_every

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("laplace_kf", "experiments", "benchmarks", "examples", "tests", "configs", "docs")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md", ".yaml"} and path != Path(__file__)
)
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NUMBER = r"\d+(?:\.\d+)*"
CITATION = re.compile(rf"\b[Mm]ethods\s+({NUMBER}(?:(?:\s*,\s*|\s*-\s*|\s+and\s+){NUMBER}\b)*)")
HEADING = re.compile(rf"^#+ ({NUMBER})\.? ", re.MULTILINE)
# Keys and talk of the workshop this package came from; a reader has no such thing.
WORKSHOP = re.compile(
    r"\bS[0-3] (?:\d|[A-G]\b|Alg|Table|Lemma)|\bin the seeds\b|\bthe seeds'? (?:say|give|paper)|\bissue #?\d"
)


def sections() -> set[str]:
    return set(HEADING.findall((ROOT / "docs" / "methods.md").read_text(encoding="utf-8")))


def cited(text: str) -> set[str]:
    """The sections of the methods page that a text names."""
    return {number for match in CITATION.finditer(text) for number in re.findall(NUMBER, match[1])}


def test_cited_sections_exist_and_nobody_needs_to_have_been_there():
    there = sections()

    def case(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        missing = cited(text) - there
        assert not missing, f"cites sections that docs/methods.md does not have: {sorted(missing)}"
        assert not WORKSHOP.findall(text), f"says {WORKSHOP.findall(text)}"

    of_every(case, [*SOURCES, *PAGES[:2]])


def test_citations_of_every_form_are_seen():
    text = "(methods 4.2, 4.7) and (methods 7.2-7.5, 7.7; see 9) and methods 5.3 and 5.4; Methods 17.9. methods 6"
    assert cited(text) == {"4.2", "4.7", "7.2", "7.5", "7.7", "5.3", "5.4", "17.9", "6"}
    assert WORKSHOP.findall("S2 4.6.8") and not WORKSHOP.findall("S2 = A + B, over the seeds of a run")


def anchor(heading: str) -> str:
    """The anchor that a heading gets on the page (GitHub's rule)."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_between_pages_resolve():
    of_every(links_resolve, sorted(set(PAGES)))


def links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    inside = re.findall(
        r"\]\((?!https?:|mailto:)([^)\s]+)\)", re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$", "", text, flags=re.DOTALL)
    )
    for link in inside:
        name, _, fragment = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        if fragment and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name} links to {link}: no such heading"

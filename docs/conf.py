"""The documentation site, made by ``make site``: these pages, the reference from docstrings, formulas as MathML.

Every page is plain Markdown that a code host shows as well. Nothing on the site is fetched from elsewhere.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package as it stands in the checkout

NAVIGATION: dict[str, list[str]] = {
    "Start": ["index", "options", "saving", "resuming", "limits"],
    "Tutorials": [
        "tutorials/classification",
        "tutorials/regression",
        "tutorials/strange_inputs",
        "tutorials/segmentation",
        "tutorials/language_models",
        "tutorials/task_after_task",
        "optimizers",
        "attribution",
        "acquisition",
        "tutorials/bayesian_optimisation",
        "tutorials/large_models",
    ],
    "With other libraries": [
        "bridges",
        "tutorials/adapters/avalanche",
        "tutorials/adapters/botorch",
        "tutorials/adapters/lightning",
        "tutorials/adapters/optuna",
        "tutorials/adapters/scikit_learn",
        "tutorials/adapters/torch_uncertainty",
        "tutorials/adapters/transformers",
    ],
    "In depth": [
        "batches",
        "likelihoods",
        "many_outputs",
        "distributed",
        "plans",
        "mixtures",
        "evidence_training",
        "chaining",
        "conditioning",
        "export",
        "graphs",
        "diagnostics",
        "models",
        "migrating",
    ],
    "What it does on data": [
        "benchmarks",
        "calibration",
        "ood_pairs",
        "uci",
        "toy_regression",
        "shakespeare",
        "continual",
        "recurrent",
        "experiments",
    ],
    "Mathematics": ["methods", "coverage"],
    "Reference": [
        "reference/posterior",
        "reference/likelihoods",
        "reference/mixtures",
        "reference/curvature",
        "reference/optim",
        "reference/continual",
        "reference/attribution",
        "reference/acquisition",
        "reference/pruning",
        "reference/predictive",
        "reference/diagnostics",
        "reference/graphs",
        "reference/bridges",
        "reference/reports",
        "reference/errors",
        "reference/operators",
        "reference/extending",
    ],
    "Project": ["architecture", "contributing", "releasing", "suites", "versions", "mutants", "changelog"],
}
"""Captions and pages of the side bar, in order; tests/test_site.py checks that every page is in it."""

# -- Sphinx ------------------------------------------------------------------------------------------------------------

project = "laplace_kf"
author = "The laplace_kf authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
root_doc = "index"
exclude_patterns = ["results", "pictures/*.txt"]
nitpicky = False
suppress_warnings = ["ref.python"]  # an annotation such as Structure names several classes: no link, no harm

html_theme = "furo"
html_title = "laplace_kf"
html_static_path = ["site"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True  # $$ $$ inside a paragraph, too
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "inherited-members": True}
autodoc_mock_imports = [
    "avalanche",
    "botorch",
    "gpytorch",
    "lightning",
    "linear_operator",
    "optuna",
    "pyro",
    "pytorch_lightning",
    "sklearn",
    "torch_uncertainty",
    "transformers",
]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
maximum_signature_line_length = 80
python_use_unqualified_type_names = True

# -- what is ours ------------------------------------------------------------------------------------------------------

CITED = re.compile(r"\b([Mm]ethods)\s+(\d+(?:\.\d+)*)")
HEADING = re.compile(r"^#+ ((\d+(?:\.\d+)*)\.? .*)$", re.MULTILINE)
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([\w./-]+)\)")
LETTERS = re.compile(r"\\math(bb|cal)(?: ?([A-Z])|\{([A-Z]+)\})")
MOVED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def anchor(heading: str) -> str:
    """The anchor of a heading, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def sections() -> dict[str, str]:
    """Of the page of methods: anchors by the number of the section."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    return {number: anchor(heading) for heading, number in HEADING.findall(text)}


def cite(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """``(methods 9.1)`` in a docstring becomes a link to the section."""
    known = sections()

    def link(match: re.Match[str]) -> str:
        target = known.get(match[2])
        return f"`{match[1]} {match[2]} <../methods.html#{target}>`__" if target else match[0]

    lines[:] = [CITED.sub(link, line) for line in lines]


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """What classes inherit from torch and other libraries is documented there."""
    getter = obj.fget if isinstance(obj, property) else obj
    module = getattr(getattr(getter, "__objclass__", getter), "__module__", None)  # methods written in C have no module
    return True if isinstance(module, str) and not module.startswith("laplace_kf") else None


def read(app: Any, page: str, source: list[str]) -> None:
    """The side bar at the end of the first page; links to files of the repository that are no pages become text."""

    def link(match: re.Match[str]) -> str:
        depth = "../" * page.count("/")
        return f"[{match[1]}]({depth}{MOVED[match[2]]})" if match[2] in MOVED else match[1]

    source[0] = source[0].replace(" ± ", "\u00a0±\u00a0")  # a mean and its error stay on one line
    source[0] = OUTSIDE.sub(lambda m: link(m) if not (ROOT / "docs" / m[2]).exists() else m[0], source[0])
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            listed = "\n".join(each for each in pages if each != root_doc)
            source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def character(match: re.Match[str]) -> str:
    """Double-struck and script capitals as characters of their own, which is all that MathML in browsers knows."""
    style = {"bb": "DOUBLE-STRUCK CAPITAL", "cal": "SCRIPT CAPITAL"}[match[1]]
    found = []
    for letter in match[2] or match[3]:
        try:
            found.append(unicodedata.lookup(f"MATHEMATICAL {style} {letter}"))
        except KeyError:  # some are older than the others and have shorter names
            found.append(unicodedata.lookup(f"{style} {letter}"))
    return "{" + "".join(found) + "}"


def formula(latex: str, display: str) -> str:
    """MathML of a formula, which browsers draw without a script."""
    from latex2mathml.converter import convert
    from sphinx.util.logging import getLogger

    latex = LETTERS.sub(character, latex).replace(r"\arg", r"\operatorname{arg}")
    try:
        made = str(convert(latex, display=display))
    except Exception as error:
        getLogger(__name__).warning("formula %r: %s", latex, type(error).__name__)
        return ""
    return made


def inline_formula(translator: Any, node: Any) -> None:
    """A formula in a line."""
    from docutils.nodes import SkipNode

    wide = ' class="formula wide"' if len(node.astext()) > 80 else ""
    translator.body.append(f"<span{wide}>{formula(node.astext(), 'inline')}</span>")
    raise SkipNode


def displayed_formula(translator: Any, node: Any) -> None:
    """A formula in lines of its own; one that is too wide scrolls by itself."""
    from docutils.nodes import SkipNode

    translator.body.append(f'<div class="formula">{formula(node.astext(), "block")}</div>')
    raise SkipNode


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    app.connect("autodoc-process-docstring", cite, priority=900)
    app.connect("autodoc-skip-member", skip)
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

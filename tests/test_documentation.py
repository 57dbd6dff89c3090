"""What is public is documented, and what the documentation shows runs."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch

import laplace_kf as lk
from tests.checks import of_every

README = Path(__file__).resolve().parents[1] / "README.md"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# One entry of a shape: N, n, C-1, 2*K, *rest, ... or 3. A tuple of them needs a comma, so that "(MAP)" is none.
ENTRY = r"(?:\.\.\.|…|\*\w[\w.]*|(?:[A-Z][A-Za-z]{0,2}|[a-z]|\d+)'?(?:_\w+)?(?:\s*[-+*·×]\s*\w+)?)"
SHAPE = re.compile(rf"\({ENTRY},(?:\s*{ENTRY},?)*\)|\(\)|0-dim|\b[Ss]calar|\b[Ss]hape|\b[A-Z]\s*×\s*[A-Z]\b")


def public_modules() -> list[str]:
    names = [info.name for info in pkgutil.walk_packages(lk.__path__, "laplace_kf.")]
    return ["laplace_kf", *(n for n in names if not any(part.startswith("_") for part in n.split(".")[1:]))]


def imported(name: str) -> ModuleType:
    """A module of the package; a bridge to a library that is not installed skips the test."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not name.startswith("laplace_kf.bridges.") or (error.name or "laplace_kf").startswith("laplace_kf"):
            raise
        pytest.skip(f"{error.name} is not installed")


def exported(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The functions and classes that a module offers: its ``__all__``, or what it defines without an underscore.

    What it passes on from another public module is left to that module.
    """
    names = getattr(module, "__all__", None)
    for name, value in vars(module).items():
        if not isinstance(value, FunctionType | type) or not value.__module__.startswith("laplace_kf"):
            continue
        at_home = value.__module__ == module.__name__
        from_private = any(part.startswith("_") for part in value.__module__.split("."))
        public = name in names if names is not None else not name.startswith("_")
        if public and (at_home or from_private):
            yield name, value


def function_of(member: object) -> FunctionType | None:
    """The function behind a method, property, class method or decorated function."""
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, functools.cached_property):
        member = member.func
    elif isinstance(member, classmethod | staticmethod):
        member = member.__func__
    member = inspect.unwrap(member) if callable(member) else member
    return member if isinstance(member, FunctionType) else None


def documentation(cls: type, name: str) -> str:
    """The docstrings of a method, its own and those that it refines, as the classes of this package give them."""
    found = [vars(base).get(name) for base in cls.__mro__ if base.__module__.startswith("laplace_kf")]
    return "\n".join(doc for doc in (getattr(member, "__doc__", None) for member in found) if doc)


def mentions_tensor(function: FunctionType) -> bool:
    return any(re.search(r"\bTensor\b", str(annotation)) for annotation in function.__annotations__.values())


def complaints(label: str, value: object) -> Iterator[str]:
    """What is missing in the documentation of one exported function or class."""
    if isinstance(value, FunctionType):
        doc = value.__doc__ or ""
        if not doc.strip():
            yield f"{label} has no docstring"
        elif mentions_tensor(inspect.unwrap(value)) and not SHAPE.search(doc):
            yield f"{label} takes or returns tensors and its docstring mentions no shape"
        return
    assert isinstance(value, type)
    doc = vars(value).get("__doc__") or ""
    # A dataclass without a docstring gets its signature as one.
    if not doc.strip() or doc.startswith(f"{value.__name__}("):
        yield f"{label} has no docstring"
    constructor = function_of(vars(value).get("__init__"))
    if constructor is not None and mentions_tensor(constructor):
        fields = (constructor.__doc__ or "") + doc
        if not SHAPE.search(fields):
            yield f"{label} is built from tensors and its docstring mentions no shape"
    for name, member in vars(value).items():
        function = function_of(member)
        if name.startswith("_") or function is None:
            continue
        doc = documentation(value, name)
        if not doc.strip():
            yield f"{label}.{name} has no docstring"
        elif mentions_tensor(function) and not SHAPE.search(doc):
            yield f"{label}.{name} takes or returns tensors and its docstring mentions no shape"


def one_by_one(case: Callable[[str], None]) -> Callable[[str | None], None]:
    """The test of a module's name for all modules at once, and for each bridge, whose library may not be installed."""
    bridges = [name for name in public_modules() if name.startswith("laplace_kf.bridges.")]

    @pytest.mark.parametrize("bridge", [None, *bridges])
    def test(bridge: str | None) -> None:
        of_every(case, [bridge] if bridge else [name for name in public_modules() if name not in bridges])

    return test


@one_by_one
def test_public_names_are_documented(name: str):
    module = imported(name)
    assert module.__doc__, f"{name} has no docstring"
    missing = [line for label, value in exported(module) for line in complaints(f"{name}.{label}", value)]
    assert not missing, "\n".join(missing)


def test_no_docstring_sends_the_reader_away():
    files = [Path(found.origin) for name in public_modules() if (found := find_spec(name)) and found.origin]
    assert len(files) == len(public_modules())
    told = [file for file in files if "See the module" in file.read_text()]
    assert not told


def submodules(package: ModuleType) -> set[str]:
    """The public modules in a package's folder, none of them imported."""
    found = pkgutil.iter_modules(getattr(package, "__path__", []))
    return {info.name for info in found if not info.name.startswith("_")}


@one_by_one
def test_all_lists_what_is_there(name: str):
    module = imported(name)
    # A module inside is not asked for by `hasattr`: that imports it, and a bridge's library need not be installed.
    listed = set(getattr(module, "__all__", [])) - submodules(module)
    missing = sorted(entry for entry in listed if not hasattr(module, entry))
    assert not missing, f"{name}.__all__ lists {missing}"


@pytest.mark.parametrize(
    "page",
    [
        README,
        *(
            README.parent / "docs" / name
            for name in (
                "optimizers.md",
                "likelihoods.md",
                "batches.md",
                "distributed.md",
                "attribution.md",
                "many_outputs.md",
                "plans.md",
                "mixtures.md",
                "evidence_training.md",
                "diagnostics.md",
                "conditioning.md",
                "acquisition.md",
                "export.md",
                "resuming.md",
                "index.md",
                "limits.md",
                "migrating.md",
                "saving.md",
                "tutorials/bayesian_optimisation.md",
                "tutorials/classification.md",
                "tutorials/language_models.md",
                "tutorials/large_models.md",
                "tutorials/regression.md",
                "tutorials/segmentation.md",
                "tutorials/strange_inputs.md",
                "tutorials/task_after_task.md",
            )
        ),
    ],
    ids=lambda page: page.name,
)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    run_examples(page)


def run_examples(page: Path) -> None:
    """All python blocks, in order and in one namespace, as a reader would paste them."""
    text = page.read_text(encoding="utf-8")
    blocks = list(PYTHON_BLOCK.finditer(text))
    assert blocks, f"{page.name} shows no example"
    namespace: dict[str, object] = {"__name__": "readme"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            # Blank lines in front make a traceback point at the line of the page.
            lines_above = text.count("\n", 0, block.start(1))
            exec(compile("\n" * lines_above + block[1], str(page), "exec"), namespace)


def test_readme_support_table_is_the_registries_own():
    table = lk.support_table().strip()
    assert table, "the support table is empty"
    assert table in README.read_text(encoding="utf-8"), f"README.md does not contain this table:\n\n{table}"


# The checks themselves, on what they have to find.


class Undocumented:
    def method(self):
        pass


class Built:
    """Something."""

    def __init__(self, factor: torch.Tensor) -> None:
        self.factor = factor

    def rows(self) -> torch.Tensor:
        """The rows (those of the factor, all of them)."""
        return self.factor


Undocumented.__module__ = Built.__module__ = "laplace_kf.example"


def test_missing_documentation_is_seen():
    assert list(complaints("Undocumented", Undocumented)) == [
        "Undocumented has no docstring",
        "Undocumented.method has no docstring",
    ]
    assert [line.split(" ")[0] for line in complaints("Built", Built)] == ["Built", "Built.rows"]


@pytest.mark.parametrize(
    "text", ["``(N, C)``", "(P,)", "(n, *parameter.shape)", "a 0-dim tensor", "(S, ...)", "(C-1, N, C)", "of any shape"]
)
def test_shapes_are_recognised(text: str):
    assert SHAPE.search(text)


@pytest.mark.parametrize("text", ["the mode (MAP)", "(see, for example, there)", "f(x)", "(mean, precision)"])
def test_prose_is_not_taken_for_a_shape(text: str):
    assert not SHAPE.search(text)

"""What a mutant is, and all of them: a file of the package with one operator, number, condition or call changed."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tests.mutation.named import NAMED

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("operators", "estimators", "likelihoods", "structures", "layers", "tape", "optim")
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A file of the package with ``old`` at ``(line, column)`` replaced by ``new``.

    Its ``key`` does not count lines, so that a verdict stays with it while other code of the file changes: ``where`` is
    the function and the text of its line, and which one of its like there it is.
    """

    file: str
    line: int
    column: int
    old: str
    new: str
    where: str

    @property
    def key(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file} {self.where}: `{old}` -> `{new}`"

    @property
    def folder(self) -> str:
        return self.file.split("/")[1]

    def apply(self, source: str) -> str:
        start = sum(len(line) for line in source.splitlines(keepends=True)[: self.line - 1]) + self.column
        assert source[start:].startswith(self.old), self.key
        return source[:start] + self.new + source[start + len(self.old) :]


def by_name() -> dict[Mutant, list[str]]:
    """The named mutants with their tests."""
    found = {}
    for file, old, new, tests in NAMED:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert source.count(old) == 1, (file, old)
        before = source[: source.index(old)]
        column = len(before) - before.rfind("\n") - 1
        found[Mutant(file, before.count("\n") + 1, column, old, new, "by name")] = tests
    return found


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """What a node could be mistaken for."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)  # type: ignore[list-item]
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)  # type: ignore[arg-type]
    if isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPS[type(node.op)](), node.values)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield node.operand
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1 if isinstance(node.value, int) else 2 * node.value)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Constant(...)
    guards = {"clamp", "clamp_min", "clamp_max", "abs", "sqrt", "square"}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in guards:
        yield node.func.value


def mutants(path: Path) -> Iterator[Mutant]:
    """All of one file; not in annotations, messages of errors, docstrings and lists of names."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    often: Counter[tuple[str, str, str]] = Counter()

    def walk(node: ast.AST, within: str) -> Iterator[tuple[ast.AST, str]]:
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
            return
        yield node, within
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            within = f"{within}.{node.name}".lstrip(".")
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, ast.AST):
                    yield from walk(one, within)

    for node, within in walk(ast.parse(source), ""):
        if getattr(node, "lineno", 0) != getattr(node, "end_lineno", 1):
            continue
        text = lines[node.lineno - 1].encode()  # type: ignore[attr-defined]
        column = len(text[: node.col_offset].decode())  # type: ignore[attr-defined]
        old = text[node.col_offset : node.end_col_offset].decode()  # type: ignore[attr-defined]
        for other in changed(node):
            new = ast.unparse(ast.fix_missing_locations(other))
            if not isinstance(node, ast.Expr):
                new = f"({new})"
            where = f"{within or 'module'} `{lines[node.lineno - 1].strip()}`"  # type: ignore[attr-defined]
            often[where, old, new] += 1
            if often[where, old, new] > 1:
                where += f" #{often[where, old, new]}"
            yield Mutant(str(path.relative_to(ROOT)), node.lineno, column, old, new, where)  # type: ignore[attr-defined]


def sampled(seed: int) -> list[Mutant]:
    """All mutants, in a random order that takes the folders in turn; the order of two of them is always the same."""

    def chance(mutant: Mutant) -> bytes:
        return sha256(f"{seed} {mutant.key}".encode()).digest()

    queues = []
    for folder in FOLDERS:
        found = [m for path in sorted((ROOT / "laplace_kf" / folder).glob("*.py")) for m in mutants(path)]
        queues.append(sorted(found, key=chance))
    return [queue[k] for k in range(max(map(len, queues))) for queue in queues if k < len(queue)]

"""Code put into functions that exist already: a process that has imported package and tests becomes a mutant of itself.

Nothing is imported again. A function of the package is known by its file, its qualified name and its first line; what
lies in no function (a constant of a module, a field of a class) cannot be changed so.
"""

from __future__ import annotations

import ast
import gc
import types
from collections import Counter
from collections.abc import Iterator, Mapping

from tests.mutation.mutants import ROOT, Mutant

Key = tuple[str, int]
HIT = "__mutant_hit__"
"""The function that marked code calls, found among the builtins."""


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """This code and all that lie in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def key(code: types.CodeType) -> Key:
    return code.co_name, code.co_firstlineno


def functions() -> dict[str, dict[Key, list[types.FunctionType]]]:
    """The functions of the package that are alive, closures among them, by file."""
    found: dict[str, dict[Key, list[types.FunctionType]]] = {}
    gc.unfreeze()  # what conftest.py set aside would not be found
    for one in gc.get_objects():
        if type(one) is types.FunctionType and one.__code__.co_filename.startswith(f"{ROOT}/laplace_kf/"):
            file = one.__code__.co_filename.removeprefix(f"{ROOT}/")
            found.setdefault(file, {}).setdefault(key(one.__code__), []).append(one)
    gc.freeze()  # a fork that collects garbage would copy all pages
    return found


def put(file: str, tree: ast.Module | str, alive: Mapping[Key, list[types.FunctionType]], line: int = 0) -> bool:
    """Gives the functions of a file the code of another source.

    Args:
        file: of the package, from the root of the repository.
        tree: the other source, with every function in the line it has now.
        alive: the functions of the file.
        line: where a change matters.

    Returns:
        Whether it is in: every function could take its code, and no two of one name begin in ``line``.
    """
    found = list(codes(compile(tree, str(ROOT / file), "exec", dont_inherit=True)))
    often, fits = Counter(key(code) for code in found), True
    for code in found:
        if key(code) not in alive:
            continue
        if often[key(code)] > 1:  # two lambdas of one line: not to be told apart
            fits &= code.co_firstlineno != line
            continue
        for function in alive[key(code)]:
            same = len(function.__code__.co_freevars) == len(code.co_freevars)
            if same:
                function.__code__ = code
            fits &= same
    return fits


def inside(mutant: Mutant) -> bool:
    """Whether a mutant lies in the body of a function (not in its defaults, and not at the level of a module)."""
    return _statement(ast.parse((ROOT / mutant.file).read_text(encoding="utf-8")), mutant) is not None


def _statement(tree: ast.Module, mutant: Mutant) -> tuple[list[ast.stmt], int] | None:
    """The list of statements of a function's body, and the place in it, that holds the mutant."""

    def within(node: ast.AST) -> bool:
        begin, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        return begin <= (mutant.line, column) and (mutant.line, column) < end

    line = (ROOT / mutant.file).read_text(encoding="utf-8").splitlines()[mutant.line - 1]
    column = len(line[: mutant.column].encode())
    found = None

    def walk(node: ast.AST, function: bool) -> None:
        nonlocal found
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            statements = getattr(node, field, None)
            for place, one in enumerate(statements if isinstance(statements, list) else ()):
                if isinstance(one, (ast.ExceptHandler, ast.match_case)):
                    walk(one, function)
                elif within(one):
                    a_def = isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))
                    if function:
                        found = (statements, place)
                    if a_def and not any(within(part) for part in one.body):  # a default: evaluated with the `def`
                        return
                    walk(one, a_def or (function and not isinstance(one, ast.ClassDef)))

    walk(tree, False)
    return found


def marked(file: str, mutants: Mapping[int, Mutant]) -> ast.Module:
    """The file with a call of ``HIT`` before the statement of each mutant."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    places: dict[tuple[int, int], tuple[list[ast.stmt], list[int]]] = {}
    for number, mutant in mutants.items():
        where = _statement(tree, mutant)
        if where is not None:
            places.setdefault((id(where[0]), where[1]), (where[0], []))[1].append(number)
    for (_, place), (statements, numbers) in sorted(places.items(), key=lambda item: -item[0][1]):
        line = statements[place]
        first = place
        docstring = isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
        if not docstring:
            for number in numbers:
                call = ast.Expr(ast.Call(ast.Name(HIT, ast.Load()), [ast.Constant(number)], []))
                statements.insert(first, ast.fix_missing_locations(ast.copy_location(call, line)))
    return tree


def source_of(mutant: Mutant) -> str:
    return mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))

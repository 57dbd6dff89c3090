"""Every message of an error that the package raises, read: what it is about, what was given, and a way out."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

from laplace_kf import errors

ROOT = Path(__file__).resolve().parents[1]
# Two have constructors that write the message. Damaged files and lost processes say what happened; nothing mends them.
OWN = {*errors.__all__} - {"LaplaceKFError", "NotPositiveDefinite", "UnknownName"}
NO_WAY = {"CorruptFile", "DistributedFailure"}
KINDS = {*OWN, "ValueError", "TypeError", "RuntimeError", "FileNotFoundError", "ImportError", "AttributeError"}
HOLE = "…"
# How a message says what to do, or what is allowed: a request, a need, a rule, an alternative, a line to paste.
WAY = re.compile(
    r"\b(add|allowed|ask|at least|belongs?|between|call|cast|check|choose|construct|convert|cut|divide|drop|either|"
    r"expected|fit|fitted|free|gives?|go(es)? with|has to|have to|install|instead|keep|larger|leave|load|lower|make|"
    r"makes|mask|transpose|must|name|needs?|once|one of|only|or|pass|passes|positive|put|raise|reads?|remove|reshape|"
    r"return|run|say|set|Set|smaller|split|start|take|takes|try|turn|update|use|using|wrap|write|build|prune|"
    r"are for|is for|same|of one shape|between|too|its methods are|the others|scaled for|select|\w+=|"
    r"support|found|have|there is|there are|it has|known for|is outside|falls back|clean|look at|observations are)\b",
    re.IGNORECASE,
)
# Built by constructors of their own, which are read in laplace_kf/errors.py and have their own tests.
BY_CLASS = {"UnknownOption", "UnknownAttribute", "MissingFile"}
# What stays as it is, by file and first words: outside code may see it, but cannot do anything else about it.
SAID = {
    "laplace_kf/reports/__init__.py": "module",  # of Python's own protocol for attributes of modules
    "laplace_kf/tape/examples.py": "vmap returned a gradient of shape",  # caught where it is raised
    "laplace_kf/posterior/store.py": "a mean of shape",  # becomes CorruptFile with the path
    "laplace_kf/engine.py": "a sum of block",  # becomes CorruptFile with the path
}


@dataclass(frozen=True)
class Message:
    """One call of an error's class, with everything that is not literal as a hole."""

    file: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.kind}: {self.text}"


def literal(node: ast.AST, constants: dict[str, str]) -> str:
    """The text of an expression, with holes."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part, constants) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left, constants) + literal(node.right, constants)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return re.sub(r"{\w*}", HOLE, literal(node.func.value, constants))
    if isinstance(node, ast.IfExp):
        return " / ".join(filter(None, (literal(part, constants) for part in (node.body, node.orelse))))
    return constants.get(node.id, HOLE) if isinstance(node, ast.Name) else HOLE


@functools.cache
def messages() -> list[Message]:
    """All of them; asked for when tests run, not when they are collected by every process."""
    found = []
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "laplace_kf").rglob("*.py"))}
    constants = {
        target.id: literal(node.value, {})
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value, (ast.Constant, ast.JoinedStr, ast.BinOp))
    }
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args:
                text = literal(node.args[0], constants)
                found.append(Message(str(path.relative_to(ROOT)), node.lineno, node.func.id, text))
    return found


def read() -> list[Message]:
    """One that is nothing but what was said elsewhere is read there."""
    return [one for one in messages() if len(re.findall(r"\w+", one.text)) > 2]


def kept(one: Message) -> bool:
    return one.file in SAID and one.text.startswith((SAID[one.file], HOLE))


def test_messages_are_found() -> None:
    assert len(read()) > 500 and {one.kind for one in read()} >= OWN - {"DistributedFailure"} - BY_CLASS


def test_every_message_says_what_and_a_way_out() -> None:
    short, stuck = [], []
    for one in read():
        if not kept(one):
            words = len(re.findall(r"\w+", one.text.replace(HOLE, "x")))
            elsewhere = one.text.endswith((HOLE, f"{HOLE}."))  # advice that is made elsewhere, and read there
            if not (words > 5 or elsewhere):
                short.append(str(one))
            if not (one.kind in NO_WAY or elsewhere or WAY.search(one.text)):
                stuck.append(str(one))
    assert not short, "too short to say what, what was given and what to do:\n" + "\n".join(short)
    assert not stuck, "no way out:\n" + "\n".join(stuck)


def test_messages_are_one_sentence_of_clean_text() -> None:
    for one in read():
        assert "  " not in one.text.split("\n")[0], str(one)  # code to paste may follow
        assert not re.search(r"\b(TODO|FIXME|XXX|please|sorry|oops)\b", one.text), str(one)


def test_exceptions_are_still_needed() -> None:
    assert all(
        any(one.file == file and one.text.startswith((text, HOLE)) for one in messages()) for file, text in SAID.items()
    )


def test_a_bare_message_is_noticed() -> None:
    tree = ast.parse("raise ValueError(f'bad {x}')").body[0]
    assert literal(tree.exc.args[0], {}) == f"bad {HOLE}"  # type: ignore[attr-defined]
    assert not WAY.search(f"bad {HOLE}") and WAY.search("pass a number")

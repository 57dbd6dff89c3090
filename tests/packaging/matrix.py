"""The quick part of the tests under the oldest and the newest Python, torch and transformers: ``make test-matrix``.

Every row gets a virtual environment under ``.venvs``, which is kept. A Python that is not on this machine is named and
left out; anything else that fails fails the command. What came out is kept beside this file in ``versions.json``, row
by row, and ``--table`` writes ``docs/versions.md`` from it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.packaging.environments import FOLDER, LIMIT, ROOT, kept, output, python

KEPT, PAGE = Path(__file__).with_name("versions.json"), ROOT / "docs" / "versions.md"
# Python, torch, transformers: the oldest together, the newest together; `make test` is what lies between.
ROWS = (
    ("3.10", "torch==2.6.*", "transformers==4.50.*"),
    ("3.13", "torch", "transformers"),
)
NEEDED = ("numpy", "scipy", "safetensors", "tqdm", "pytest>=8", "pytest-timeout", "hypothesis")
SHOWN = ("torch", "transformers", "numpy", "scipy")
QUICK = (
    "tests/test_operators.py", "tests/test_engine.py", "tests/tape", "tests/optim/test_steps.py",
    "tests/posterior/test_saving.py", "tests/posterior/test_golden.py", "tests/resuming/test_sequences.py",
    "tests/contracts/test_curvature.py", "tests/architectures/test_transformers.py",
)  # fmt: skip


def tested(version: str, *packages: str) -> dict[str, str]:
    """What came out for one row: versions that were installed, and ``outcome``."""
    found = python(version)
    if found is None:
        return {"outcome": "not run: there is no such Python here"}
    name = "-".join([version, *(re.sub(r"[=.*]*$", "", p).replace("==", "-") for p in packages)])
    folder = kept(name, found, [*packages, *NEEDED])
    if folder is None:
        return {"outcome": f"not run: not installed here within {LIMIT // 60} minutes"}
    mine = folder / "bin" / "python"
    listed = json.loads(output(mine, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"))
    versions = {row["name"].lower(): row["version"] for row in listed}
    command = [
        mine,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--timeout=0",
        *QUICK,
    ]  # setup.cfg: warnings are errors
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    begun = time.monotonic()
    log = FOLDER / f"{name}.log"
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(command, cwd=ROOT, check=False, stdout=out, stderr=subprocess.STDOUT, env=environment)
    last = next((line for line in reversed(log.read_text(encoding="utf-8").splitlines()) if " in " in line), "")
    outcome = "passed" if done.returncode == 0 else f"failed ({log.relative_to(ROOT)})"
    print(f"{name}: {last}; {time.monotonic() - begun:.0f} s", flush=True)
    counts = re.sub(r" in [\d.:s() ]+$", "", last.strip("= "))
    return {**{p: versions.get(p, "-") for p in SHOWN}, "outcome": outcome, "tests": counts}


def table(rows: dict[str, dict[str, str]]) -> str:
    """``docs/versions.md``."""
    lines = [
        "# Versions that were tried", "",
        "Made by `python tests/packaging/matrix.py --table` from runs of `make test-matrix`: a quick part of the tests",
        "(operators, engine, tape, every structure with every estimator and layer, optimiser steps, files of every",
        "past schema, resumed task sequences, transformers) under the oldest and the newest that is supported.",
        "Warnings of deprecated functions that the package meets are errors.", "",
        f"| Python | asked for | {' | '.join(SHOWN)} | outcome | tests | when, where |",
        "|---|---|" + "---|" * len(SHOWN) + "---|---|---|",
    ]  # fmt: skip
    for version, *packages in ROWS:
        row = rows.get(version, {"outcome": "not run yet"})
        cells = [row.get(key, "") for key in (*SHOWN, "outcome", "tests", "when")]
        lines.append(f"| {version} | {', '.join(packages).replace('*', 'x')} | {' | '.join(cells)} |")
    lines += ["", "The whole suite (`make test`) runs with the Python and torch that the Makefile chooses.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/packaging/matrix.py", description=__doc__)
    parser.add_argument("versions", nargs="*", help="rows by their Python; all by default")
    parser.add_argument("--table", action="store_true", help="only write docs/versions.md from what was run")
    chosen = parser.parse_args()
    rows: dict[str, dict[str, str]] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    for row in ROWS:
        if chosen.table or (chosen.versions and row[0] not in chosen.versions):
            continue
        when = f"{datetime.date.today()}, {platform.system()} {platform.machine()}"
        rows[row[0]] = {**tested(*row), "when": when}
        KEPT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"Python {' '.join(row)}: {rows[row[0]]['outcome']}", flush=True)
    PAGE.write_text(table(rows), encoding="utf-8")
    wrong = ("failed", "not run: not installed")
    sys.exit(any(rows[row[0]]["outcome"].startswith(wrong) for row in ROWS if row[0] in rows))


if __name__ == "__main__":
    main()

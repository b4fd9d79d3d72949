"""The share of small faults in the code that the tests notice, by file, on a sample of them: `make mutants`.

python -m tests.mutants [--sample N --seed S [--resume]] [--before DIR] [--survivors] [--markdown FILE]

With --sample it makes every mutant of the files that pyproject.toml names and draws N of them. For each it runs the
tests that reach it, from the test files named there, the fastest first, and no more than run in BOUND seconds; so the
share is a lower bound. Without --sample it reports the sample that was run last.

Every mutant is equally likely to be drawn, except that those that change only the words of a message (a string in a
`raise` or a warning) are left out: tests check a message's rule and values, not every word. All others count, even
those that no test could tell from the code. A mutant of a function that no test reaches, or that runs only at import,
counts as not noticed.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import accumulate
from pathlib import Path

from scipy.stats import binomtest

from bench import harness

MUTANTS, SAMPLE = Path("mutants"), "sample.json"
BOUND = 60.0  # max seconds of tests per mutant
KILLED, SURVIVED, UNTESTED, TIMEOUT = "killed", "survived", "no test", "timeout"
NOTICED = {KILLED, TIMEOUT}
COLUMNS = {
    "file": "", "mutants": "d", "drawn": "d", "noticed": ".1%", "low": ".1%", "high": ".1%", "survived": "d",
    "no test": "d", "timeout": "d",
}  # fmt: skip
NOTES = f"""from all mutants of these files, without those that change only the words of messages. `noticed` is the
share that made a test fail, or run for much longer (`timeout`); `low` and `high` are its 95 % interval (Wilson). A
mutant runs against the tests that reach it, {BOUND:.0f} s of them, the fastest first. Mutants that no test could tell
from the code, and those on lines that run only at import, count as survived.""".replace("\n", " ")


def outcome(exit_code: int | None) -> str | None:
    """Outcome of a mutant, None if it was not run. The codes are mutmut's."""
    if exit_code is None:
        return None
    return {0: SURVIVED, 33: UNTESTED, 24: TIMEOUT, 36: TIMEOUT, 152: TIMEOUT, 255: TIMEOUT}.get(exit_code, KILLED)


class _Wordless(ast.NodeTransformer):
    """Removes the words of errors and warnings."""

    def __init__(self):
        self.inside = 0

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self._without_words(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = ast.unparse(node.func)
        return self._without_words(node) if name.endswith(("Error", "warn")) else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if self.inside and (isinstance(node.value, str) or node.value is None) else node

    def _without_words(self, node: ast.AST) -> ast.AST:
        self.inside += 1
        node = self.generic_visit(node)
        self.inside -= 1
        return node


def functions(path: Path) -> dict[str, ast.AST]:
    """Every function of a mutated file by name."""
    return {
        node.name: node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }


def is_wording(mutant: ast.AST, original: ast.AST) -> bool:
    """Whether two versions of a function differ only in the words of messages."""
    return _shape(mutant) == _shape(original)


def _shape(function: ast.AST) -> str:
    bare = _Wordless().visit(ast.parse(ast.unparse(function)))
    bare.body[0].name = ""
    return ast.dump(bare)


def outcomes(folder: Path = MUTANTS) -> dict[str, dict[str, str | None]]:
    """File -> mutant -> outcome, including mutants that change only words."""
    return {
        str(meta.with_suffix("").relative_to(folder)): {
            key: outcome(code) for key, code in json.loads(meta.read_text())["exit_code_by_key"].items()
        }
        for meta in sorted(folder.rglob("*.meta"))
    }


def without_wordings(folder: Path = MUTANTS) -> dict[str, list[str]]:
    """File -> its mutants that change more than words."""
    kept = {}
    for name, mutants in outcomes(folder).items():
        known, shapes = functions(folder / name), {}
        for key in mutants:
            short = key.rpartition(".")[2]
            original = re.sub(r"__mutmut_\d+$", "__mutmut_orig", short)
            if original not in shapes:
                shapes[original] = _shape(known[original])
            if _shape(known[short]) != shapes[original]:
                kept.setdefault(name, []).append(key)
    return kept


# The first half of `mutmut run`, for which it has no command.
_PREPARE = """
from mutmut import __main__ as m
m.makedirs("mutants", exist_ok=True)
m.set_mutant_under_test("mutant_generation")
m.copy_src_dir(), m.copy_also_copy_files(), m.setup_source_paths(), m.create_mutants(1)
m.collect_or_load_stats(m.get_mutant_runner(1), apply_config_invalidation=True)
"""


def run(size: int, seed: int, resume: bool) -> None:
    """Draws a sample of all mutants and runs it; `resume` keeps the outcomes of an earlier run."""
    if not resume:
        shutil.rmtree(MUTANTS, ignore_errors=True)
    subprocess.run([sys.executable, "-c", _PREPARE], check=True, stdout=subprocess.DEVNULL)
    _bound_tests()
    kept = without_wordings()
    drawn = sorted(random.Random(seed).sample(sorted(key for keys in kept.values() for key in keys), size))
    counts = {name: len(keys) for name, keys in kept.items()}
    (MUTANTS / SAMPLE).write_text(json.dumps({"seed": seed, "mutants": counts, "drawn": drawn}), encoding="utf-8")
    found = {key: result for results in outcomes().values() for key, result in results.items()}
    todo = [key for key in drawn if found[key] is None]
    if todo:
        mutmut = Path(sys.executable).with_name("mutmut")
        subprocess.run([mutmut, "run", "--max-children", "1", *todo], check=True)


def _bound_tests() -> None:
    """Keeps only the fastest tests that reach a function, as many as run in BOUND seconds, and at least one."""
    path = MUTANTS / "mutmut-stats.json"
    stats = json.loads(path.read_text(encoding="utf-8"))
    seconds, reach = stats["duration_by_test"], stats["tests_by_mangled_function_name"]
    for name, tests in reach.items():
        tests = sorted(tests, key=lambda test: (seconds[test], test))
        total = list(accumulate(seconds[test] for test in tests))
        reach[name] = [test for i, test in enumerate(tests) if i == 0 or total[i] <= BOUND]
    path.write_text(json.dumps(stats), encoding="utf-8")


def rows(folder: Path = MUTANTS) -> tuple[dict, list[dict], list[str]]:
    """(the sample that was run, its rows by file and in total, the names of the mutants that no test noticed)."""
    sample = json.loads((folder / SAMPLE).read_text(encoding="utf-8"))
    drawn, tables, survivors, every = set(sample["drawn"]), [], [], Counter()
    for name, results in outcomes(folder).items():
        if name in sample["mutants"]:
            counts = Counter(result for key, result in results.items() if key in drawn)
            survivors += [key for key, result in results.items() if key in drawn and result not in NOTICED]
            tables.append(row(name, sample["mutants"][name], counts))
            every += counts
    if None in every:
        raise SystemExit(f"{every[None]} mutants of the sample were not run; run it again with --resume")
    return sample, [*tables, row("all", sum(sample["mutants"].values()), every)], survivors


def row(name: str, mutants: int, counts: Counter) -> dict:
    total, noticed = sum(counts.values()), sum(counts[result] for result in NOTICED)
    found = {"file": name, "mutants": mutants, "drawn": total}
    if total:
        low, high = binomtest(noticed, total).proportion_ci(0.95, method="wilson")
        found |= {"noticed": noticed / total, "low": low, "high": high}
    return found | {"survived": counts[SURVIVED], "no test": counts[UNTESTED], "timeout": counts[TIMEOUT]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, metavar="N", help="draw and run N mutants")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument(
        "--resume", action="store_true", help="resume the last run; code and tests must be the same as then"
    )
    parser.add_argument("--before", type=Path, metavar="DIR", help="also report the last sample of this other checkout")
    parser.add_argument("--survivors", action="store_true", help="list mutants that no test noticed")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    if args.sample:
        run(args.sample, args.seed, args.resume)
    sample, table, survivors = rows()
    notes = [f"{len(sample['drawn'])} mutants drawn by seed {sample['seed']} {NOTES}"]
    if args.before:
        old, before, _ = rows(args.before / MUTANTS)
        table += [{**r, "file": f"before: {r['file']}"} for r in before]
        notes.append(f"`before`: {len(old['drawn'])} drawn by seed {old['seed']} from older code with its own tests.")
    if args.survivors:
        print("\n".join(survivors))
    harness.report("Mutants", table, COLUMNS, " ".join(notes), args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What share of small faults in the code the tests notice, by file: `make mutants`, after `mutmut run`.

python -m tests.mutants [--survivors] [--markdown FILE]

A mutant that changes nothing but the words of a message (a string in a `raise` or a warning) is counted apart: tests
hold messages by their rule and values, not by every word.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

MUTANTS = Path("mutants")
KILLED, SURVIVED, UNTESTED, TIMEOUT = "killed", "survived", "no test", "timeout"
NOTICED = {KILLED, TIMEOUT}


def outcome(exit_code: int | None) -> str | None:
    """What became of a mutant, None for one that was not run. Codes are mutmut's."""
    if exit_code is None:
        return None
    return {0: SURVIVED, 33: UNTESTED, 24: TIMEOUT, 36: TIMEOUT, 152: TIMEOUT, 255: TIMEOUT}.get(exit_code, KILLED)


class _Wordless(ast.NodeTransformer):
    """Takes the words out of what is raised or warned of."""

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
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
    return found


def is_wording(mutant: ast.AST, original: ast.AST) -> bool:
    """Whether two versions of a function differ in the words of messages alone."""
    return _shape(mutant) == _shape(original)


def _shape(function: ast.AST) -> str:
    bare = _Wordless().visit(ast.parse(ast.unparse(function)))
    bare.body[0].name = ""
    return ast.dump(bare)


def counted(mutants: Path = MUTANTS) -> tuple[dict[str, Counter], dict[str, Counter], list[str]]:
    """(outcomes by file, the same of wordings, names of survivors that are no wordings)."""
    real, wordings, survivors = {}, {}, []
    for meta in sorted(mutants.rglob("*.meta")):
        source = meta.with_suffix("")
        known = functions(source)
        name = str(source.relative_to(mutants))
        real[name], wordings[name] = Counter(), Counter()
        for key, code in json.loads(meta.read_text())["exit_code_by_key"].items():
            result, short = outcome(code), key.rpartition(".")[2]
            if result is None:
                continue
            original = known[re.sub(r"__mutmut_\d+$", "__mutmut_orig", short)]
            if is_wording(known[short], original):
                wordings[name][result] += 1
            else:
                real[name][result] += 1
                if result not in NOTICED:
                    survivors.append(key)
    return real, wordings, survivors


def share(counts: Counter) -> str:
    total = sum(counts.values())
    return f"{sum(counts[name] for name in NOTICED) / total:.1%}" if total else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--survivors", action="store_true", help="list those that no test noticed")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    real, wordings, survivors = counted()
    lines = [
        "| file | mutants | noticed | survived | no test | noticed, wordings of messages included |",
        "|---|" + "---|" * 5,
    ]
    rows = [(name, real[name], real[name] + wordings[name]) for name in real if real[name] + wordings[name]]
    rows.append(
        ("all", sum(real.values(), Counter()), sum(real.values(), Counter()) + sum(wordings.values(), Counter()))
    )
    for name, counts, every in rows:
        lines.append(
            f"| {name} | {sum(counts.values())} | {share(counts)} | {counts[SURVIVED]} | {counts[UNTESTED]} | "
            f"{share(every)} of {sum(every.values())} |"
        )
    table = "\n".join(lines) + "\n"
    print(table)
    if args.survivors:
        print("\n".join(survivors))
    if args.markdown:
        args.markdown.write_text(table, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

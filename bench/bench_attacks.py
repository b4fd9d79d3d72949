"""Attacks against TextAttack: the same texts, resources and draws give the same results, and how much sooner.

python -m bench.bench_attacks --model DIR [--task sst2] [--n 200] [--attacks textfooler,pwws,deepwordbug,textbugger]
                              [--seed S] [--stock 6] [--environment DIR] [--json] [--markdown FILE]

TextAttack needs transformers 4, so it runs in an environment of its own, which is made on first use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.attack_differences import FIELDS, UNEXPLAINED, cause, counts, differing, traced
from sparsebert import data, environment
from sparsebert.config import AttackConfig
from sparsebert.encoders import token_limit
from sparsebert.engine.classifier import Classifier
from sparsebert.engine.measure import Ratio, Timings, in_order
from sparsebert.errors import InputError, OutputError, UnsupportedError
from sparsebert.ops import _dispatch
from sparsebert.robustness.attacks import recipes
from sparsebert.robustness.attacks.plan import Plan, Unit, Victim, attacked, plans
from sparsebert.robustness.attacks.words import words_of
from sparsebert.robustness.evaluation import order_for

PACKAGES = ("torch==2.13.0", "transformers==4.57.*", "textattack==0.3.11", "langdetect")
PARITY = ("textfooler", "pwws", "deepwordbug", "textbugger")
LEAST = {"textfooler": 0.5, "textbugger": -1.0}  # cosines of the neighbours that the recipe takes
NLTK = {"averaged_perceptron_tagger_eng": "taggers", "universal_tagset": "taggers", "stopwords": "corpora"}
RUNNER = Path(__file__).with_name("textattack_runner.py")
Ask = Callable[[dict], Any]
BLOCKS = 6  # turns of each engine; an interval needs 6
SAME_OUTCOME, SAME_TEXT = 0.98, 0.95  # of the attacked examples, for a time to be reported
COLUMNS = {
    "attack": "", "n": "d", "same_outcome": "d", "same_text": "d", "same_queries": "d", "unexplained": "d",
    "queries": ".1f", "ours_s": ".3f", "padded_s": ".3f", "padded_ratio": ".1f", "padded_low": ".1f",
    "padded_high": ".1f", "stock_s": ".2f", "stock_ratio": ".0f", "stock_low": ".0f", "stock_high": ".0f",
}  # fmt: skip
NOTES = (
    "TextAttack {textattack} with transformers {transformers}, torch {torch} and NLTK {nltk}, its own recipes; the "
    "model {model}, the first {texts} examples of {task}, seed {seed}, {threads} threads. Both have our neighbours, "
    "synonyms, stop words, tagger weights, sentence encoder and random draws; both run in float32. `n`: attacked "
    "examples; of these `same_outcome`, `same_text` (the last one) and `same_queries` are as TextAttack's, and "
    "`unexplained` differ without a number that is closer than float32 can tell. `queries` and `_s`: per attacked "
    "example, in seconds. `padded`: TextAttack, with a wrapper that pads to the longest text of a batch. `stock`: its "
    "HuggingFaceModelWrapper, on {stock} examples. A ratio is the median over {blocks} blocks of examples of "
    "TextAttack's time over ours, both in turn, with its 95 % interval; that of `stock` is its time over `padded`'s on "
    "one example of a block, times `padded`'s over ours on the block."
)


def python_of(folder: Path) -> Path:
    """The Python of an environment with PACKAGES, which is made or completed if need be. UnsupportedError if pip cannot
    install them.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making an environment for TextAttack in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        raise UnsupportedError(
            f"pip cannot install {' '.join(PACKAGES)}: {_last_line(done.stderr)}",
            fix="give --environment DIR, one that has them",
        )
    return python


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def unpack_nltk(folder: Path) -> None:
    """Puts the packages of NLTK that are in SPARSEBERT_DATA where NLTK reads them."""
    root = environment.data_dir()
    for package, kind in NLTK.items():
        packed = None if root is None else root / "attack" / "nltk" / f"{package}.zip"
        if packed is not None and packed.is_file():
            with zipfile.ZipFile(packed) as opened:
                opened.extractall(folder / kind)


@contextmanager
def started(python: Path, setup: dict) -> Iterator[Ask]:
    """Runs bench/textattack_runner.py; yields a function that sends it a request and returns its answer, which raises
    UnsupportedError if it has ended.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack_nltk(folder / "nltk")
        (folder / "post_install_check_3").touch()  # else TextAttack downloads what it has here
        nltk_data = os.pathsep.join([str(folder / "nltk"), *map(str, environment.nltk_data())])
        changed = {
            "TA_CACHE_DIR": name, "NLTK_DATA": nltk_data, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(setup["threads"]), "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        log = folder / "stderr"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [python, RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=kept | changed,
            )  # fmt: skip

            def ask(what: dict) -> Any:
                try:
                    process.stdin.write(json.dumps(what) + "\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
                except BrokenPipeError:
                    line = ""
                if not line:
                    raise UnsupportedError(
                        f"TextAttack ended: {_last_line(log.read_text())}", fix="see what its environment lacks"
                    )
                return json.loads(line)

            try:
                yield ask
            finally:
                process.kill()
                process.communicate()


def setup_for(victim: Victim, made: Sequence[Plan], texts: Sequence[str], seed: int) -> dict:
    """What the runner is told first. Each word of a text is changed once at most, so the tables are of its words."""
    words = sorted({word for text in texts for word in words_of(text)})
    shared = made[0].resources
    lower = sorted({word.lower() for word in words})
    neighbours = {name: {word: shared.neighbours.of(word, least) for word in lower} for name, least in LEAST.items()}
    return {
        "model": str(victim.classifier.directory.absolute()),
        "encoder": str(shared.encoder.directory.absolute()),
        "max_length": token_limit(victim.classifier.config, victim.task.max_length),
        "threads": _dispatch.threads(),
        "seed": seed,
        "neighbours": {
            name: {word: near for word, near in table.items() if near} for name, table in neighbours.items()
        },
        "synonyms": {word: found for word in words if (found := shared.synonyms.of(word))},
    }


def attackable(victim: Victim, n: int) -> list[Unit]:
    """The task's first n test examples that the victim gets right. InputError if there are fewer."""
    examples = data.load(victim.task, victim.task.test)
    right = np.flatnonzero(victim.logits(examples.texts).argmax(1) == examples.labels)
    if len(right) < n:
        raise InputError(
            f"--n must be at most {len(right)}, so many texts the model gets right, got {n}", fix="lower it"
        )
    return [(i, examples.texts[i], None, int(examples.labels[i])) for i in right[:n].tolist()]


def measure(victim: Victim, plan: Plan, units: list[Unit], ask: Ask, stock: int) -> tuple[dict, dict]:
    """(parity, speed) of an attack. Both engines take turns on BLOCKS blocks of examples. With the stock wrapper,
    TextAttack attacks the first example of each of the first `stock` blocks.
    """
    number_of = {unit[0]: i for i, unit in enumerate(units)}

    def ours(part: Sequence[Unit]) -> tuple[list[dict], float]:
        start = time.perf_counter()
        found = sorted(filter(None, attacked(victim, plan, part)), key=lambda row: number_of[row[0]])
        return [row for _, row, _ in found], time.perf_counter() - start

    def theirs(part: Sequence[Unit], **how: bool) -> tuple[list[dict], float]:
        rows = ask(request(victim, plan, part, **how))
        return rows, sum(row["seconds"] for row in rows)

    runs = {"ours": ours, "padded": theirs, "stock": partial(theirs, padded=False)}
    rows: dict[str, list[dict]] = {name: [] for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    ours(units[:1]), theirs(units[:1])  # both read what they need
    for turn, block in enumerate(np.array_split(range(len(units)), BLOCKS)):
        part = [units[i] for i in block]
        for name in in_order(runs, turn):
            if name != "stock" or turn < stock:
                found, took = runs[name](part[:1] if name == "stock" else part)
                rows[name] += found
                seconds[name].append(took)
    parity = {"variant": plan.variant, **counts(rows["ours"], rows["padded"])}
    parity["differences"] = explained(victim, plan, units, rows, ask)
    first = [rows["padded"][block[0]]["seconds"] for block in np.array_split(range(len(units)), BLOCKS)]
    return parity, speed_of(rows, {name: np.array(took) for name, took in seconds.items()}, np.array(first[:stock]))


def request(victim: Victim, plan: Plan, part: Sequence[Unit], *, padded: bool = True, trace: bool = False) -> dict:
    examples = [(text, int(victim.order[label])) for _, text, _, label in part]
    return {"attack": plan.recipe.name, "padded": padded, "trace": trace, "examples": examples}


def speed_of(rows: dict[str, list[dict]], seconds: dict[str, np.ndarray], first: np.ndarray) -> dict:
    """Seconds per attacked example, and TextAttack's time over ours with intervals. seconds: of each block, of `stock`
    of the first example of a block. first: seconds of `padded` on those examples.
    """
    speed = {
        "queries": float(np.mean([row["queries"] for row in rows["ours"]])),
        "ours_s": seconds["ours"].sum() / len(rows["ours"]),
        "textattack_padded_s": seconds["padded"].sum() / len(rows["padded"]),
        "padded_ratio": Timings(seconds).ratio("padded", "ours"),
    }
    if stock := len(first):
        over_ours = {"ours": seconds["ours"][:stock], "stock": seconds["stock"] / first * seconds["padded"][:stock]}
        speed["textattack_stock_s"] = seconds["stock"].mean()
        speed["stock_ratio"] = Timings(over_ours).ratio("stock", "ours")
    return speed


def explained(victim: Victim, plan: Plan, units: list[Unit], rows: dict[str, list[dict]], ask: Ask) -> list[dict]:
    """The examples on which both engines differ: what differs, both last texts, and the cause. Both attack them again
    to find it.
    """
    differ = [i for i, pair in enumerate(zip(rows["ours"], rows["padded"], strict=True)) if differing(*pair)]
    part = [units[i] for i in differ]
    how = dict(traced(victim, plan, part)) if part else {}
    theirs = ask(request(victim, plan, part, trace=True)) if part else []
    found = []
    for i, unit, its in zip(differ, part, theirs, strict=True):
        mine = rows["ours"][i]
        found.append({
            "example": unit[0], "differs": differing(mine, rows["padded"][i]),
            "cause": cause(plan.recipe.name, how[unit[0]], its),
            "ours": {key: mine[key] for key in FIELDS.values()},
            "textattack": {key: rows["padded"][i][key] for key in FIELDS.values()},
        })  # fmt: skip
    return found


def agrees(parity: dict) -> bool:
    """Whether the results are TextAttack's so often that times may be compared."""
    least = {"same_outcome": SAME_OUTCOME, "same_text": SAME_TEXT}
    return all(parity[key] >= share * parity["n"] for key, share in least.items())


def row_of(name: str, parity: dict, speed: dict) -> harness.Row:
    """A row of the table. Without times if the results differ too often."""
    row: harness.Row = {"attack": name, **{key: value for key, value in parity.items() if key in COLUMNS}}
    row["unexplained"] = sum(one["cause"] == UNEXPLAINED for one in parity["differences"])
    for key, value in speed.items():
        short = key.removeprefix("textattack_").removesuffix("_ratio")
        if isinstance(value, Ratio):
            row |= {f"{short}_ratio": value.value, f"{short}_low": value.low, f"{short}_high": value.high}
        else:
            row[short] = value
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a fine-tuned model")
    parser.add_argument("--task", default="sst2", help="a task of single texts (default sst2)")
    parser.add_argument("--n", type=int, default=200, help="attacked examples (default 200)")
    parser.add_argument("--attacks", default=",".join(PARITY), help="some of these (default all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws (default 0)")
    parser.add_argument("--stock", type=int, default=BLOCKS, help=f"examples for the stock wrapper, 0 to {BLOCKS}")
    parser.add_argument("--environment", type=Path, help="environment for TextAttack [default: in the cache]")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    wanted = recipes.named(args.attacks)
    if other := {recipe.name for recipe in wanted} - set(PARITY):
        parser.error(f"--attacks must be among {', '.join(PARITY)}, got {', '.join(sorted(other))}")
    if args.n < BLOCKS or not 0 <= args.stock <= BLOCKS:
        parser.error(f"--n must be at least {BLOCKS} and --stock from 0 to {BLOCKS}, got {args.n} and {args.stock}")
    task = data.get_task(args.task)
    if task.pair:
        parser.error(f"--task must have single texts, {task.name} has pairs")
    folder = args.environment
    if folder is None:
        if (cache := environment.cache_dir()) is None:
            raise OutputError("no place for an environment: this user has no home", fix="give --environment DIR")
        folder = cache / "textattack"
    classifier = Classifier.load(args.model, "cpu")
    if classifier.dtype != "fp32":
        parser.error(f"--model must be in float32, which TextAttack runs, {args.model} is in {classifier.dtype}")
    victim = Victim(classifier, task, order_for(task, classifier.problem, classifier.names, args.model))
    made = plans(wanted, AttackConfig(seed=args.seed), task)
    units = attackable(victim, args.n)
    setup = setup_for(victim, made, [unit[1] for unit in units], args.seed)
    parity: dict[str, dict] = {}
    speed: dict[str, dict] = {}
    clock = harness.Clock(0)
    with started(python_of(folder), setup) as ask:
        versions = ask(setup)
        for plan in made:
            name = plan.recipe.name
            parity[name], speed[name] = measure(victim, plan, units, ask, args.stock if plan is made[0] else 0)
            clock.say(f"{name}: {parity[name]['same_text']} of {args.n} texts are TextAttack's")
            for one in parity[name]["differences"]:
                clock.say(f"{name}, example {one['example']}: other {', '.join(one['differs'])}: {one['cause']}")
    right = {name: agrees(found) for name, found in parity.items()}
    rows = [row_of(name, parity[name], speed[name] if right[name] else {}) for name in parity]
    notes = NOTES.format(
        **versions, model=args.model, texts=units[-1][0] + 1, task=task.name, seed=args.seed,
        threads=setup["threads"], stock=args.stock, blocks=BLOCKS,
    )  # fmt: skip
    first = wanted[0].name
    also = {"versions": versions, "parity": parity, "speed": {"attack": first, **speed[first], "all": speed}}
    harness.report("Attacks against TextAttack", rows, COLUMNS, notes, args.markdown, json_only=args.json, also=also)
    return 0 if all(right.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

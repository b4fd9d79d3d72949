"""How much of a model pruning preserves, inside and outside the domain of its calibration texts.

python -m bench.study_calibration choose --dense agnews=DIR qnli=DIR                      # shares of the mixture
python -m bench.study_calibration report --dense mr=DIR mr=DIR mr=DIR --outside FOLDER    # old against new

The dense models: `sparsebert train minilm --task agnews --n 6000 --epochs 1`, `… --task qnli --n 6000 --epochs 1`, and
for MR `… --task mr --epochs 2 --seed 0` (1, 2).

`choose` compares mixtures, pruning with the default method, on held-out training texts: of the task itself, of other
tasks, and of both joined to long texts. None of its tasks is reported. `report` compares the task's texts alone with
the default mixture, for each method: on the task's test split, on longer texts made of it, on reviews (IMDB by length,
and every file in FOLDER, which bench.make_outside makes, as we may not ship these texts), and on texts that are not
reviews, for which only the distance from the dense model means anything. No reported set has a text of a mixture.

A finished cell is a line of the cells file, and is never computed again. Sets outside the domain are cut to at most 400
texts, chosen with a seed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import stats

from bench import harness
from sparsebert import checkpoint, data
from sparsebert.config import PruneConfig
from sparsebert.data import Examples
from sparsebert.encoders import no_progress
from sparsebert.engine.classifier import Classifier
from sparsebert.jobs import Ledger, code_of, digest
from sparsebert.pruning import draw, prune
from sparsebert.pruning.calibration import SHARES
from sparsebert.robustness.drift import drift, joined

KIND, CODE = "calibration cell", "sparsebert.pruning"
MOST = 400  # max texts of a set outside the domain
OLD, NEW = "task", "mixture"
REVIEWS = "reviews:"
# Name -> (total tokens, shares). 0.6 of 250,000 tokens are the same 150,000 tokens of the task's own texts.
MIXTURES = {
    OLD: (150_000, {"task": 1.0}),
    "task, longer": (250_000, {"task": 0.6, "task, joined": 0.4}),
    "general": (250_000, {"task": 0.6, "others": 0.4}),
    "general, longer": (250_000, {"task": 0.6, "others": 0.1, "others, joined": 0.3}),
    "all": (250_000, {"task": 0.6, "task, joined": 0.15, "others": 0.1, "others, joined": 0.15}),
    "all, fewer own": (250_000, {"task": 0.4, "task, joined": 0.2, "others": 0.15, "others, joined": 0.25}),
    "all, as many": (150_000, {"task": 0.6, "task, joined": 0.15, "others": 0.1, "others, joined": 0.15}),
    NEW: (PruneConfig().calibration_tokens, SHARES),
}
METHODS = {
    "tier 0": {"tier": 0},
    "tier 1": {"tier": 1},
    "tier 2": {"tier": 2},
    "adaptive": {"method": "adaptive"},
    "sparsegpt": {"method": "sparsegpt"},
}


def without_labels(examples: Examples, paired: bool) -> Examples:
    """The texts without labels, in pairs if `paired`, as the model needs them."""
    both = examples.texts, examples.texts_b
    if not paired or examples.texts_b is None:
        both = data.in_pairs(examples.texts, paired)
    return Examples(examples.task, examples.split, *both, None)


def sets_to_choose_on(task: str) -> dict[str, Examples]:
    """Held-out training texts of the task, and training texts of others, without labels."""
    spec = data.get_task(task)
    _, own = data.hold_out(data.load(spec, spec.train), 1000)
    found = {"in domain": own}
    for other in ("agnews", "qnli", "mnli", "qqp"):
        if other != task:
            texts = data.load(data.get_task(other), "train", limit=2 * MOST, seed=1)
            found[f"outside: {other}"] = without_labels(texts, spec.pair)
            if not spec.pair:
                found[f"outside: {other}, 150 words"] = joined(data.load(data.get_task(other), "train"), 150)
    found["outside: own texts, 150 words"] = without_labels(joined(own, 150), spec.pair)
    return found


def sets_to_report(task: str, folder: Path | None) -> dict[str, Examples]:
    """The test split whole, and joined; reviews of other domains and lengths; texts that are not reviews."""
    spec = data.get_task(task)
    test = data.load(spec, spec.test)
    found = {"in domain": test, "longer: own texts, 150 words": joined(test, 150)}
    imdb = data.load(data.get_task("imdb"), "test")
    words = np.array([len(text.split()) for text in imdb.texts])
    found[f"{REVIEWS} imdb, 100 to 199 words"] = imdb.take(np.flatnonzero((words >= 100) & (words < 200)))
    found[f"{REVIEWS} imdb, 200 words"] = imdb.take(np.flatnonzero(words >= 200))
    for path in sorted(folder.glob("*.csv")) if folder else ():
        own = data.get_task(str(path)).own
        both = [own["train"], own["test"]]
        found[f"{REVIEWS} {path.stem.replace('_', ' ')}"] = Examples(
            path.stem, "all", [*both[0].texts, *both[1].texts], None, np.concatenate([part.labels for part in both])
        )
    for other, split in (("agnews", "test"), ("mnli", "dev_matched"), ("qqp", "dev_heldout")):
        texts = data.load(data.get_task(other), split).texts
        found[f"foreign: {other}"] = Examples(other, split, list(dict.fromkeys(texts)), None, None)
    seen = {data.normalised(text) for text in (*data.load(spec, spec.train).texts, *data.general_texts())}
    return {name: without(examples, seen) for name, examples in found.items()}


def without(examples: Examples, seen: set[str]) -> Examples:
    """The examples whose normalised text is not in `seen`."""
    return examples.take([i for i, text in enumerate(examples.texts) if data.normalised(text) not in seen])


@functools.cache
def _sets(which: str, task: str, folder: str) -> dict[str, Examples]:
    return sets_to_choose_on(task) if which == "choose" else sets_to_report(task, Path(folder) if folder else None)


def sets_of(which: str, task: str, folder: str) -> dict[str, Examples]:
    """The sets of a table. Those outside the domain are cut to MOST texts."""
    return {
        name: examples if name == "in domain" else examples.sample(MOST, 0)
        for name, examples in _sets(which, task, folder).items()
    }


def logits(classifier: Classifier, examples: Examples) -> np.ndarray:
    return classifier.predict(examples, max_length=None, progress=no_progress)


def cell(which: str, task: str, directory: Path, mixture: str, method: dict, folder: str, dense: dict) -> dict:
    """Prunes one model. Returns KL, agreement and points from dense on every set."""
    tokens, shares = MIXTURES[mixture]
    config = PruneConfig(calibration_tokens=tokens, **method)
    spec = data.get_task(task)
    examples = data.load(spec, spec.train)
    if which == "choose":
        examples, _ = data.hold_out(examples, 1000)
    model, tokenizer = checkpoint.load(directory)
    longest = spec.max_length if shares.keys() == {"task"} else None
    texts = draw(model, tokenizer, examples, tokens, longest, 0, others=data.general_texts(), shares=shares)
    before = time.process_time()
    result = prune(model, texts, config)
    found: dict = {"seconds": result.seconds, "cpu_seconds": time.process_time() - before, "parts": texts.parts}
    with tempfile.TemporaryDirectory() as place:
        checkpoint.save(model, tokenizer, Path(place) / "m", recipe={"command": "study"}, figures={})
        classifier = Classifier.load(Path(place) / "m")
        for name, examples in sets_of(which, task, folder).items():
            want, got = dense[name], logits(classifier, examples)
            found[name] = drift(classifier.problem, want, got)
            if examples.labels is not None:
                right = [float((each.argmax(1) == examples.labels).mean()) for each in (want, got)]
                found[name] |= {"dense": right[0], "points": right[1] - right[0]}
    return found


def interval(values: list[float]) -> tuple[float, float, float] | tuple[None, None, None]:
    """(mean, low, high): the 95 % t interval over dense models; only the mean for fewer than two."""
    if not values:
        return None, None, None
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def summary(cells: list[tuple[dict, dict]]) -> list[harness.Row]:
    """One row per (task, method, mixture, set): means over dense models, and the distances from the same models
    calibrated on the task's texts alone. `reviews: all` are all review sets together, with equal weights.
    """
    grouped: dict[tuple, dict[str, dict]] = {}
    seconds: dict[tuple, list[float]] = {}
    for inputs, figures in cells:
        sets = {name: found for name, found in figures.items() if isinstance(found, dict) and "kl" in found}
        if reviews := [found for name, found in sets.items() if name.startswith(REVIEWS)]:
            sets[f"{REVIEWS} all"] = together(reviews)
        cell = (inputs["task"], inputs["method"], inputs["mixture"])
        seconds.setdefault(cell, []).append(figures["cpu_seconds"])
        for name, found in sets.items():
            key = (inputs["task"], inputs["method"], name, inputs["mixture"])
            grouped.setdefault(key, {})[inputs["dense"]] = found
    rows: list[harness.Row] = []
    for (task, method, name, mixture), found in grouped.items():
        base = grouped.get((task, method, name, OLD), {})
        pairs = [(found[dense], base[dense]) for dense in found if dense in base]
        logs = interval([log_kl(a) - log_kl(b) for a, b in pairs])
        ratio = [None if part is None else float(np.exp(part)) for part in logs]
        points = [100 * each["points"] for each in found.values() if "points" in each]
        gained = [100 * (a["points"] - b["points"]) for a, b in pairs if "points" in a] if mixture != OLD else []
        gain = interval(gained)
        rows.append({
            "task": task, "method": method, "set": name, "calibrated on": mixture, "models": len(found),
            "n": next(iter(found.values()))["n"], "points": float(np.mean(points)) if points else None,
            "gain": gain[0], "gain low": gain[1], "gain high": gain[2],
            "agreement": 100 * float(np.mean([each["agreement"] for each in found.values()])),
            "kl": float(np.exp(np.mean([log_kl(each) for each in found.values()]))),
            "ratio": ratio[0], "low": ratio[1], "high": ratio[2],
            "cpu s": float(np.mean(seconds[task, method, mixture])),
        })  # fmt: skip
    methods = list(METHODS)
    return sorted(
        rows,
        key=lambda row: (
            row["task"], methods.index(row["method"]), row["set"], list(MIXTURES).index(row["calibrated on"])
        ),
    )  # fmt: skip


def log_kl(found: dict) -> float:
    """log KL; for several sets the mean of their log KL."""
    return float(np.mean(np.log(found["kl"])))


def together(sets: list[dict]) -> dict:
    """Means over sets, but a list of the KL of each set."""
    means = {name: float(np.mean([each[name] for each in sets])) for name in ("agreement", "dense", "points")}
    return {"n": sum(each["n"] for each in sets), "kl": [each["kl"] for each in sets], **means}


COLUMNS = {
    "task": "", "method": "", "set": "", "calibrated on": "", "models": "d", "n": "d", "points": "+.2f",
    "gain": "+.2f", "gain low": "+.2f", "gain high": "+.2f", "agreement": ".1f", "kl": ".4f", "ratio": ".2f",
    "low": ".2f", "high": ".2f", "cpu s": ".0f",
}  # fmt: skip
NOTES = (
    "87.5 % unstructured. `points` of accuracy from the same dense model and `agreement` with it in percent, both "
    "means over dense models; `gain`: the points gained over the same model calibrated on the task's texts alone "
    "(`task`). `kl` is KL(dense ‖ pruned) in nats: the mean over texts, then the geometric mean over dense models, and "
    "for `reviews: all` also over the sets; `ratio` is `kl` over the `kl` of `task`, within a dense model. Intervals "
    "are 95 % (t, over dense models, if there are at least two). Sets outside the domain are seeded subsets of at most "
    "400 texts; `foreign` ones are not reviews, so that only the distance from the dense model counts. `cpu s`: "
    "processor seconds of the pruning, over all threads."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=["choose", "report"])
    parser.add_argument("--dense", nargs="*", default=[], metavar="TASK=DIR", help="dense models")
    parser.add_argument("--outside", type=Path, help="folder of .csv files with text and label")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="for report; default: all")
    parser.add_argument("--mixtures", nargs="+", choices=MIXTURES, help="texts to calibrate on (default: the table's)")
    parser.add_argument("--cells", type=Path, help="file of cells (default: bench/results/calibration_WHICH.jsonl)")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    path = args.cells or Path(f"bench/results/calibration_{args.which}.jsonl")
    book = Ledger(path.with_suffix(".sqlite"))
    if path.exists():
        book.take_over(path)
    code = code_of(CODE)[:12]
    methods = ["tier 1"] if args.which == "choose" else args.methods
    mixtures = args.mixtures or ([OLD, NEW] if args.which == "report" else [name for name in MIXTURES if name != NEW])
    folder = str(args.outside or "")
    for entry in args.dense:
        task, _, directory = entry.partition("=")
        weights = checkpoint.weights_sha256(Path(directory))[:12]
        dense: dict[str, np.ndarray] = {}
        for method, mixture in itertools.product(methods, mixtures):
            inputs = {
                "task": task, "dense": weights, "method": method, "mixture": mixture, "tokens": MIXTURES[mixture][0],
                "shares": MIXTURES[mixture][1], "sets": sorted(sets_of(args.which, task, folder)),
            }  # fmt: skip
            if folder:
                inputs["outside"] = digest([each.sha256 for each in sets_of(args.which, task, folder).values()])

            def compute(task=task, directory=directory, method=method, mixture=mixture, dense=dense) -> dict:
                if not dense:
                    classifier = Classifier.load(directory)
                    found = sets_of(args.which, task, folder)
                    dense.update({name: logits(classifier, examples) for name, examples in found.items()})
                place = Path(directory)
                return {"code": code, **cell(args.which, task, place, mixture, METHODS[method], folder, dense)}

            found = book.once(KIND, inputs, compute)
            book.export(path)
            shown = ", ".join(f"{n}: {v['kl']:.4f}" for n, v in found.items() if isinstance(v, dict) and "kl" in v)
            print(f"{directory} {method} {mixture}: {found['seconds']:.0f} s; {shown}", file=sys.stderr, flush=True)
    cells = book.results(KIND)
    codes = sorted({figures["code"] for _, figures in cells})
    harness.report(
        f"Calibration texts: {args.which}", summary(cells), COLUMNS, f"{NOTES} Code of the cells: {', '.join(codes)}.",
        args.markdown,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

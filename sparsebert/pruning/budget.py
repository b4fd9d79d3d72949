"""Searches for the model that a budget asks for: fast enough here, and hardly less accurate under attack than dense."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from sparsebert import checkpoint, data
from sparsebert.config import AttackConfig, BudgetConfig, PruneConfig, TaskConfig
from sparsebert.encoders import Progress, limited, no_progress, task_for, tokenize
from sparsebert.engine import Engine
from sparsebert.engine.formats import DTYPES
from sparsebert.engine.measure import Ratio, interleave, ratio_text
from sparsebert.errors import InputError, OutputError
from sparsebert.jobs import Ledger, code_of, core_sha256, digest, replacing
from sparsebert.machine import card
from sparsebert.ops import _dispatch
from sparsebert.pruning.calibration import others
from sparsebert.pruning.entry import PruneResult, check, prune_checkpoint, save_stand_in
from sparsebert.robustness import attacks as attacking

SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.875, 0.9, 0.925, 0.95)
# Pattern, whether in int8. The nearer the top, the nearer to the dense model at equal sparsity.
FORMS = (
    ("unstructured", False), ("4x1", True), ("8x1", True), ("16x1", True), ("32x1", True), ("16x1", False),
    ("32x1", False),
)  # fmt: skip
_RECORD = "sparsebert/budget.json"
TIMED = 64  # texts
ROUNDS = 9


@dataclass(frozen=True)
class Candidate:
    """A way to prune. speedup: the dense model's time over its, one text per call, with its 95 % interval. drop: points
    of accuracy under attack below the dense model's, with its interval; None if it was not pruned.
    """

    pattern: str
    sparsity: float
    int8: bool
    speedup: float
    speedup_ci: tuple[float | None, float | None]
    drop: float | None = None
    drop_ci: tuple[float, float] | None = None

    def __str__(self) -> str:
        kind = f"{self.pattern} at {self.sparsity:g}{' in int8' if self.int8 else ''}"
        told = f"{kind}: {ratio_text(self.speedup, self.speedup_ci)}"
        if self.drop is None:
            return told
        low, high = self.drop_ci
        return f"{told}, {self.drop:+.1f} points lost under attack [{low:+.1f}, {high:+.1f}]"


@dataclass(frozen=True)
class Choice:
    """What `search` has chosen. met: whether it keeps within the budget. why: a sentence. result: of the prune.
    candidates: those that are fast enough, the pruned ones with their drop. too_slow: the others at most zeros.
    """

    chosen: Candidate
    met: bool
    why: str
    result: PruneResult
    candidates: list[Candidate]
    too_slow: list[Candidate]

    def as_json(self) -> dict:
        return {**asdict(self), "result": self.result.as_json()}


def search(
    directory: str | Path,
    task: str | TaskConfig,
    output: str | Path,
    config: PruneConfig,
    budget: BudgetConfig,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Choice:
    """Prunes the classifier in `directory` to the first candidate that keeps within the budget, and saves it in
    `output`; if none does, the one that loses least.

    For every form (FORMS) the fewest zeros that reach the speed are found by timing this model's shapes, pruned by
    magnitude, on this machine. These candidates are then pruned as `config` says, those with the fewest zeros first,
    and attacked on training examples that are held out for choices (data.hold_out) and not calibrated on, until one
    loses no more points under attack than the budget allows. Nothing is chosen on the reported split.

    Candidates are kept in `<output>.search`, so that the same call goes on; the folder is removed at the end. Raises
    InputError if config names a pattern or a sparsity, or is refused by `check`, and if no form reaches the speed.
    """
    if config.pattern != "unstructured" or config.sparsity is not None or config.int8:
        raise InputError(
            "the budget chooses pattern, sparsity and int8, some of them are given", fix="leave them out, or the budget"
        )
    if budget.min_speedup is None or budget.max_robust_drop is None:
        raise InputError("a budget needs both min_speedup and max_robust_drop", fix="give both")
    check(config)
    forms = [form for form in FORMS if _may_have(config, *form)]
    directory = checkpoint.resolve(directory)
    target = checkpoint.check_output(output, sources=[directory], overwrite=overwrite)
    spec = limited(task_for(task, directory), checkpoint.load_config(directory), config.max_length)
    examples = data.training(spec)
    hold_out = min(budget.budget_n, len(examples) // 2)
    held = data.hold_out(examples, hold_out)[1]
    (plan,) = attacking.plans(attacking.named([budget.budget_attack]), AttackConfig(max_seconds=None), spec)
    facts = {
        "model": checkpoint.source_sha256(directory), "texts": held.sha256, "machine": card()["cpu"],
        "threads": _dispatch.threads(), "isa": _dispatch.isa(), "code": code_of("sparsebert.pruning.budget"),
        "core": core_sha256(), "min_speedup": budget.min_speedup, "max_length": spec.max_length,
    }  # fmt: skip
    own = digest(others(config.calibration, spec.text_column))  # the content of files, which may change
    key = digest([facts, plan.facts, config.model_dump(), budget.model_dump(), examples.sha256, own])
    if (made := _finished(target, key)) is not None:
        return made
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists and was made by other work", fix="choose another -o, or give --overwrite")
    folder = target.with_name(f"{target.name}.search")
    book = Ledger(folder / "units.sqlite", overwrite=overwrite)
    with contextlib.closing(book):
        fast, slow = _timed(directory, spec, held, book, facts, forms, budget, progress)
    tried: list[tuple[Candidate, Path, PruneResult]] = []
    for candidate in fast:
        path = folder / f"{candidate.pattern}-{candidate.sparsity:g}{'-int8' if candidate.int8 else ''}"
        update = {"pattern": candidate.pattern, "sparsity": candidate.sparsity, "int8": candidate.int8}

        def part(done: int, total: int, what: str = "", of: str = path.name) -> None:
            progress(done, total, f"{of} {what}".strip())

        settings = config.model_copy(update=update)
        result = prune_checkpoint(
            directory, task, path, settings, hold_out=hold_out, overwrite=overwrite, progress=part
        )
        drop, interval = _drop(path, directory, spec, held, plan, part)
        tried.append((Candidate(**{**asdict(candidate), "drop": drop, "drop_ci": interval}), path, result))
        if drop <= budget.max_robust_drop:
            break
    met = tried[-1][0].drop <= budget.max_robust_drop
    chosen, path, result = tried[-1] if met else min(tried, key=lambda each: each[0].drop)
    done = [each for each, _, _ in tried]
    limit = f"{budget.max_robust_drop:g} points under {budget.budget_attack}"
    why = (
        f"of the forms {budget.min_speedup:g} times as fast, the one with the fewest zeros that loses at most {limit}"
        if met
        else f"none of the forms {budget.min_speedup:g} times as fast loses at most {limit}; this one loses least"
    )
    choice = Choice(chosen, met, why, result, done + fast[len(done) :], slow)
    with replacing(target) as staging:
        shutil.copytree(path, staging, dirs_exist_ok=True)
        (staging / _RECORD).write_text(json.dumps({"key": key, **asdict(choice)}))
    shutil.rmtree(folder, ignore_errors=True)
    return choice


def _may_have(config: PruneConfig, pattern: str, int8: bool) -> bool:
    """Whether these settings go with the form."""
    try:
        check(config.model_copy(update={"pattern": pattern, "sparsity": SPARSITIES[0], "int8": int8}))
    except InputError:
        return False
    return True


def _finished(target: Path, key: str) -> Choice | None:
    """What the same search has left in `target`; None if another one or none has."""
    try:
        found = json.loads((target / _RECORD).read_text(encoding="utf-8"))
        if found.pop("key") != key:
            return None
        parts = {name: [_candidate(row) for row in found.pop(name)] for name in ("candidates", "too_slow")}
        chosen, result = _candidate(found.pop("chosen")), PruneResult(**found.pop("result"))
        return Choice(chosen=chosen, result=replace(result, reused=True), **found, **parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _candidate(row: dict) -> Candidate:
    pairs = {name: None if row[name] is None else tuple(row[name]) for name in ("speedup_ci", "drop_ci")}
    return Candidate(**{**row, **pairs})


def _timed(
    directory: Path,
    spec: data.Task,
    held: data.Examples,
    book: Ledger,
    facts: dict,
    forms: list[tuple[str, bool]],
    budget: BudgetConfig,
    progress: Progress,
) -> tuple[list[Candidate], list[Candidate]]:
    """(candidates that reach the speed, those with the fewest zeros first; the other forms at most zeros)."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        stand_ins = StandIns(directory, spec, held, Path(scratch))
        for i, (pattern, int8) in enumerate(forms):
            unit = facts | {"pattern": pattern, "int8": int8}
            found.append(book.once("speed", unit, partial(stand_ins.fewest, pattern, int8, budget.min_speedup)))
            progress(i + 1, len(forms), "time the patterns")
    timed = [_candidate(row) for row in found if row]
    fast = sorted((c for c in timed if c.speedup >= budget.min_speedup), key=lambda c: c.sparsity)  # stable
    slow = [c for c in timed if c.speedup < budget.min_speedup]
    if not fast:
        best = max(slow, key=lambda c: c.speedup)
        raise InputError(
            f"min_speedup {budget.min_speedup:g} is out of reach on this machine, the fastest is {best}",
            fix="ask for less speed",
        )
    return fast, slow


class StandIns:
    """Models of the same shapes and zeros as candidates, pruned by magnitude: as fast, and made in seconds."""

    def __init__(self, directory: Path, spec: data.Task, examples: data.Examples, folder: Path):
        self._directory, self._folder, self._dense = directory, folder, Engine.load(directory, cached=False)
        some = examples.sample(TIMED, 0)
        encoded = tokenize(checkpoint.load_tokenizer(directory), some, spec.max_length)
        self._ids = [row["input_ids"] for row in encoded]
        self._types = [row.get("token_type_ids") or [0] * len(row["input_ids"]) for row in encoded]

    def fewest(self, pattern: str, int8: bool, speedup: float) -> dict:
        """The candidate of this form with the fewest zeros that reach the speed, by bisection over SPARSITIES; if none
        does, the one with the most. Empty if this model or machine has no such form.
        """
        if int8 and not DTYPES["int8"].has_kernel(_dispatch.isa()):
            return {}
        low, high = 0, len(SPARSITIES) - 1
        found = self.time(pattern, SPARSITIES[high], int8)
        if found is None or found.speedup < speedup:
            return {} if found is None else asdict(found)
        while low < high:
            middle = (low + high) // 2
            candidate = self.time(pattern, SPARSITIES[middle], int8)
            if candidate.speedup >= speedup:
                found, high = candidate, middle
            else:
                low = middle + 1
        return asdict(found)

    def time(self, pattern: str, sparsity: float, int8: bool) -> Candidate | None:
        """Its speed-up over the dense model, one text per call. None if the pattern does not fit the model."""
        place = self._folder / "model"
        try:
            save_stand_in(*checkpoint.load(self._directory), place, pattern, sparsity, int8=int8, command="prune")
        except InputError:
            return None
        engine = Engine.load(place, cached=False)
        calls = {"dense": self._calls(self._dense), "sparse": self._calls(engine)}
        timings = interleave(calls, rounds=ROUNDS)
        ratio: Ratio = timings.ratio("dense", "sparse")
        return Candidate(pattern, sparsity, int8, ratio.value, (ratio.low, ratio.high))

    def _calls(self, engine: Engine) -> Callable[[], None]:
        def call() -> None:
            for ids, types in zip(self._ids, self._types, strict=True):
                engine.forward([ids], [types])

        return call


def _drop(
    pruned: Path, dense: Path, spec: data.Task, examples: data.Examples, plan: attacking.Plan, progress: Progress
) -> tuple[float, tuple[float, float]]:
    """(points of accuracy under attack that `pruned` loses, their 95 % interval)."""
    victims = (attacking.Victim.load(directory, "cpu", spec, examples) for directory in (pruned, dense))
    rows = [attacking.run(victim, plan, some, progress) for victim, some in victims]
    figures = attacking.require_few_errors(attacking.figures(plan.variant, *rows))
    low, high = figures["difference_ci"]
    return -100 * figures["difference"], (-100 * high, -100 * low)

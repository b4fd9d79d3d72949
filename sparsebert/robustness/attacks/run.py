"""Attacks a model directory on a task's examples. Every attacked example is a row of a ledger, so that no example is
attacked twice, however a run ends, and several processes can share the work.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy import optimize

from sparsebert import environment, heads, jobs
from sparsebert.data import Examples
from sparsebert.encoders import Progress, no_progress
from sparsebert.errors import OutputError, SparsebertError, SparsebertWarning
from sparsebert.jobs import Ledger
from sparsebert.robustness import statistics
from sparsebert.robustness.attacks import crew
from sparsebert.robustness.attacks.plan import Plan, Unit, Victim

KIND = "attack"
ID = 12  # hex digits of a unit's key that name an attacked example
BLOCK = 16  # examples that are claimed in one step
MOST_ERRORS = 0.01  # share of the examples that may end in an error


def run(victim: Victim, plan: Plan, examples: Examples, progress: Progress = no_progress) -> list[dict]:
    """Attacks the examples. Returns a row for each, in their order: that of `attacked`, with id (the example's number),
    unit (the first digits of its key in the ledger), original, other (the other text of a pair), label (its name) and
    seconds.

    Rows that the ledger has are not computed again, but for those that ended in an error. Examples that another process
    is attacking are waited for; one that was killed holds them for a minute at most. Raises OutputError if the ledger
    cannot be written.
    """
    plan.warn_of_stand_ins()
    path = default_ledger() if plan.config.ledger is None else Path(plan.config.ledger)
    texts, others = examples.texts, examples.texts_b
    if others is not None and not plan.first:
        texts, others = others, texts
    units: list[Unit] = [
        (i, text, None if others is None else others[i], int(examples.labels[i])) for i, text in enumerate(texts)
    ]
    facts = victim.facts | plan.facts
    keys = [facts | {"text": text, "other": other, "label": label} for _, text, other, label in units]
    book = _opened(path, keys)
    try:
        found = _rows(book, victim, plan, units, keys, progress)
    finally:
        book.release()
        book.close()
    code = _code()
    return [
        {
            "id": i, "unit": jobs.key_of(KIND, key, code)[:ID], "original": text,
            **({} if other is None else {"other": other}), "label": victim.task.labels[label], **row,
        } for (i, text, other, label), key, row in zip(units, keys, found, strict=True)
    ]  # fmt: skip


def _code() -> str:
    """The hash of the code that decides what an attack finds: part of every key."""
    return jobs.code_of("sparsebert.robustness.attacks.run")


def default_ledger() -> Path:
    """The ledger of attacks in the user's cache."""
    folder = environment.cache_dir()
    if folder is None:
        raise OutputError("no place for the ledger: this user has no home", fix="name one: --ledger FILE")
    return folder / "attacks.sqlite"


def _opened(path: Path, keys: list[dict]) -> Ledger:
    """The ledger; one that is damaged, in the rows of these keys or as a whole, is moved aside, with a warning."""
    try:
        book = Ledger(path)
        found = book.found(KIND, keys, _code())
        # What was in the way, such as too little memory, may have gone.
        failed = [key for key, row in zip(keys, found, strict=True) if row is not None and row["outcome"] == "error"]
        book.remove(KIND, failed, _code())
        return book
    except jobs.OtherVersion:
        raise
    except OutputError:
        book = Ledger(path, overwrite=True)
        if book.moved is not None:
            warnings.warn(
                f"ledger {path} was damaged and is kept as {book.moved}; a new one is begun",
                SparsebertWarning,
                stacklevel=3,
            )
        return book


def _rows(
    book: Ledger, victim: Victim, plan: Plan, units: list[Unit], keys: list[dict], progress: Progress
) -> list[dict]:
    code = _code()
    found = book.found(KIND, keys, code)
    done = sum(row is not None for row in found)
    progress(done, len(units))
    with crew.of(victim, plan) as work:
        while left := [i for i, row in enumerate(found) if row is None]:
            before = done
            claimed = _claimed(book, [(units[i], keys[i]) for i in left], code)
            for ended in work(claimed):
                book.renew()
                if ended is None:
                    continue
                i, row, seconds = ended
                found[i] = row | {"seconds": round(seconds, 4)}
                book.add(KIND, [(keys[i], found[i], seconds)], code)  # at once: a kill loses nothing that had ended
                done += 1
                progress(done, len(units))
            left = [i for i in left if found[i] is None]
            for i, row in zip(left, book.found(KIND, [keys[i] for i in left], code), strict=True):
                found[i] = row
                done += row is not None
            if done == before:
                time.sleep(0.5)  # another process is at work on what is left
            progress(done, len(units))
    return found


def _claimed(book: Ledger, units: list[tuple[Unit, dict]], code: str) -> Iterator[Unit]:
    """The units that this process may attack. They are claimed as they are taken."""
    for start in range(0, len(units), BLOCK):
        block = units[start : start + BLOCK]
        free = book.claim(KIND, [key for _, key in block], code)
        book.renew()
        yield from (unit for (unit, _), mine in zip(block, free, strict=True) if mine)


def figures(variant: str, rows: Sequence[dict], dense: Sequence[dict] | None = None) -> dict:
    """The figures of an attack, fractions with 95 % intervals, over the examples without an error.

    acc: share that the victim gets right. aua: share that it still gets right after the attack. asr: share of the
    attacked ones that were fooled; None if none was attacked. queries: mean per attacked example. words_changed: mean
    share of the words, of those that were fooled. errors: examples that ended in an error, on the dense model too; they
    are in no figure. capped: attacked examples whose search a limit has ended; they count as not fooled. seconds: of
    all examples.
    With `dense`, the rows of the dense model on the same examples: dense_aua, and difference (aua - dense_aua), paired,
    with its interval and mcnemar_p.
    """
    good = [
        i
        for i, row in enumerate(rows)
        if row["outcome"] != "error" and (dense is None or dense[i]["outcome"] != "error")
    ]
    kept = [rows[i] for i in good]
    n = len(kept)
    held = np.array([row["outcome"] == "failed" for row in kept], dtype=bool)
    tried = [row for row in kept if row["outcome"] in ("succeeded", "failed")]
    fooled = [row for row in tried if row["outcome"] == "succeeded"]
    found: dict = {"variant": variant, "n": n, "errors": len(rows) - n}
    found["capped"] = sum(row["capped"] is not None for row in tried)
    found["seconds"] = round(sum(row["seconds"] for row in rows), 2)
    for name, hits, of in (("acc", len(tried), n), ("aua", int(held.sum()), n), ("asr", len(fooled), len(tried))):
        found |= {name: hits / of if of else None, f"{name}_ci": statistics.wilson(hits, of) if of else None}
    for name, values in (
        ("queries", [row["queries"] for row in tried]), ("words_changed", [row["words_changed"] for row in fooled])
    ):  # fmt: skip
        found[name] = float(np.mean(values)) if values else None
        found[f"{name}_ci"] = statistics.bootstrap_mean(np.array(values)) if values else None
    if dense is not None and n:
        other = np.array([dense[i]["outcome"] == "failed" for i in good], dtype=bool)
        found |= {
            "dense_aua": float(other.mean()),
            "dense_aua_ci": statistics.wilson(int(other.sum()), n),
            "difference": (int(held.sum()) - int(other.sum())) / n,  # exact: limits are set on it
            "difference_ci": statistics.paired_difference(held, other),
            "mcnemar_p": statistics.mcnemar(held, other),
        }
    return found


def require_few_errors(figures: dict) -> dict:
    """The figures; SparsebertError if more than 1 % of the examples ended in an error and are in none of them."""
    errors, n = figures["errors"], figures["n"] + figures["errors"]
    if errors > MOST_ERRORS * n:
        raise SparsebertError(
            f"{errors:,} of {n:,} examples ended in an error under {figures['variant'].split()[0]}",
            fix="attack this model on its own to see them: sparsebert attack DIR -o FILE.parquet",
        )
    return figures


def transferred(
    rows: Sequence[dict], examples: Examples, victim: Victim, first: bool, own: Sequence[dict]
) -> dict | None:
    """How `victim` does on the texts that fooled another model: n of them, those whose original it gets right, and the
    share it also gets right, with its interval. rows: of the other model; own: of the victim, on the same examples.
    first: whether the first text of a pair was attacked. None if there is no such text.
    """
    at = [i for i, (row, mine) in enumerate(zip(rows, own, strict=True))
          if row["outcome"] == "succeeded" and mine["outcome"] in ("succeeded", "failed")]  # fmt: skip
    if not at:
        return None
    items: list = [rows[i]["perturbed"] for i in at]
    if examples.texts_b is not None:
        stays = examples.texts_b if first else examples.texts
        items = [(text, stays[i]) if first else (stays[i], text) for i, text in zip(at, items, strict=True)]
    right = victim.logits(items).argmax(1) == examples.labels[at]
    return {"n": len(at), "accuracy": float(right.mean()), "accuracy_ci": statistics.wilson(int(right.sum()), len(at))}


def temperature(logits: np.ndarray, dense: np.ndarray) -> float:
    """The number by which to divide `logits` [n, labels] to give them the mean largest probability of `dense`."""
    wanted = heads.softmax(dense).max(1).mean()

    def excess(power: float) -> float:
        return heads.softmax(logits / np.exp(power)).max(1).mean() - wanted

    low, high = -5.0, 5.0  # e^±5
    if excess(low) < 0 or excess(high) > 0:
        return float(np.exp(low if excess(low) < 0 else high))
    return float(np.exp(optimize.brentq(excess, low, high)))

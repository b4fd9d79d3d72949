"""Domain shift: other labelled sets with the model's labels, without the texts that the task has too.

Nothing about them is made to mislead, as the out-of-distribution tests (ood.py) are: film reviews of another source
beside those of the task.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sparsebert import checkpoint, data, heads
from sparsebert.config import TaskConfig
from sparsebert.data import Examples, Task
from sparsebert.encoders import task_for
from sparsebert.errors import InputError, shown
from sparsebert.heads import Problem
from sparsebert.robustness.evaluation import order_for

ALL = "all"
CHALLENGES = {test: name for name, task in data.TASKS.items() for test in task.ood}  # OOD test -> one of its tasks


def named(task: Task, names: str, model: str | Path) -> tuple[Task, ...]:
    """The domains that `names` lists, separated by commas, each once: known tasks; files and folders of the user's own,
    of a file all rows; and for "all" every known task at hand (data.at_hand) with the label names of the classifier in
    directory `model`.

    Raises InputError for a name that is no set, and for a set that is the task itself or an OOD test, that has pairs
    where the task has single texts (or the reverse), or other labels than the model, and if "all" finds none; DataError
    for files that cannot be understood.
    """
    directory = checkpoint.resolve(model)
    config = checkpoint.read_config(directory)
    labels = heads.label_names(config)
    whose = (heads.problem_of(config), labels, str(directory))
    # A three-way model may be evaluated on two classes, if they are named: "all" takes the same label names alone.
    same = {name: of for name, of in data.TASKS.items()
            if len(of.labels) == len(labels) and _misfit(task, of, *whose) is None}  # fmt: skip
    found: dict[str | Path, Task] = {}
    for name in map(str.strip, names.split(",")):
        if name == ALL:
            found |= {other: of for other, of in same.items() if data.at_hand(of, of.test)}
            continue
        of = _read(name, model, task, same)
        if (refused := _misfit(task, of, *whose)) is not None:
            raise refused
        found.setdefault(of.folder or name, of)
    if not found:
        alike = {of.labels for of in data.TASKS.values()
                 if len(of.labels) == len(labels) and of.pair == task.pair and data.at_hand(of, of.test)}  # fmt: skip
        others = "; ".join(", ".join(names) for names in sorted(alike - {tuple(labels)}))
        raise InputError(
            f"domains {ALL} found none: no other set of the labels {', '.join(labels)} is on this machine"
            + (f", only of {others}" if others else ""),
            fix="call the model's labels as a set does (sparsebert reseal), and yours in the file"
            if others
            else "set SPARSEBERT_DATA, or name a file of your own",
        )
    return tuple(found.values())


def of_task(task: Task) -> list[Examples]:
    """The splits of the task that domains must share no text with, without labels: the training split, the reported one
    and others at hand (of the 1,298 sentences of MR that SST-2 neither trains nor reports on, 757 are in its test
    split). If only the reported one is at hand, it is the only one.
    """
    splits = [task.test]
    # A reported split that is not at hand is from `datasets`, which has the training split too.
    if task.train is not None and (data.at_hand(task, task.train) or not data.at_hand(task, task.test)):
        splits.insert(0, task.train)
    splits += [split for split in ("dev", "test") if split not in splits and data.at_hand(task, split)]
    return [data.load(replace(task, labelled=False), split) for split in splits]


def unshared(domain: Task, known: list[Examples]) -> Examples:
    """The domain's reported split without the examples that are also in `known` (data.apart). InputError if none is
    left; otherwise raises as data.load does.
    """
    examples = data.apart(data.load(domain, domain.test), *known)
    if not len(examples):
        splits = " or ".join(other.split for other in known)
        raise InputError(
            f"all {examples.left_out:,} examples of domain {domain.name!r} are also in {known[0].task!r}, {splits}",
            fix="leave it out",
        )
    return examples


def _read(name: str, model: str | Path, task: Task, same: dict[str, Task]) -> Task:
    """The set called `name`; one of the user's own keeps the name that the user gave. It may have the columns that were
    named for the task.
    """
    asked = TaskConfig(task=name, text_column=task.text_column, label_column=task.label_column)
    try:
        of = task_for(asked, model, beside=True) if name else None
    except InputError:
        of = None
    if of is None:
        raise InputError(
            f"domains must be {ALL}, or sets separated by commas, got {shown(name)}",
            fix=f"choose from {', '.join([*same, ''])}files and folders of your own",
        )
    return of if of.own is None else replace(of, name=name)


def _misfit(task: Task, of: Task, problem: Problem, labels: tuple[str, ...], whose: str) -> InputError | None:
    """Why `of` is no domain for the task and the model; None if it is one."""
    if of.folder == task.folder if of.own is not None else (task.own is None and of.name == task.name):
        return InputError(f"domains must be other sets than the task, got {of.name!r}", fix="leave it out")
    if of.own is None and of.name in CHALLENGES:
        return InputError(
            f"domains must not be out-of-distribution tests, got {of.name!r}",
            fix=f"use --ood {of.name}, of a task such as {CHALLENGES[of.name]}",
        )
    if of.pair != task.pair:
        has, wants = ("pairs", "single texts") if of.pair else ("single texts", "pairs")
        return InputError(f"domain {of.name!r} has {has}, the task {task.name!r} {wants}", fix="leave it out")
    try:
        if of.own is not None:  # it may show some of the labels only
            of = data.among(of, data.load(of, of.test), labels)[0]
        order_for(of, problem, labels, whose)
    except InputError as error:
        return InputError(f"domain {of.name!r}: {error.problem}", fix=f"leave it out, or {error.fix}")
    return None

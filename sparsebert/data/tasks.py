"""The table of tasks that the package knows: label names, single texts or pairs, metric, splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsebert.data.examples import Examples

SENTIMENT = ("negative", "positive")
NLI = ("entailment", "neutral", "contradiction")
ENTAILMENT = ("entailment", "not_entailment")
PARAPHRASE = ("different", "paraphrase")
FACT = ("SUPPORTS", "REFUTES")


@dataclass(frozen=True)
class Hub:
    """Where `datasets` finds a task: path, configuration, text columns, and its name for each of our splits."""

    path: str
    name: str | None
    columns: tuple[str, ...]
    splits: dict[str, str]


@dataclass(frozen=True)
class Task:
    """One classification task.

    labels: names, index = label; empty for one logit and for unlabelled texts.
    train, test: the split to train on (None if there is none) and the split to report on.
    metric: "accuracy", or "f1" if the field also reports F1 of class 1.
    three_way: a three-way NLI model may be evaluated here; its classes neutral and contradiction count as class 1.
    max_length: max tokens per text, special ones included; None for as many as the model takes.
    ood: tasks on which a model of this task is tested out of distribution.
    ood_train: (task, split, times) of training examples for an upper bound there.
    bias: the bias model that debiased losses use by default (training.bias).
    groups: the column that names the kind of each example, if figures are wanted per kind.
    problem: the name of the problem type, of heads.PROBLEMS.
    labelled: whether labels were requested; if not, the examples have none.

    For the user's own task:

    folder: its folder or file. own: its examples by split. by_hash: whether one file was split by a hash of its texts.
    columns: those that its reported split was read by, texts first. text_column, label_column: those that were named
    (TaskConfig).
    """

    name: str
    labels: tuple[str, ...]
    train: str | None
    test: str
    pair: bool = False
    metric: str = "accuracy"
    three_way: bool = False
    max_length: int | None = 128
    ood: tuple[str, ...] = ()
    ood_train: tuple[tuple[str, str, int], ...] = ()
    bias: str | None = None
    groups: str | None = None
    problem: str = "single_label"
    hub: Hub | None = None
    folder: Path | None = field(default=None, compare=False)
    own: dict[str, Examples] | None = field(default=None, compare=False, repr=False)
    labelled: bool = True
    by_hash: bool = False
    columns: tuple[str, ...] = ()
    text_column: tuple[str, ...] = ()
    label_column: str | None = None


def _glue(name: str, columns: tuple[str, ...], test: str, hub_test: str = "validation") -> Hub:
    return Hub("nyu-mll/glue", name, columns, {"train": "train", test: hub_test})


# hans, paws_qqp, fever and fever_symm are on the hub as loading scripts or not at all; `datasets` can read neither.
# Known overlaps: 702 of 2,000 mr/test sentences are in sst2/train; neither task is an out-of-distribution test of the
# other. Examples that a task would both train and report on are left out of training (examples.training): 123 reviews
# of imdb, 19 sentences of cola, 5 of sst2, 1 each of mr, qqp and mrpc; of the 708 pairs of fever_symm_v2/dev that
# --mix-ood adds, the 354 that are in fever_symm_v1/test (3 of them in fever_symm_v2/test too).
_TABLE = (
    Task("mr", SENTIMENT, "train", "test"),
    Task("sst2", SENTIMENT, "train", "dev", hub=_glue("sst2", ("sentence",), "dev")),
    Task("imdb", SENTIMENT, "train", "test", max_length=256,
         hub=Hub("stanfordnlp/imdb", None, ("text",), {"train": "train", "test": "test"})),
    Task("agnews", ("World", "Sports", "Business", "Sci/Tech"), "train", "test", max_length=256,
         hub=Hub("fancyzhx/ag_news", None, ("text",), {"train": "train", "test": "test"})),
    Task("mnli", NLI, "train", "dev_matched", pair=True, bias="overlap",
         ood=("hans",), ood_train=(("hans", "train", 1),),
         hub=_glue("mnli", ("premise", "hypothesis"), "dev_matched", "validation_matched")),
    Task("snli", NLI, "train", "dev", pair=True, bias="overlap",
         ood=("hans",), ood_train=(("hans", "train", 1),),
         hub=Hub("stanfordnlp/snli", None, ("premise", "hypothesis"), {"train": "train", "dev": "validation"})),
    Task("hans", ENTAILMENT, "train", "test", pair=True, three_way=True, groups="heuristic"),
    Task("rte", ENTAILMENT, "train", "dev", pair=True, three_way=True, bias="overlap",
         hub=_glue("rte", ("sentence1", "sentence2"), "dev")),
    Task("qnli", ENTAILMENT, "train", "dev", pair=True, hub=_glue("qnli", ("question", "sentence"), "dev")),
    # dev_heldout is cut from the official training rows. It is not the official dev set, which has no name here.
    Task("qqp", PARAPHRASE, "train", "dev_heldout", pair=True, metric="f1", bias="overlap",
         ood=("paws_qqp", "paws_wiki"),
         ood_train=(("paws_wiki", "dev", 1),),  # the training splits of PAWS are not available
         hub=Hub("nyu-mll/glue", "qqp", ("question1", "question2"), {"train": "train"})),
    Task("mrpc", PARAPHRASE, "train", "dev", pair=True, metric="f1", bias="overlap",
         hub=_glue("mrpc", ("sentence1", "sentence2"), "dev")),
    Task("paws_qqp", PARAPHRASE, None, "dev_and_test", pair=True, metric="f1"),
    Task("paws_wiki", PARAPHRASE, "dev", "test", pair=True, metric="f1",
         hub=Hub("google-research-datasets/paws", "labeled_final", ("sentence1", "sentence2"),
                 {"dev": "validation", "test": "test"})),
    Task("fever", FACT, "train", "dev", pair=True, bias="claim", ood=("fever_symm_v1", "fever_symm_v2"),
         ood_train=(("fever_symm_v2", "dev", 10),)),
    Task("fever_symm_v1", FACT, None, "test", pair=True),
    Task("fever_symm_v2", FACT, "dev", "test", pair=True),
    Task("cola", ("unacceptable", "acceptable"), "train", "dev", hub=_glue("cola", ("sentence",), "dev")),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _TABLE}

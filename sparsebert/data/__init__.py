"""Tasks and their examples: the table of known ones, and files of the user's own.

A task may be a folder with `train` and `test`, or one file, as .parquet, .csv, .tsv or .jsonl with the columns
`text`[, `text_b`] and `label`.
"""

from sparsebert.data.examples import (
    Examples,
    among,
    general_texts,
    hold_out,
    in_pairs,
    load,
    mix_ood,
    normalised,
    same_groups,
    sameness,
    training,
    unreported_texts,
    word_neighbors,
)
from sparsebert.data.own import get_task, rows_read
from sparsebert.data.tasks import ENTAILMENT, FACT, NLI, PARAPHRASE, SENTIMENT, TASKS, Task

__all__ = [
    "ENTAILMENT",
    "FACT",
    "NLI",
    "PARAPHRASE",
    "SENTIMENT",
    "TASKS",
    "Examples",
    "Task",
    "among",
    "general_texts",
    "get_task",
    "hold_out",
    "in_pairs",
    "load",
    "mix_ood",
    "normalised",
    "rows_read",
    "same_groups",
    "sameness",
    "training",
    "unreported_texts",
    "word_neighbors",
]

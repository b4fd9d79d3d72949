"""Tasks and their examples: the table of known ones, and files of the user's own.

A task may be a folder with `train` and `test`, or one file, as .parquet, .csv, .tsv or .jsonl with the columns
`text`[, `text_b`] and `label`.
"""

from sparsebert.data.examples import (
    Examples,
    as_values,
    hold_out,
    load,
    mix_ood,
    normalised,
    sameness,
    training,
    unreported,
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
    "as_values",
    "get_task",
    "hold_out",
    "load",
    "mix_ood",
    "normalised",
    "rows_read",
    "sameness",
    "training",
    "unreported",
    "word_neighbors",
]

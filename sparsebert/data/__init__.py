"""Tasks and their examples: the table of known tasks, and the user's own files.

A task of the user's own is a folder with `train` and `test`, or one file. Files are .parquet, .csv, .tsv or .jsonl with
the columns `text`[, `text_b`] and `label`, or those that a TaskConfig names.
"""

from sparsebert.data.examples import (
    Examples,
    among,
    apart,
    at_hand,
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
    word_table,
)
from sparsebert.data.own import get_task, rows_read
from sparsebert.data.tables import OF_TEXTS, lines_of, read_texts
from sparsebert.data.tasks import ENTAILMENT, FACT, NLI, PARAPHRASE, SENTIMENT, TASKS, Task

__all__ = [
    "ENTAILMENT",
    "FACT",
    "NLI",
    "OF_TEXTS",
    "PARAPHRASE",
    "SENTIMENT",
    "TASKS",
    "Examples",
    "Task",
    "among",
    "apart",
    "at_hand",
    "general_texts",
    "get_task",
    "hold_out",
    "in_pairs",
    "lines_of",
    "load",
    "mix_ood",
    "normalised",
    "read_texts",
    "rows_read",
    "same_groups",
    "sameness",
    "training",
    "unreported_texts",
    "word_neighbors",
    "word_table",
]

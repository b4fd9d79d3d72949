"""A training step of MiniLM-L6 against stock `transformers.Trainer`: batches of 32 texts of at most 128 tokens.

python -m bench.bench_train [--texts mnli|full] [--precision bf16 fp32] [--rounds N] [--steps N] [--json]
                            [--markdown FILE]

`mnli`: MNLI's training pairs, 35 tokens on average; `full`: 128 random tokens per text, so that there is no padding to
avoid. The variants take turns. A turn is an epoch, so that each variant has the same texts, however it batches them.
Grouping by length needs many texts: the Trainer groups within a quarter of the epoch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import greenlet
import numpy as np
import torch
import transformers

from bench import harness
from sparsebert import checkpoint, data
from sparsebert.config import TrainConfig
from sparsebert.encoders import bucketed, collate, tokenize
from sparsebert.engine.measure import interleave
from sparsebert.training.loop import TrainingLoop
from sparsebert.training.losses import Targets

BATCH, LENGTH = 32, 128
COLUMNS = {
    "variant": "", "precision": "", "step_ms": ".0f", "spread": ".0%", "times_ours": ".2f", "low": ".2f", "high": ".2f",
    "loss_difference": ".1e",
}  # fmt: skip
NOTES = (
    "`step_ms` is the median over rounds of the mean time of a step (forward, backward, clipping, AdamW) with dropout, "
    "in an epoch of the same texts; `times_ours` the median over rounds of that time over the first row's, with a 95 % "
    "interval (order statistics). Before timing, every variant's loss is compared with the first row's on the same "
    "batch without dropout."
)


def texts(which: str, tokenizer, n: int) -> tuple[list[dict], np.ndarray]:
    """(token ids, labels) of n texts."""
    rng = np.random.default_rng(0)
    if which == "mnli":
        task = data.get_task("mnli")
        examples = data.load(task, task.train, limit=n)
        return tokenize(tokenizer, examples, LENGTH), examples.labels
    ids = rng.integers(1000, 30000, (n, LENGTH))
    return [{"input_ids": row.tolist(), "attention_mask": [1] * LENGTH} for row in ids], rng.integers(0, 3, len(ids))


def model_of():
    torch.manual_seed(0)
    return checkpoint.load("minilm", num_labels=3)


def ours(encoded: list[dict], labels: np.ndarray, precision: str, epochs: int) -> tuple[Callable[[], None], object]:
    """(a call that does the next step, its model)."""
    model, tokenizer = model_of()
    plan = [rows for epoch in range(epochs) for rows in bucketed(encoded, BATCH, np.random.default_rng(epoch))]
    run = TrainingLoop(model, TrainConfig(precision=precision), len(plan))
    targets = Targets(torch.from_numpy(labels))
    upcoming = iter(plan)

    def step() -> None:
        rows = next(upcoming)
        run.advance(collate(tokenizer, encoded, rows), targets[torch.from_numpy(rows)])

    return step, model


def stock(
    encoded: list[dict], labels: np.ndarray, precision: str, epochs: int, folder: Path, padding: str, grouped: bool
) -> tuple[Callable[[], None], object]:
    """The same for `Trainer`, which is paused between steps."""
    model, tokenizer = model_of()
    rows = [{**row, "labels": int(label)} for row, label in zip(encoded, labels, strict=True)]
    outer = greenlet.getcurrent()

    class Gate(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            outer.switch()

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, num_train_epochs=epochs, bf16=precision == "bf16",
        learning_rate=5e-5, weight_decay=0.01, report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True,
        disable_tqdm=True, train_sampling_strategy="group_by_length" if grouped else "random",
    )  # fmt: skip
    collator = transformers.DataCollatorWithPadding(tokenizer, padding=padding, max_length=LENGTH)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, data_collator=collator, callbacks=[Gate()], processing_class=tokenizer
    )
    inner = greenlet.greenlet(trainer.train)
    inner.switch()  # runs until before the first step

    return inner.switch, model


def loss_of(model, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        loss = model(**batch, labels=labels).loss.item()
    model.train()
    return loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", choices=["mnli", "full"], default="mnli")
    parser.add_argument("--precision", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=50, help="steps per epoch, which is one turn")
    parser.add_argument("--json", action="store_true", help="print the JSON document alone")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    _, tokenizer = model_of()
    encoded, labels = texts(args.texts, tokenizer, args.steps * BATCH)
    epochs = args.rounds + 2  # one to warm up, one that is not finished
    with tempfile.TemporaryDirectory() as folder:
        made = {("ours", p): ours(encoded, labels, p, epochs) for p in args.precision}
        kinds = {"Trainer": ("longest", False)}
        if args.texts == "mnli":
            kinds["Trainer, grouped by length"] = ("longest", True)
        for name, (padding, grouped) in kinds.items():
            for precision in args.precision:
                made[name, precision] = stock(encoded, labels, precision, epochs, Path(folder), padding, grouped)
        batch = collate(tokenizer, encoded, range(BATCH))
        wanted = torch.from_numpy(labels[:BATCH])
        losses = {key: loss_of(model, batch, wanted) for key, (_, model) in made.items()}
        first = next(iter(made))
        differences = {key: abs(loss - losses[first]) for key, loss in losses.items()}
        # Under bf16 the Trainer's model runs in autocast here too.
        assert max(differences.values()) < 1e-3, f"the variants must train one model, losses differ: {differences}"
        timings = interleave({key: step for key, (step, _) in made.items()}, args.rounds, warmup=1, repeats=args.steps)
    rows = []
    for key in made:
        ratio = timings.ratio(key, first)
        rows.append({
            "variant": key[0], "precision": key[1], "texts": args.texts, "step_ms": timings.median(key) * 1e3,
            "spread": timings.spread(key), "times_ours": ratio.value, "low": ratio.low, "high": ratio.high,
            "loss_difference": differences[key],
        })  # fmt: skip
    title = f"A training step of MiniLM-L6, batches of 32, {args.texts} texts"
    harness.report(title, rows, COLUMNS, NOTES, args.markdown, json_only=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tuned models of a recipe, their greedy average and the plain mean of all, on the reported split of a task.

python -m bench.study_soup -o DIR [--model minilm] [--task sst2] [--recipe quick-soup] [--json] [--markdown FILE]

Resumes as `sparsebert train --recipe` does. Nothing is selected on the reported split: the models are sorted, and
accepted into the greedy average, by the loss under embedding perturbation on the examples that no model trained on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import harness
from sparsebert import checkpoint, data, encoders
from sparsebert.cli.output import progress
from sparsebert.robustness.evaluation import compare
from sparsebert.training.recipe import read_recipe, train_recipe
from sparsebert.training.soup import accuracy, mean, perturbed, soup

COLUMNS = {
    "model": "", "settings": "", "minutes": ".0f", "held_accuracy": ".2f", "held_perturbed": ".4f",
    "accuracy": ".2f", "low": ".2f", "high": ".2f", "perturbed": ".4f", "averaged": "",
}  # fmt: skip
NOTES = (
    "`held_` figures are on the {held} training sentences that no model saw, on which the greedy average was chosen; "
    "`accuracy` (percent, with its 95 % interval) and `perturbed` are on the reported split, {n} sentences. "
    "`perturbed`: mean loss with word embeddings moved against the model by FreeLB's steps; lower is better. "
    "`minutes`: fine-tuning time, on a machine that may have been busy with other work; {total:.0f} in total."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the models and their average")
    parser.add_argument("--model", default="minilm", help="model to fine-tune (default minilm)")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--recipe", default="quick-soup")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    configs = read_recipe(args.recipe)
    with progress("fine-tune") as update:
        trained = train_recipe(args.model, args.task, args.output / "models", args.recipe, progress=update)
    with progress("average") as update:
        greedy = soup([r.directory for r in trained.values()], args.task, args.output / "soup", progress=update)
    spec = data.get_task(args.task)
    _, held = data.hold_out(data.training(spec), min(c.hold_out for c in configs.values()))
    reported = data.load(spec, spec.test)

    def figures(model, tokenizer) -> harness.Row:
        found = compare(spec, reported, encoders.predict(model, tokenizer, reported, max_length=spec.max_length))
        return {
            "held_accuracy": 100 * accuracy(model, tokenizer, held, spec),
            "accuracy": 100 * found.accuracy, "low": 100 * found.accuracy_ci[0], "high": 100 * found.accuracy_ci[1],
            "perturbed": -perturbed(model, tokenizer, reported, spec),
        }  # fmt: skip

    rows, states = [], []
    for name, result in trained.items():
        model, tokenizer = checkpoint.load(result.directory)
        states.append(model.state_dict())
        given = configs[name].model_dump(exclude_defaults=True, exclude={"hold_out"})
        rows.append({
            "model": name, "settings": ", ".join(f"{key} {value}" for key, value in given.items()),
            "minutes": result.seconds / 60, "held_perturbed": -greedy.scores[str(result.directory)],
            **figures(model, tokenizer), "averaged": str(result.directory) in greedy.members,
        })  # fmt: skip
    model, tokenizer = checkpoint.load(args.output / "soup")
    rows.append({"model": "greedy average", "held_perturbed": -greedy.score, **figures(model, tokenizer)})
    model.load_state_dict(mean(states))
    rows.append({"model": "mean of all", **figures(model, tokenizer)})
    notes = NOTES.format(held=len(held), n=len(reported), total=sum(result.seconds for result in trained.values()) / 60)
    title = f"Fine-tuning {args.model} on {args.task}: {args.recipe} and its averages"
    harness.report(title, rows, COLUMNS, notes, args.markdown, json_only=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Soup: one model made from several fine-tuned ones, by greedy averaging of their weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from sparsebert import checkpoint, data
from sparsebert.config import AttackConfig, TaskConfig, TrainConfig
from sparsebert.data import Examples, Task
from sparsebert.encoders import Progress, batches, limited, no_progress, predict, task_for, tokenize
from sparsebert.errors import InputError
from sparsebert.heads import PROBLEMS
from sparsebert.jobs import Job
from sparsebert.training import adversarial
from sparsebert.training.losses import Targets
from sparsebert.training.setup import own_classifier, read_by, task_recipe

ATTACKED = 300  # held-out examples that are attacked for a score


@dataclass(frozen=True)
class SoupResult:
    """Figures of a soup. members: the averaged directories, in the order in which they were accepted. scores: of each
    candidate alone, by directory. score: of the average. All scores are on the held-out examples; higher is better.
    """

    members: list[str]
    scores: dict[str, float]
    score: float
    weights_sha256: str = ""

    def as_json(self) -> dict:
        return asdict(self)


def accuracy(model, tokenizer, examples: Examples, task: Task) -> float:
    """The metric of the problem type; for one label per text, the share of the examples that the model gets right."""
    logits = predict(model, tokenizer, examples, max_length=task.max_length)
    return PROBLEMS[task.problem].metric(logits, examples.labels)


def perturbed(model, tokenizer, examples: Examples, task: Task) -> float:
    """Minus the mean loss when each text's word embeddings are moved against the model, by the steps of FreeLB."""
    encoded = tokenize(tokenizer, examples, task.max_length)
    targets = Targets(torch.from_numpy(examples.labels), problem=PROBLEMS[task.problem])
    model.eval().requires_grad_(False)
    total = 0.0
    for rows, batch in batches(tokenizer, encoded, 64):
        total += len(rows) * adversarial.perturbed_loss(model, batch, targets[rows], TrainConfig())
    return -total / len(examples)


def attacked(model, tokenizer, examples: Examples, task: Task) -> float:
    """Accuracy under TextFooler on a random 300 of the examples, the same for every model. [Li et al. 2023, Algorithm
    3] The attack runs on a saved copy of the model, on the engine; attacked examples are kept in the user's cache.
    """
    from sparsebert.robustness import attacks

    (plan,) = attacks.plans(attacks.named("textfooler"), AttackConfig(max_seconds=None), task)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        checkpoint.save(model, tokenizer, place, recipe={"command": "soup"}, figures={})
        victim, some = attacks.Victim.load(place, "cpu", task, examples.sample(ATTACKED, 0))
        return attacks.require_few_errors(attacks.figures(plan.variant, attacks.run(victim, plan, some)))["aua"]


# The scores that candidates are ordered and accepted by; higher is better.
SCORES: dict[str, Callable[..., float]] = {"accuracy": accuracy, "perturbed": perturbed, "attacked": attacked}


def soup(
    directories: list[str | Path],
    task: str | TaskConfig,
    output: str | Path,
    *,
    score: str = "perturbed",
    max_length: int | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> SoupResult:
    """Greedy weight averaging: candidates are tried in falling order of their score. Each is added if the uniform mean
    of all accepted ones and itself scores no worse. [Li et al. 2023, Algorithm 3; Wortsman et al. 2022]

    directories: at least one model fine-tuned by `train` on `task`. All must have the same start and the same
    `hold_out`: the score is taken on the examples that none of them was trained on. Writes the average to `output`. A
    repeated call returns at once if `output` is finished; otherwise it takes the scores that are already in
    `<output>.partial`. Files of other work in either place are refused, unless `overwrite`. Raises InputError for
    models that do not belong together, and OutputError when writing fails.
    """
    if score not in SCORES:
        raise InputError(f"score must be one of {', '.join(SCORES)}, got {score!r}", fix="choose one of these")
    sources = [checkpoint.resolve(directory) for directory in directories]
    spec = task_for(task, sources[0])
    spec = limited(spec, checkpoint.load_config(sources[0]), max_length)
    shared = _shared(sources, task_recipe(spec))
    target = checkpoint.check_output(output, sources=read_by(spec, *sources), overwrite=overwrite)
    rest, examples = data.hold_out(data.training(spec), shared["hold_out"])
    _require_untrained(sources, spec, rest)
    inputs = {
        "models": [checkpoint.source_sha256(source) for source in sources],
        "data": examples.sha256,
        "settings": {"score": score},
        "max_length": spec.max_length,
    }
    space = checkpoint.saved_bytes(sources[0])
    job = Job("soup", inputs, __name__, target, overwrite=overwrite, space=space)
    if (figures := checkpoint.finished(job)) is not None:
        return SoupResult(**figures)

    model, tokenizer = own_classifier(sources[0], spec)
    states = _states(sources, spec)
    done = 0

    def scored(*members: int) -> float:
        def compute() -> float:
            model.load_state_dict(mean([states[i] for i in members]))
            return SCORES[score](model, tokenizer, examples, spec)

        nonlocal done
        value = job.value(f"score of {'+'.join(map(str, members))}", compute)
        done += 1
        progress(done, 2 * len(states) - 1)
        return value

    with job:
        accepted, highest, alone = greedy(scored, len(states))
        model.load_state_dict(mean([states[i] for i in accepted]))
        result = SoupResult(
            members=[str(directories[i]) for i in accepted],
            scores={str(directory): value for directory, value in zip(directories, alone, strict=True)},
            score=highest,
        )
        figures = {name: value for name, value in asdict(result).items() if name != "weights_sha256"}
        recipe = {"command": "soup", **shared, "score": score, **figures}
        summary = {"max_length": spec.max_length}
        sha256 = checkpoint.save(model, tokenizer, target, recipe=recipe, job=job, figures=figures, summary=summary)
        job.finish()
    return SoupResult(weights_sha256=sha256, **figures)


def greedy(scored: Callable[..., float], n: int) -> tuple[list[int], float, list[float]]:
    """(members, their score, scores of all n candidates alone). In falling order of its score, each candidate is
    accepted if all accepted ones and itself score no worse together.
    """
    alone = [scored(i) for i in range(n)]
    best, *rest = np.argsort([-value for value in alone], kind="stable").tolist()
    accepted, highest = [best], alone[best]
    for candidate in rest:
        value = scored(*accepted, candidate)
        if value >= highest:
            accepted.append(candidate)
            highest = value
    return accepted, highest, alone


def _states(sources: list[Path], spec: Task) -> list[dict[str, torch.Tensor]]:
    states = [own_classifier(source, spec)[0].state_dict() for source in sources]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    for source, each in zip(sources, shapes, strict=True):
        if each != shapes[0]:
            raise InputError(f"{source} must have the tensors of {sources[0]}", fix="average models of one kind")
    return states


def _shared(sources: list[Path], task: dict) -> dict:
    """The fields that all models' recipes must share: the start, the task (`task_recipe`) and the number of held-out
    examples.
    """
    found = []
    for source in sources:
        recipe = checkpoint.read_recipe(source)
        if recipe.get("command") != "train" or recipe.get("task") != task["task"] or not recipe.get("hold_out"):
            raise InputError(
                f"{source} must be fine-tuned on {task['task']} with examples held out, its recipe says "
                f"command {recipe.get('command')!r}, task {recipe.get('task')!r}, hold_out {recipe.get('hold_out')!r}",
                fix="train it with --hold-out 2000",
            )
        found.append({name: recipe.get(name) for name in ("model", "model_sha256", "hold_out")} | task)
    starts = {(recipe["model_sha256"] or recipe["model"], recipe["hold_out"]) for recipe in found}
    if len(starts) > 1:
        shown = sorted({(recipe["hold_out"], recipe["model"]) for recipe in found})
        raise InputError(f"models must share their start and hold_out, got {shown}", fix="train them from one start")
    return found[0]


def _require_untrained(sources: list[Path], spec: Task, rest: Examples) -> None:
    """InputError if a model's recipe says that it was trained on other examples than the task has now, without the
    held-out ones. Held-out examples could be among them.
    """
    for source in sources:
        recipe = checkpoint.read_recipe(source)
        learnt = rest.sample(recipe.get("n"), recipe.get("seed", 0))
        learnt = data.mix_ood(spec, learnt) if recipe.get("mix_ood") else learnt
        if recipe.get("data_sha256") != learnt.sha256:
            raise InputError(
                f"{source} was trained on other examples of {spec.name} than there are now, perhaps on held-out ones",
                fix="train it again",
            )


def mean(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The uniform mean of each tensor, computed in float64 and stored in the dtype of the tensor."""
    return {
        name: sum(state[name].double() for state in states).div(len(states)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }

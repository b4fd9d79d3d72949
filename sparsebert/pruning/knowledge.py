"""The method `knowledge`, this package's own: every linear is solved for, so that the model keeps the function of the
dense model.
"""

from __future__ import annotations

import copy
from fractions import Fraction

import torch

from sparsebert.config import PruneConfig
from sparsebert.encoders import encoder_linears, head_linears
from sparsebert.errors import InputError
from sparsebert.heads import problem_of
from sparsebert.ops.admm_prune import admm_prune
from sparsebert.ops.masked_lstsq import masked_lstsq
from sparsebert.ops.obs_prune import obs_sweep
from sparsebert.patterns import Grouped, Pattern, Unstructured, parse, sparsity_of
from sparsebert.pruning import allocate
from sparsebert.pruning.calibration import Batches, Calibration
from sparsebert.pruning.cluster import row_groups
from sparsebert.pruning.distillation import distill
from sparsebert.pruning.run import Run
from sparsebert.pruning.scores import cls_weights, output_metrics
from sparsebert.pruning.solve import Quadratic, match_logits, set_affine

# Step -> the lowest tier that has it. Each can be left out by --without.
STEPS = {
    "target": 0, "cluster": 0, "admm": 0, "refit": 0, "cls": 0, "heads": 0,
    "outputs": 1, "allocation": 1, "distill": 2, "perturb": 2,
}  # fmt: skip
DAMPING = 1e-2
METRIC_TOKENS = 50_000  # about this many tokens are used for the metrics of outputs
DAMAGE_TOKENS = 30_000  # about this many tokens are used for the allotment


def tier_of(config: PruneConfig) -> int:
    """The tier of `config`, 1 by default."""
    return 1 if config.tier is None else config.tier


def steps_of(config: PruneConfig) -> set[str]:
    """The steps of the config's tier without those of --without; InputError for a name that the tier does not have."""
    tier = tier_of(config)
    have = {step for step, lowest in STEPS.items() if lowest <= tier}
    left_out = {step.strip() for step in config.without.split(",") if step.strip()}
    if unknown := left_out - have:
        raise InputError(
            f"--without must name steps of tier {tier} ({', '.join(sorted(have))}), got {', '.join(sorted(unknown))}",
            fix="choose among these",
        )
    return have - left_out


@torch.no_grad()
def knowledge(model, calibration: Calibration, config: PruneConfig, run: Run) -> None:
    """Layer-wise least squares: each linear is fitted to the dense model's outputs on the half-pruned model's inputs.
    Further steps look beyond single layers. --without leaves out any of these steps:

    Tier 0, closed forms.
    target: the linear is fitted to the dense model's outputs, T = C + λW. Without it: to its own weights W.
    cluster: rows that need the same columns form the groups of a grouped pattern. Without it: consecutive rows.
    admm: ADMM over the whole matrix finds the support. Without it: a SparseGPT sweep.
    refit: exact least squares on the support.
    cls: in the last layer only the first token's output counts.
    heads: the pooler is solved for again; the classifier is fitted for the least divergence from the dense model's
    predictions.

    Tier 1, one backward pass for each step.
    outputs: errors E of a linear's outputs count, singly and in pairs, by their effect on the logits. Support and
    weights are found for a small tr(B E H Eᵀ), with the Kronecker factors B and H.
    allocation: each linear gets a part of the budget by the damage it does to the output. Without it, and with patterns
    that imply their sparsity: the same sparsity for all.

    Tier 2.
    distill: 300 steps towards the dense model with the zeros fixed.
    perturb: distillation also on texts with swapped words and on joined texts.
    """
    steps = steps_of(config)
    pattern = parse(config.pattern)
    sparsity = sparsity_of(pattern, config.sparsity)
    damping = config.damping or DAMPING
    teacher = copy.deepcopy(model) if "distill" in steps else None
    problem, classifier = problem_of(model.config.to_dict()), list(head_linears(model))[-1]
    batches = calibration.batches
    weights = cls_weights(model, batches) if "cls" in steps else {}
    metrics: dict[str, torch.Tensor] = {}
    if "outputs" in steps:
        some = _about(batches, METRIC_TOKENS, config.seed)
        metrics = output_metrics(model, some, config.seed, run.part("gradients"))
    allotted = dict.fromkeys(encoder_linears(model), sparsity)
    if "allocation" in steps and isinstance(pattern, Unstructured | Grouped):
        cluster = isinstance(pattern, Grouped) and "cluster" in steps
        found = run.once(
            "allocation", lambda: _allotted(model, batches, pattern, sparsity, damping, cluster, config.seed, run)
        )
        allotted = {name: Fraction(value) for name, value in found.items()}
    for stage in run.stages(model, batches, weights=weights, heads="heads" in steps):
        q = Quadratic(stage.moments.gram, damping)
        for name, module in stage.linears.items():
            original = module.weight.double()
            if "target" in steps:
                target = stage.cross(name) + q.ridge * original
                weight = q.minimum(target)
            else:
                target, weight = original @ q.h, original
            if not stage.head:
                weight = sparse(weight, target, q, metrics.pop(name, None), pattern, allotted[name], steps)
            set_affine(module, weight, stage, name)
            if name == classifier:
                match_logits(module, *stage.examples, problem)
    if teacher is not None:
        distill(model, teacher, calibration, perturb="perturb" in steps, seed=config.seed, progress=run.part("distill"))


def sparse(
    weight: torch.Tensor,
    target: torch.Tensor,
    q: Quadratic,
    metric: torch.Tensor | None,
    pattern: Pattern,
    sparsity: float | Fraction,
    steps: set[str],
) -> torch.Tensor:
    """V of the pattern, near W* = T H⁻¹ (`weight`) under H and the metric of the outputs: float64 [n_out, n_in]."""
    if metric is not None:
        # A dead column has no effect on its own row, but with a metric its weights might be used to balance the ridge's
        # terms of other rows.
        weight, target = weight.masked_fill(q.dead, 0.0), target.masked_fill(q.dead, 0.0)
    order = torch.arange(len(weight), device=weight.device)
    if isinstance(pattern, Grouped) and "cluster" in steps:
        counts = 1.0 if metric is None else metric.double().diagonal().sqrt()[:, None]
        order = row_groups(weight * counts, q.h, pattern, sparsity)
    weight, target = weight[order], target[order]
    if metric is not None:
        metric = metric.double()[order][:, order]
    if "admm" in steps:
        mask = admm_prune(weight, q.h, pattern, sparsity, row_metric=metric)
        weight = weight * mask
    else:
        weight = obs_sweep(weight, q.h, pattern, sparsity)
        mask = weight != 0
    if "refit" in steps:
        weight = masked_lstsq(target, q.h, mask, row_metric=metric)
    return torch.empty_like(weight).index_copy_(0, order, weight)


def _allotted(
    model, batches: Batches, pattern: Pattern, sparsity: float, damping: float, cluster: bool, seed: int, run: Run
) -> dict[str, str]:
    """The allotment: the sparsity of every linear, as the text of a fraction."""
    some = _about(batches, DAMAGE_TOKENS, seed)
    alike = sparsity if cluster else None
    changes = allocate.one_by_one(model, some, pattern, damping, alike, run.part("try sparsities"))
    damage = allocate.damage(model, some, changes, seed, run.part("damage"))
    sizes = {name: module.weight.numel() for name, module in encoder_linears(model).items()}
    return {name: str(value) for name, value in allocate.allocate(damage, sizes, sparsity).items()}


def _about(batches: Batches, tokens: int, seed: int) -> Batches:
    """Sequences drawn from every batch, about `tokens` tokens in total."""
    share = min(1.0, tokens / sum(batch["input_ids"].numel() for batch in batches))
    generator = torch.Generator().manual_seed(seed)
    some = []
    for batch in batches:
        rows = torch.rand(len(batch["input_ids"]), generator=generator) < share
        if rows.any():
            some.append({name: tensor[rows] for name, tensor in batch.items()})
    return some

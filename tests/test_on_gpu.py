"""What the ops, pruning and training do on a GPU, on a double of one (gpu_double.py) that computes on the CPU: they
give the CPU's results, and the host waits for the device no more often than is said here. No GPU has run this yet.
"""

from __future__ import annotations

import functools
import itertools
import re

import numpy as np
import pytest
import torch
from conftest import require
from gpu_double import GPU, as_gpu, as_real_gpu, to_cpu, to_gpu
from models import classifier, saved, tokenizer
from test_admm_prune import PATTERNS, error, problem, separated
from test_gram import SHAPES as MOMENTS
from test_gram import check as check_moments
from test_gram import random_tokens, random_weights
from test_masked_lstsq import problem as system
from test_masked_lstsq import random_mask
from test_masked_matmul import Case, operands, results
from test_obs_prune import PATTERNS as OBS_PATTERNS
from test_obs_prune import SIZES
from test_obs_prune import problem as weights_and_moments
from test_topk_mask import SHAPES, scores

from sparsebert import data, encoders, machine
from sparsebert.checkpoint import Files
from sparsebert.cli import main
from sparsebert.config import PruneConfig, TrainConfig
from sparsebert.encoders import no_progress
from sparsebert.engine import Engine
from sparsebert.engine.classifier import Classifier
from sparsebert.errors import InputError, UnsupportedError
from sparsebert.heads import problem_of
from sparsebert.kernels import admm_prune as admm_kernel
from sparsebert.kernels import gram as gram_kernel
from sparsebert.ops import admm_prune as admm_op
from sparsebert.ops import gram as gram_op
from sparsebert.ops.admm_prune import admm_path, admm_prune
from sparsebert.ops.gram import Moments, gram, gram_ref
from sparsebert.ops.masked_lstsq import masked_lstsq, masked_lstsq_ref
from sparsebert.ops.masked_matmul import masked_matmul
from sparsebert.ops.obs_prune import obs_prune, obs_prune_ref, obs_sweep
from sparsebert.ops.topk_mask import pattern_mask, topk_mask, topk_mask_ref, topk_threshold
from sparsebert.patterns import Unstructured, parse
from sparsebert.pruning import distillation, draw, entry, prune, prune_checkpoint, stages
from sparsebert.pruning.entry import device_of, run_of
from sparsebert.pruning.methods import LABEL_FREE
from sparsebert.pruning.plan import plan
from sparsebert.pruning.trained import SubnetConfig
from sparsebert.training import train
from sparsebert.training.loop import Hook, TrainingLoop
from sparsebert.training.losses import Targets
from sparsebert.training.masks import MaskTraining

MR = data.load(data.get_task("mr"), "train")


@pytest.fixture
def double():
    with as_gpu() as waits:
        yield waits


@pytest.fixture(params=["double", "cuda"])
def gpu(request):
    """The double, and a GPU if there is one, where nothing is counted."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            require("cuda", "torch sees no CUDA device")
        with as_real_gpu() as waits:
            yield waits
    else:
        with as_gpu() as waits:
            yield waits


def triton_is_here() -> None:
    try:
        import triton  # noqa: F401
    except ImportError:
        require("triton", "triton is not installed")


def test_the_double_is_as_strict_as_a_gpu(double):
    a = to_gpu(torch.ones(3, 4))
    assert a.is_cuda and a.device == GPU and (a @ a.T).is_cuda and torch.zeros(2, device=a.device).is_cuda
    with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
        a + torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
        torch.arange(3)[to_gpu(torch.tensor([0, 2]))]
    with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
        a[torch.tensor([0, 2])] = torch.ones(2, 4)
    with pytest.raises((RuntimeError, TypeError)):
        a.numpy()
    assert not double
    a.sum().item()
    a.cpu()
    a[a > 0]
    assert double.total() == 3
    a[1].mul_(5.0)
    assert to_cpu(a)[:, 0].tolist() == [1.0, 5.0, 1.0]


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "tiny", "squares"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_topk_mask_keeps_exactly_k_and_of_ties_the_lower_index(gpu, shape, kind):
    x = scores(shape, kind)
    n = shape[-1]
    for k in sorted({0, 1, n // 8, n // 2, n - 1, n}):
        assert torch.equal(to_cpu(topk_mask(to_gpu(x), k)), topk_mask_ref(x, k)), k
        if k:
            assert torch.equal(to_cpu(topk_threshold(to_gpu(x), k)), topk_threshold(x, k)), k


@pytest.mark.parametrize("n", [6, 70, 5000])
def test_topk_mask_takes_both_zeros_as_equal_orders_infinities_and_refuses_nan(gpu, n):
    x = torch.full((n,), -1.0)
    x[:6] = torch.tensor([-0.0, 0.0, -0.0, torch.inf, -torch.inf, 0.0])
    assert to_cpu(topk_mask(to_gpu(x), 3))[:6].tolist() == [True, True, False, True, False, False]
    assert not to_cpu(topk_mask(to_gpu(x), n - 1))[4]
    x[-1] = torch.nan
    for call in (lambda: topk_mask(to_gpu(x), 1), lambda: pattern_mask(to_gpu(x[None]), Unstructured(), 0.5)):
        with pytest.raises(InputError, match="scores must have no NaN"):
            call()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("name", "sparsity"), [("unstructured", 0.0), ("unstructured", 0.7), ("2:4", 0.5), ("8x1", 0.6), ("8x1/4", 0.6),
                           ("8:2:8", 0.75)],
)  # fmt: skip
def test_pattern_mask_is_the_cpus_and_waits_once(gpu, name, sparsity, per_row):
    x = torch.randn(32, 176, generator=torch.Generator().manual_seed(0)).square()
    got = pattern_mask(to_gpu(x), parse(name), sparsity, per_row=per_row)
    assert torch.equal(to_cpu(got), pattern_mask(x, parse(name), sparsity, per_row=per_row))
    assert gpu.total() <= 1


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 255, 256, 257, 1030])
def test_gram_matches_the_reference(gpu, monkeypatch, tokens, weighted):
    monkeypatch.setattr(gram_kernel, "AT_ONCE", 3 * 49 * 97)  # several sums of products wait at once, or one
    weights = random_weights(tokens) if weighted else None
    for n_in, n_y in MOMENTS[:-1]:
        x, y = random_tokens(tokens, n_in), random_tokens(tokens, n_y, seed=1)
        expected = gram_ref(x, y, weights)
        given = [None if part is None else to_gpu(part) for part in (x, y, weights)]
        gpu.clear()
        moments = gram(*given)
        assert gpu.total() <= 1 and moments.sum_xx.is_cuda and moments.shift_y.is_cuda
        check_moments(on_cpu(moments), expected)
        check_moments(on_cpu(gram(given[0], None, given[2])), (expected[0], None))
        w = torch.ones(tokens, dtype=torch.float64) if weights is None else weights.double()
        assert moments.tokens == tokens and moments.weight == pytest.approx(float(w.sum()))


def on_cpu(moments):
    """The same moments on the CPU."""
    parts = {name: to_cpu(v) if isinstance(v, torch.Tensor) else v for name, v in vars(moments).items()}
    return Moments(**parts)


def test_gram_adds_batches_and_drops_tokens_of_weight_zero(gpu):
    x, y, weights = random_tokens(700, 26) + 1e4, random_tokens(700, 9, seed=1), random_weights(700)
    weights[1::3] = 0.0
    x[1::3] = 1e9
    moments = None
    for start, end in itertools.pairwise([0, 40, 40, 400, 700]):
        parts = (to_gpu(part[start:end]) for part in (x, y, weights))
        moments = gram(*parts, into=moments)
    kept = weights > 0
    assert moments.tokens == kept.sum()
    check_moments(on_cpu(moments), gram_ref(x[kept], y[kept], weights[kept]))
    none = gram(to_gpu(x[:2]), None, to_gpu(torch.zeros(2)))
    assert none.tokens == none.weight == 0 and not to_cpu(none.sum_xx).any()


def test_gram_names_what_is_wrong_and_changes_nothing(gpu):
    x, y = random_tokens(300, 7), random_tokens(300, 3, seed=1)
    moments = gram(to_gpu(x), to_gpu(y))
    before = vars(on_cpu(moments))
    y[299, 2] = torch.nan
    negative = torch.ones(300)
    negative[5] = -1.0
    bad = {
        "y must be finite, got nan at token 299, column 2": (to_gpu(x), to_gpu(y), None),
        "weights must be finite and at least 0, got -1 at token 5": (to_gpu(x), to_gpu(x[:, :3]), to_gpu(negative)),
        "y must be contiguous float32 [tokens, n_y >= 1] on cuda:0, got torch.float32 [300, 3] on cpu": (
            to_gpu(x), y, None,
        ),
        "x must be on cuda:0 as before, got torch.float32 [300, 7] on cpu": (x, y, None),
    }  # fmt: skip
    for message, arguments in bad.items():
        with pytest.raises(InputError, match=re.escape(message)):
            gram(*arguments, into=moments)
    for name, value in vars(on_cpu(moments)).items():
        assert torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]


@pytest.mark.parametrize(("rows", "n_in"), [(1, 1), (1, 50), (7, 31), (33, 49)])
def test_admm_equals_the_cpu_where_nothing_is_nearly_tied(gpu, rows, n_in):
    weight, h = separated(rows, n_in, 0.5)
    on_gpu = to_gpu(weight), to_gpu(h), parse("unstructured")
    assert torch.equal(to_cpu(admm_prune(*on_gpu, 0.5)), admm_prune(weight, h, parse("unstructured"), 0.5))
    got = to_cpu(admm_path(*on_gpu, (0.0, 0.5)))
    assert torch.equal(got, admm_path(weight, h, parse("unstructured"), (0.0, 0.5)))


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize(("name", "sparsity"), PATTERNS)
def test_admm_is_as_good_as_the_cpus_and_waits_once_per_iteration(gpu, name, sparsity, coupled):
    weight, h = problem(64, 192)
    pattern = parse(name)
    metric = torch.diag(torch.logspace(-1, 1, 64, dtype=torch.float64)) if coupled else None
    expected = admm_prune(weight, h, pattern, sparsity, row_metric=metric, iterations=60)
    gpu.clear()
    given = to_gpu(weight), to_gpu(h), pattern, sparsity
    keep = to_cpu(admm_prune(*given, row_metric=None if metric is None else to_gpu(metric), iterations=60))
    assert gpu.total() <= 60 * 0.6 + 8  # after the climb, and what the checks and the eigenvalues need
    assert keep.sum() == expected.sum()
    assert error(weight, h, keep, metric) == pytest.approx(error(weight, h, expected, metric), rel=0.03)


@pytest.fixture
def in_tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_matmuls_in_tf32_are_refused(gpu, in_tf32):
    weight, h = problem(8, 24)
    for call in (
        lambda: admm_prune(to_gpu(weight), to_gpu(h), parse("unstructured"), 0.5),
        lambda: gram(to_gpu(torch.ones(2, 2))),
        lambda: prune(classifier(), None, PruneConfig(method="magnitude", device="cuda")),
    ):
        with pytest.raises(UnsupportedError, match="is 'tf32'; set it to 'ieee'"):
            call()


def test_the_iterations_on_the_cpu_are_those_of_the_core():
    weight, h = separated(16, 48, 0.5)
    d = h.diagonal().sqrt()
    run = admm_kernel.Iterations(weight * d, h / d / d[:, None])
    keep = pattern_mask(run.scores, Unstructured(), 0.5)
    assert torch.equal(keep, admm_prune(weight, h, Unstructured(), 0.5, iterations=1))


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize(("rows", "n_in"), SIZES)
def test_obs_prune_matches_the_reference_at_every_remainder(gpu, rows, n_in, per_row):
    triton_is_here()
    w, h = weights_and_moments(rows, n_in)
    for sparsity in (0.0, 0.3, 0.9):
        gpu.clear()
        v = obs_prune(to_gpu(w), to_gpu(h), Unstructured(), sparsity, per_row=per_row)
        assert gpu.total() <= 12  # whatever the number of columns
        check_pruned(v, obs_prune_ref(w, h, Unstructured(), sparsity, per_row=per_row))


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("pattern", [*map(parse, OBS_PATTERNS)], ids=str)
def test_obs_prune_matches_the_reference_on_every_pattern(gpu, monkeypatch, pattern, per_row):
    triton_is_here()
    from sparsebert.kernels import obs_prune as kernel

    monkeypatch.setattr(kernel, "DOWNDATES", 7)
    monkeypatch.setattr(kernel, "INVERSES", 3 * 128**2)  # three groups are worked on together, then the last ones
    w, h = weights_and_moments(16, 128)
    v = obs_prune(to_gpu(w), to_gpu(h), pattern, 0.7, per_row=per_row)
    assert gpu.total() <= 15
    check_pruned(v, obs_prune_ref(w, h, pattern, 0.7, per_row=per_row))


def check_pruned(v: torch.Tensor, expected: torch.Tensor) -> None:
    assert v.is_cuda
    assert torch.equal(to_cpu(v) != 0, expected != 0)
    torch.testing.assert_close(to_cpu(v), expected, rtol=1e-9, atol=1e-9)


def test_removals_of_equal_columns_take_the_lower_one_and_a_lost_inverse_is_named(gpu):
    triton_is_here()
    w, h = to_gpu(torch.ones(2, 100, dtype=torch.float64)), to_gpu(2 * torch.eye(100, dtype=torch.float64))
    kept = (to_cpu(obs_prune(w, h, Unstructured(), 0.7)) != 0).tolist()
    assert kept == [[False] * 70 + [True] * 30] * 2
    from sparsebert.ops.obs_prune import _trace

    with pytest.raises(InputError, match="its inverse no longer is after"):
        _trace(w, -h, 1, 100, Unstructured())


@pytest.mark.parametrize("name", ["unstructured", "2:4", "8x1", "16:2:8"])
def test_obs_sweep_calls_its_kernel(gpu, name):
    triton_is_here()
    w, h = weights_and_moments(16, 64)
    expected = obs_sweep(w, h, parse(name), 0.7, isa="scalar")
    torch.testing.assert_close(to_cpu(obs_sweep(to_gpu(w), to_gpu(h), parse(name), 0.7)), expected)
    assert gpu.total() <= 4


@pytest.mark.parametrize(("kept", "group"), [(0.2, 1), (0.7, 1), (0.95, 5), (0.0, 1), (1.0, 1)])
@pytest.mark.parametrize("coupled", [False, True])
def test_masked_lstsq_matches_the_cpu_whichever_way_it_solves(gpu, kept, group, coupled):
    target, h = system(300, 45)
    mask = random_mask(300, 45, kept, group)
    mask[:10] = random_mask(10, 45, 0.3)  # some rows are always solved directly
    metric = torch.diag(torch.linspace(0.1, 9.0, 300, dtype=torch.float64)) if coupled else None
    gpu.clear()
    given = [to_gpu(part) for part in (target, h, mask)]
    v = masked_lstsq(*given, row_metric=None if metric is None else to_gpu(metric))
    assert gpu.total() <= 6 + 60 * coupled
    assert (to_cpu(v)[~mask] == 0).all()
    torch.testing.assert_close(to_cpu(v), masked_lstsq_ref(target, h, mask), rtol=0, atol=1e-10)


def test_masked_lstsq_names_the_row_and_the_pivot_that_fail(gpu):
    target, h = system(4, 60)
    h[17, 17] = -1.0
    mask = torch.zeros(4, 60, dtype=torch.bool)
    mask[:, :10] = True
    mask[2:, 12:40:5] = True  # 17 is the twelfth column of rows 2 and 3
    with pytest.raises(InputError, match="every support, pivot 11 of row 2 is not above 0"):
        masked_lstsq(to_gpu(target), to_gpu(h), to_gpu(mask))


def test_arguments_must_be_on_one_device(gpu):
    w, h = weights_and_moments(4, 12)
    mask = torch.ones(4, 12, dtype=torch.bool)
    for call in (
        lambda: admm_prune(to_gpu(w), h, Unstructured(), 0.5),
        lambda: obs_prune(to_gpu(w), h, Unstructured(), 0.5),
        lambda: masked_lstsq(to_gpu(w), h, mask),
    ):
        with pytest.raises(InputError, match=r"h must be 2-d (contiguous )?(torch\.)?float64 on cuda:0, got .* on cpu"):
            call()


@pytest.mark.parametrize("case", [Case(5, 70, 65), Case(9, 40, 66, share=2), Case(9, 48, 34, reach=4)], ids=str)
def test_masked_matmul_calls_its_kernels_and_never_waits(gpu, case):
    inputs, dy = operands(case, torch.float32)
    inputs[0], dy = inputs[0][None].expand(2, -1, -1), dy[None].expand(2, -1, -1)
    expected = results(masked_matmul, inputs, dy)
    got = results(masked_matmul, [to_gpu(part) for part in inputs], to_gpu(dy))
    assert not gpu
    for name, value in expected.items():
        assert got[name].is_cuda
        torch.testing.assert_close(to_cpu(got[name]), value, rtol=1e-5, atol=1e-5)


@functools.cache
def calibration(tokens: int = 1500):
    return draw(classifier(), tokenizer(), MR, tokens, 128, 0)


@pytest.fixture
def in_float32(monkeypatch):
    """Little distillation, and float32 products on both devices, whatever is fast here."""
    for name, value in {"STEPS": 12, "CHECK_EVERY": 4, "BATCH": 32}.items():
        monkeypatch.setattr(f"sparsebert.pruning.distillation.{name}", value)
    for part in ("sparsebert.encoders", "sparsebert.training.loop"):
        monkeypatch.setattr(f"{part}.bf16_is_fast", lambda device=None: False)


# (settings, how often the host may wait for each of the 12 linears): beside once per call of `gram`, and once for each
# tensor of the model that comes back. These decide by formulas, or by scores with hardly a tie.
EXACT = [
    ({"method": "magnitude"}, 1),
    ({"method": "magnitude", "scope": "global"}, 2),
    ({"method": "wanda"}, 4),
    ({"method": "sparsegpt"}, 7),
    ({"method": "obs"}, 11),
    ({"method": "obs", "pattern": "8:2:8", "sparsity": None}, 20),
    ({"method": "adaptive"}, 17),
    ({"method": "adaptive", "as_published": True}, 13),
    ({"method": "knowledge", "tier": 0, "without": "admm"}, 18),
]
# Here the host also waits for each iteration of ADMM after its climb, and with a metric for each conjugate gradient.
ITERATED = [  # tier 2 includes what tiers 0 and 1 do
    ({"method": "knowledge", "tier": 0, "pattern": "8x1"}, 400),
    ({"method": "knowledge", "tier": 1, "pattern": "2:4", "sparsity": None}, 160),
    ({"method": "knowledge", "tier": 2, "sparsity": 0.6}, 400),
]


def named(value) -> str:
    return " ".join(map(str, value.values())) if isinstance(value, dict) else ""


def pruned(settings: dict, device: str):
    config = PruneConfig(**{"sparsity": 0.75, **settings, "device": device})
    model = classifier()
    result = prune(model, calibration(17_000 if config.as_published else 1500), config)
    assert not any(p.is_cuda for p in model.parameters())
    return model, result


def pruned_on_gpu(double, monkeypatch, settings: dict, allowed: int):
    """`pruned`, after a check of how often the host has waited."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(stages, "gram", lambda *given, **more: calls.append(1) or gram(*given, **more))
        double.clear()
        model, result = pruned(settings, "cuda")
    back = len(list(model.parameters())) + len(list(model.buffers()))
    assert double.total() <= len(calls) + back + 12 * allowed
    return model, result


@pytest.mark.parametrize(("settings", "allowed"), EXACT, ids=named)
def test_pruning_gives_the_cpus_weights_and_seldom_waits(double, monkeypatch, settings, allowed):
    triton_is_here()
    expected, told = pruned(settings, "cpu")
    model, result = pruned_on_gpu(double, monkeypatch, settings, allowed)
    assert result.density == told.density
    assert_close(model, expected)


def assert_close(model, expected, atol: float = 1e-5) -> None:
    for (name, value), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        if ".layer." in name:
            assert torch.equal(value == 0, wanted == 0), name
        else:  # the few texts give the head moments of a high condition number
            atol = 3e-3
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=atol, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize(("settings", "allowed"), ITERATED, ids=named)
def test_pruning_by_iterations_gives_the_weights_of_the_same_sums_on_the_cpu(
    double, in_float32, monkeypatch, settings, allowed
):
    """ADMM's iterations amplify the last digits of sums in another order. So the CPU takes the GPU's order here, and
    what is compared is everything else. That the sums are right is tested above.
    """
    model, result = pruned_on_gpu(double, monkeypatch, settings, allowed)
    monkeypatch.setattr(stages, "gram", lambda x, y, weights, into: gram_op._on_gpu(x, y, weights, into))
    monkeypatch.setattr(admm_op, "_Run", lambda b0, hn, threads, isa: admm_kernel.Iterations(b0, hn))
    expected, told = pruned(settings, "cpu")
    assert result.density == told.density
    assert_close(model, expected, atol=1e-3 if settings["tier"] == 2 else 1e-5)


def test_pruning_by_iterations_gives_a_model_as_near_to_the_dense_one_as_the_cpus(double, in_float32):
    """Other weights are kept, as between two instruction sets of the CPU, and serve as well."""
    dense = distillation.logits_of(classifier(), calibration().batches)
    problem = problem_of(classifier().config.to_dict())
    divergence = {}
    for device in ("cpu", "cuda"):
        model, _ = pruned({"method": "knowledge", "tier": 0}, device)
        logits = distillation.logits_of(model, calibration().batches)
        divergence[device] = float(problem.divergence(dense, logits, problem.spread(dense)).mean())
    assert 0.5 * divergence["cpu"] < divergence["cuda"] < 2 * divergence["cpu"]


def test_a_model_of_one_logit_is_distilled(double, in_float32):
    model = classifier(labels=1)
    prune(model, calibration(), PruneConfig(sparsity=0.6, tier=2, device="cuda"))
    assert not any(p.is_cuda for p in model.parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_training_takes_the_cpus_steps_and_seldom_waits(double, in_float32, masked):
    examples = MR.take(range(32))
    rows = encoders.tokenize(tokenizer(), examples, 64)
    kept, losses = {}, {}
    for device in (torch.device("cpu"), GPU):
        model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(device)
        hook = MaskTraining(model, parse("unstructured"), 0.5, gradual=0.0, update_every=0.5) if masked else Hook()
        run = TrainingLoop(model, TrainConfig(steps=4, batch_size=8), 4, hook=hook)
        double.clear()
        for step in range(4):
            own = range(8 * step, 8 * step + 8)
            targets = Targets(torch.from_numpy(examples.labels))[list(own)]
            run.advance(encoders.collate(tokenizer(), rows, own), targets)
        waited = double.total()
        run.finish()
        hook.fold()
        losses[device] = run.losses
        kept[device] = {name: to_cpu(p.detach()) for name, p in model.named_parameters()}
    # The loss, the norm of the gradients, and what transformers asks; a threshold for each of 14 linears.
    assert waited <= 4 * 4 + 14 * masked
    torch.testing.assert_close(*losses.values(), rtol=1e-5, atol=1e-5)
    for name, value in kept[GPU].items():
        # A step of Adam is of the size of the learning rate, however small the gradient.
        torch.testing.assert_close(value, kept[torch.device("cpu")][name], rtol=1e-3, atol=1e-4)


def a_machine(monkeypatch, built="13.0", refusal=None, capability=(9, 0), gpus=1) -> None:
    """Makes torch see these GPUs, of which the last is the current one."""

    def init() -> None:
        if refusal is not None:
            raise RuntimeError(refusal)

    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus - 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")


OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
# What a machine lacks -> (the machine, words of the message).
LACKING = {
    "cuda": ({"built": None}, "needs a torch that is built for CUDA"),
    "gpu": ({"refusal": "Found no NVIDIA driver on your system."}, "says: Found no NVIDIA driver"),
    "visible": ({"refusal": "No CUDA GPUs are available"}, "says: No CUDA GPUs are available; check the driver"),
    "driver": ({"refusal": OLD}, "says: The NVIDIA driver on your system is too old (found version 11040)"),
    "sm_70": ({"capability": (7, 0)}, "needs compute capability 8.0 or above, GPU 0 has 7.0"),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_a_gpu_that_cannot_be_used_is_refused_with_the_reason(monkeypatch, lacking):
    given, said = LACKING[lacking]
    a_machine(monkeypatch, **given)
    with pytest.raises(UnsupportedError, match=re.escape(said)) as error:
        machine.device_for("cuda")
    assert "device='cpu'" in error.value.fix and "\n" not in str(error.value)
    assert machine._gpu() == f"off: {error.value.problem}"
    assert machine.device_for("auto") == machine.device_for("cpu") == torch.device("cpu")


def test_of_two_gpus_the_current_one_is_used(monkeypatch):
    a_machine(monkeypatch, gpus=2)
    assert machine.device_for("cuda") == machine.device_for("auto") == torch.device("cuda", 1)
    assert machine.kind_of(torch.device("cuda", 1)) == "cuda sm_90" and machine.kind_of(torch.device("cpu")) == "cpu"
    assert machine._gpu().startswith("GPU 1, the current one of 2 (train, prune and eval run on it")
    with pytest.raises(InputError, match="device must be one of auto, cpu, cuda, got 'cuda:1'"):
        machine.device_for("cuda:1")


def test_least_squares_need_the_compiled_kernels(monkeypatch):
    a_machine(monkeypatch)

    def missing():
        raise UnsupportedError("the CUDA kernels cannot be imported", fix="install them")

    monkeypatch.setattr(entry, "cuda_core", missing)
    assert device_of(PruneConfig(method="wanda", device="cuda")).type == "cuda"
    for method in ("knowledge", "adaptive", "obs"):
        with pytest.raises(UnsupportedError, match="the CUDA kernels cannot be imported"):
            device_of(PruneConfig(method=method, device="cuda"))


def test_too_little_memory_is_one_line_and_the_model_is_back_where_it_was(double, monkeypatch):
    def greedy(model, *_):
        assert next(model.parameters()).is_cuda
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 16 GiB")

    monkeypatch.setitem(LABEL_FREE, "magnitude", LABEL_FREE["magnitude"]._replace(prune=greedy))
    model = classifier()
    with pytest.raises(UnsupportedError) as error:
        prune(model, None, PruneConfig(method="magnitude", device="cuda"))
    assert str(error.value).startswith("double has too little memory for this: CUDA out of memory. Tried to allocate")
    assert "\n" not in str(error.value) and not next(model.parameters()).is_cuda


@pytest.mark.parametrize("command", ["train", "prune", "eval"])
def test_a_command_without_a_gpu_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch, command):
    a_machine(monkeypatch, built=None)
    source = saved(tmp_path / "m")
    output = [] if command == "eval" else ["-o", str(tmp_path / "out")]
    assert main([command, str(source), "--task", "mr", "--device", "cuda", *output]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: device cuda needs a torch that is built for CUDA")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_model_is_fine_tuned_pruned_and_evaluated_in_directories(tmp_path, double, in_float32):
    source, examples = saved(tmp_path / "m"), MR.take(range(20))
    train(source, "mr", tmp_path / "tuned", TrainConfig(steps=3, n=64, device="cuda"))
    tuned = {device: Classifier.load(tmp_path / "tuned", device) for device in ("cpu", "cuda")}
    assert tuned["cuda"].engine == "torch"
    logits = {device: model.predict(examples, max_length=64, progress=no_progress) for device, model in tuned.items()}
    np.testing.assert_allclose(logits["cuda"], logits["cpu"], rtol=1e-4, atol=1e-4)
    texts = {"calibration": ("none",), "calibration_tokens": 1500}
    for method, more, subnet in (("obs", texts, None), ("mask", {}, SubnetConfig(steps=3, n=64))):
        config = PruneConfig(method=method, sparsity=0.5, device="cuda", **more)
        result = prune_checkpoint(tmp_path / "tuned", "mr", tmp_path / method, config, subnet)
        assert result.sparsity == pytest.approx(0.5, abs=1e-3)
        assert (Engine.load(tmp_path / method).logits(["a good film"])).shape == (1, 2)
        assert plan(tmp_path / "tuned", "mr", tmp_path / "other", config, subnet).seconds == {}


def test_a_stopped_run_goes_on_with_the_layers_that_it_kept(tmp_path, double):
    source = saved(tmp_path / "m")
    config = PruneConfig(method="obs", calibration=("none",), calibration_tokens=1500, device="cuda")

    def stop(done: int, total: int, what: str = "") -> None:
        if done == 9:  # one of the second layer
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, "mr", tmp_path / "stopped", config, progress=stop)
    resumed = prune_checkpoint(source, "mr", tmp_path / "stopped", config)
    whole = prune_checkpoint(source, "mr", tmp_path / "whole", config)
    assert resumed.resumed and not whole.resumed
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert weights[0] == weights[1]


def test_a_model_in_int8_is_not_run_on_a_gpu(tmp_path, double, monkeypatch):
    source = saved(tmp_path / "m")
    monkeypatch.setattr(Files, "scales", object())
    with pytest.raises(UnsupportedError, match=r"device cuda runs fp32, .* is in int8; run it with --device cpu"):
        Classifier.load(source, "cuda")


def test_the_device_is_part_of_a_runs_key(tmp_path, double):
    source = saved(tmp_path / "m")

    def job(device: str, method: str):
        config = PruneConfig(method=method, device=device)
        return run_of(source, "mr", tmp_path / "out", config, SubnetConfig(), False).job

    for method in ("magnitude", "mask"):
        jobs = {device: job(device, method) for device in ("cpu", "cuda")}
        assert jobs["cuda"].key != jobs["cpu"].key
        found = {device: each.record["inputs"]["settings"]["device"] for device, each in jobs.items()}
        assert found == {"cpu": "cpu", "cuda": "cuda sm_90"}


def test_pruning_goes_to_a_gpu_only_if_asked(double):
    assert PruneConfig().device == "cpu" and device_of(PruneConfig()).type == "cpu"
    with pytest.raises(ValueError, match="device"):
        PruneConfig(device="auto")


def test_other_errors_of_a_gpu_are_not_taken_for_too_little_memory(double):
    for message, kind in {"CUBLAS_STATUS_ALLOC_FAILED": UnsupportedError, "misaligned address": RuntimeError}.items():
        with pytest.raises(kind, match=message), machine.at_work_on(GPU):
            raise RuntimeError(f"CUDA error: {message}")

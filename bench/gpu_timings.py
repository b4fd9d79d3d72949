"""The timings of bench.gpu_report, with the goals of the GPU's kernels. Each function gives the cases of one section;
each case checks its output before its clock starts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bench import harness
from bench.bench_masked_matmul import SHAPES, eager, step
from bench.bench_obs_prune import Case as SweepCase
from bench.bench_obs_prune import Published
from bench.bench_obs_prune_cuda import eager_sweep, sweeps_its_own_mask
from bench.gpu_checks import ACTIVATIONS, PRODUCTS, SOLVED, STATES, moments_like
from bench.gpu_forms import FormLinear, patterned, that_hold
from bench.gpu_models import (
    BERT_BASE,
    BERT_LARGE,
    TINY,
    WORDS,
    DenseBert,
    Ids,
    checked_logits,
    classifier,
    directory_of,
    engine_of,
    expected_logits,
    token_ids,
    tokenizer,
)
from bench.gpu_place import DENSE, Case, Goal, Place, against, copies, figures, near, replayed, timed
from bench.harness import Row
from sparsebert import data, encoders, patterns
from sparsebert.config import PruneConfig
from sparsebert.encoders import encoder_linears
from sparsebert.errors import UnsupportedError, first_line
from sparsebert.ops.gram import gram
from sparsebert.ops.masked_lstsq import masked_lstsq
from sparsebert.ops.masked_matmul import masked_matmul, masked_matmul_ref
from sparsebert.ops.obs_prune import _inverse_factor
from sparsebert.ops.topk_mask import topk_mask, topk_threshold
from sparsebert.pruning import draw, prune

BF16 = 2  # bytes of a value
LOOP = "torch loop"
SPARSITY = 0.9
PRUNED_ALIKE = 1e-3  # float32 sums in another order, through the layers before


def device(place: Place) -> Iterator[Case]:
    yield Case("which", partial(_which, place))


def rates(place: Place) -> Iterator[Case]:
    """What a copy and a matrix product reach on it."""
    yield Case("copy", partial(_copy, place))
    yield Case("matmul bf16", partial(_matmul, place))


def _which(place: Place) -> Row:
    if place.rehearsal:
        return {"gpu": "none", "why": "Triton's interpreter on the processor"}
    from sparsebert.engine import cuda

    try:
        found = torch.cuda.get_device_properties(cuda.require_device())
    except RuntimeError as error:
        raise UnsupportedError(f"CUDA cannot start: {first_line(error)}", fix="check the driver") from error
    why = f"sm_{found.major}{found.minor}, {found.multi_processor_count} multiprocessors, L2 of "
    why += f"{found.L2_cache_size / 1e6:.0f} MB, {found.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    return {"gpu": found.name, "why": why}


def _copy(place: Place) -> Row:
    size = 1 << (20 if place.rehearsal else 30)
    a, b = (torch.empty(size, dtype=torch.uint8, device=place.device) for _ in range(2))
    row = figures(place, timed(place, {"ours": [lambda: b.copy_(a)]}))
    rate = 2 * size / row["seconds"]
    return row | {"rate": rate, "why": f"{rate / 1e12:.3g} TB/s, read and written"}


def _matmul(place: Place) -> Row:
    n = 64 if place.rehearsal else 8192
    a, b = (torch.randn(n, n, device=place.device).bfloat16() for _ in range(2))
    row = figures(place, timed(place, {"ours": [lambda: a @ b]}))
    rate = 2 * n**3 / row["seconds"]
    return row | {"rate": rate, "why": f"{rate / 1e12:.4g} TF/s"}


def tuned(place: Place) -> Iterator[Case]:
    """Measures the costs by which the engine chooses forms, as `sparsebert doctor --tune`; for this report alone."""
    yield Case("doctor --tune", partial(_tuned, place))


def _tuned(place: Place) -> Row:
    if place.rehearsal:
        raise UnsupportedError("the costs of forms are measured on a GPU", fix="run it on one")
    from sparsebert.engine import cuda

    start = time.perf_counter()
    cuda.measure()
    return {"seconds": time.perf_counter() - start}


def bert_base(place: Place) -> Iterator[Case]:
    """The engine against dense BERT, both in bf16 and in a CUDA graph; and dense BERT by torch.compile."""
    sizes, tokens = (TINY, 12) if place.small else (BERT_BASE, 128)
    first = (Goal("ms", "≤", 0.15), Goal("ratio", "≥", 2))
    goals = {("64x1", 1): first, ("64x1", 32): (Goal("ms", "≤", 0.8),)}
    for pattern in ("64x1", "unstructured"):
        directory = partial(directory_of, place, "bert", sizes, _small(place, pattern), SPARSITY)
        for batch in (1, 32):
            texts, own = min(batch, 3) if place.small else batch, goals.get((pattern, batch), ())
            title = f"{_small(place, pattern)} at {SPARSITY:.0%}, {texts} x {tokens}"
            yield Case(title, partial(_bert, place, directory, texts, tokens, own))
    for batch in (1, 3 if place.small else 32):
        yield Case(
            f"torch.compile, dense, {batch} x {tokens}", partial(_compiled_bert, place, directory, batch, tokens)
        )


def _small(place: Place, pattern: str) -> str:
    """The pattern, in groups that fit into TINY if it is the model."""
    return pattern.replace("64x1", "16x1") if place.small else pattern


def _bert(place: Place, directory_of: Callable[[], Path], texts: int, tokens: int, goals: tuple[Goal, ...]) -> Row:
    directory = directory_of()
    engine, dense = engine_of(place, directory, "bf16"), DenseBert(directory, place.device)
    batches = _batches(place, dense, texts, tokens)
    want, rival = expected_logits(directory, batches[0]), _graphed(place, dense, batches)
    row = checked_logits(engine.forward(batches[0], [[0] * tokens] * texts), want, "bf16")
    try:
        checked_logits(rival[0]().numpy(), want, "bf16")
    except harness.WrongOutput as error:
        raise harness.WrongOutput(f"the dense rival: {error}") from error
    ours = [partial(engine.forward, ids, [[0] * tokens] * texts) for ids in batches]
    operations = 2.0 * texts * tokens * sum(linear.weight.nnz for linear in engine.encoder.linears)
    timings = timed(place, {"ours": ours, DENSE: rival})
    row |= figures(place, timings, operations=operations, versus=DENSE, goals=goals)
    linears = engine.explain()
    forms = (
        Counter(linear["form"] for linear in linears),
        Counter(linear["short"] or linear["form"] for linear in linears),
    )
    told = (", ".join(f"{count} {form}" for form, count in of.items()) for of in forms)
    return row | {"why": "linears of long batches: {}; of short ones: {}".format(*told)}


def _compiled_bert(place: Place, directory_of: Callable[[], Path], texts: int, tokens: int) -> Row:
    directory = directory_of()
    dense = DenseBert(directory, place.device)
    batches = _batches(place, dense, texts, tokens)
    calls = _graphed(place, compiled(place, dense.__call__), batches)
    row = checked_logits(calls[0]().numpy(), expected_logits(directory, batches[0]), "bf16")
    return row | figures(
        place, timed(place, {"compile": calls, DENSE: _graphed(place, dense, batches)}), ours="compile"
    )


def _batches(place: Place, dense: DenseBert, texts: int, tokens: int) -> list[Ids]:
    rng = np.random.default_rng(place.seed_of((texts, tokens)))
    return [token_ids(rng, [tokens] * texts, len(dense.words)) for _ in range(2 if place.rehearsal else 4)]


def _graphed(place: Place, model: Callable, batches: list[Ids]) -> list[Callable[[], torch.Tensor]]:
    """Calls of a model with token ids on the host, through one CUDA graph; each gives logits on the host."""
    given = [torch.tensor(ids) for ids in batches]
    if not place.rehearsal:
        given = [ids.pin_memory() for ids in given]
    static, out = given[0].to(place.device), []

    @torch.inference_mode()
    def work() -> None:
        out[:] = [model(static)]

    run = replayed(place, work)

    def call(ids: torch.Tensor) -> torch.Tensor:
        static.copy_(ids, non_blocking=True)
        run()
        return out[0].cpu()

    return [partial(call, ids) for ids in given]


def compiled(place: Place, function: Callable) -> Callable:
    """torch.compile; in a rehearsal without its C++ compiler."""
    torch.compiler.reset()  # it would give up after a few shapes, and run the function as it is
    return torch.compile(function, backend="eager" if place.rehearsal else "inductor")


# Pattern -> how many times as fast as cuBLAS it is to be, on a matrix of 4096². 20 does not divide 4096, so 128:2:20
# has a few columns less; its rival is the whole square.
LARGE = {"2:4": 1.3, "128:2:20": 3.0, "128:2:16": None, "64x1": 3.0, "32x1": None}
# n_out, n_in, activation: the linears of BERT-base's feed-forward part.
BERT_LINEARS = ((3072, 768, "gelu"), (768, 3072, "none"))
BERT_PATTERNS = ("unstructured", "2:4", "64x1")


def large_linear(place: Place) -> Iterator[Case]:
    n = 128 if place.small else 4096
    for name, bound in LARGE.items():
        goals = () if bound is None else (Goal("ratio", "≥", bound),)
        yield Case(f"{name}, {n}², {n} tokens", partial(_linear, place, name, (n, n), n, "none", True, goals))
    yield Case(f"torch's 2:4, {n}², {n} tokens", partial(_cusparselt, place, (n, n), n))


def bert_linears(place: Place) -> Iterator[Case]:
    for n_out, n_in, activation in ((128, 96, "gelu"),) if place.small else BERT_LINEARS:
        for tokens in (5,) if place.small else (32, 4096):
            title = f"{n_in} to {n_out}, {activation}, {tokens} tokens"
            for name in BERT_PATTERNS:
                run = partial(_linear, place, name, (n_out, n_in), tokens, activation, False, ())
                yield Case(f"{name}, {title}", run)
            yield Case(f"torch.compile, {title}", partial(_compiled, place, (n_out, n_in), tokens, activation))


def _linear(
    place: Place, name: str, shape: tuple[int, int], tokens: int, activation: str, sparse: bool, goals: tuple[Goal, ...]
) -> Row:
    """The fastest of the forms that hold a weight of this pattern, against cuBLAS through torch on a weight without
    zeros. sparse: only forms that gain from zeros.
    """
    pattern, rng = patterns.parse(name), np.random.default_rng(place.seed_of((name, shape, tokens)))
    n_out, n_in = shape[0], shape[1] // getattr(pattern, "m", 1) * getattr(pattern, "m", 1)
    weight, bias = patterned(pattern, n_out, n_in, SPARSITY, rng), torch.randn(n_out)
    forms = that_hold(place, weight, tokens, sparse=sparse)
    if not forms:
        raise UnsupportedError(f"no form gains from {name} here", fix="see why in the rows of sparse_matmul's checks")
    number = copies(place, BF16 * (n_out * n_in // 10 + (n_in + n_out) * tokens))
    random = partial(torch.randn, device=place.device, dtype=torch.bfloat16)
    x, out = [random(n_in, tokens) for _ in range(number)], [random(n_out, tokens) for _ in range(number)]
    calls, sizes, row = {}, {}, {}
    for form in forms:
        first = FormLinear(place, form, weight, bias, activation)
        linears = [first, *(first.copy() for _ in range(number - 1))]
        calls[form] = [partial(linear, *both) for linear, both in zip(linears, zip(x, out, strict=True), strict=True)]
        sizes[form] = linears[0].size
        row = max(row, _checked(linears[0], weight, x[0], bias), key=lambda row: row.get("error", 0.0))
    calls[DENSE] = _dense(place, shape, tokens, activation, number)
    timings = timed(place, calls, graph=True)
    best = min(forms, key=timings.median)
    moved = sizes[best] + BF16 * (n_in + n_out) * tokens
    operations = 2.0 * np.count_nonzero(weight) * tokens
    row |= figures(place, timings, ours=best, size=moved, operations=operations, versus=DENSE, goals=goals)
    return row | {"form": best, "why": f"by {best}"}


def _checked(linear: FormLinear, weight: np.ndarray, x: torch.Tensor, bias: torch.Tensor) -> Row:
    """The row of a check of a linear in bf16, of its first 64 tokens."""
    want = torch.from_numpy(weight).bfloat16().double() @ x[:, :64].cpu().double() + bias.double()[:, None]
    want = ACTIVATIONS[linear.activation](want)
    return near({"y": linear(x)[:, :64]}, {"y": want}, linear.tolerance)


def _cublas(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def _dense(
    place: Place, shape: tuple[int, int], tokens: int, activation: str, number: int, function: Callable = _cublas
) -> list[Callable[[], object]]:
    """The same linear without zeros, on activations as torch stores them, [tokens, n_in]."""
    random = partial(torch.randn, device=place.device, dtype=torch.bfloat16)
    bias = random(shape[0])
    return [partial(function, random(tokens, shape[1]), random(*shape), bias, activation) for _ in range(number)]


def _compiled(place: Place, shape: tuple[int, int], tokens: int, activation: str) -> Row:
    number = copies(place, BF16 * (shape[0] * shape[1] + sum(shape) * tokens))
    functions = {"compile": compiled(place, _cublas), DENSE: _cublas}
    calls = {name: _dense(place, shape, tokens, activation, number, one) for name, one in functions.items()}
    return figures(place, timed(place, calls, graph=True), ours="compile")


def _cusparselt(place: Place, shape: tuple[int, int], tokens: int) -> Row:
    """2:4 as torch.sparse has it."""
    if place.rehearsal or not torch.backends.cusparselt.is_available():
        raise UnsupportedError("cuSPARSELt is not here", fix="take a GPU, and a torch that is built with it")
    number = copies(place, BF16 * (shape[0] * shape[1] + sum(shape) * tokens))
    mask = torch.tensor([True, True, False, False], device=place.device).repeat(shape[0], shape[1] // 4)
    calls = _dense(place, shape, tokens, "none", number)
    halves = [
        partial(F.linear, call.args[0], torch.sparse.to_sparse_semi_structured(call.args[1] * mask), call.args[2])
        for call in calls
    ]
    want = F.linear(calls[0].args[0], calls[0].args[1] * mask, calls[0].args[2])
    row = near({"y": halves[0]()}, {"y": want}, PRODUCTS[torch.bfloat16])
    return row | figures(place, timed(place, {"cuSPARSELt": halves, DENSE: calls}), ours="cuSPARSELt")


def training(place: Place) -> Iterator[Case]:
    """A step of mask training through the linears of a BERT-base layer: y, and the gradients of x and of the scores."""
    for tokens, bound in ((12, 1.3),) if place.small else ((4096, 1.3), (512, 2.0)):
        yield Case(f"{tokens} tokens", partial(_training, place, tokens, "ours", (Goal("ratio", "≥", bound),)))
        yield Case(f"torch.compile, {tokens} tokens", partial(_training, place, tokens, "compile", ()))


def _training(place: Place, tokens: int, name: str, goals: tuple[Goal, ...]) -> Row:
    function = compiled(place, eager) if name == "compile" else masked_matmul
    shapes = [(24, 16)] if place.small else [*SHAPES, *SHAPES[2:] * 3]  # four of 768 x 768
    rng = place.generator(("training", tokens))
    given, operations = [], 0.0
    for rows, cols in shapes:
        x, dy = (torch.randn(tokens, n, generator=rng).bfloat16() for n in (cols, rows))
        weight, scores = (torch.randn(rows, cols, generator=rng) for _ in range(2))
        threshold = topk_threshold(scores.flatten(), scores.numel() // 10)
        given.append([part.to(place.device) for part in (dy, x, weight, scores, threshold)])
        operations += 6.0 * tokens * rows * cols
    want = step(masked_matmul_ref, *(part.cpu().double() for part in given[0]))
    row = near(dict(enumerate(step(function, *given[0]))), dict(enumerate(want)), PRODUCTS[torch.bfloat16])
    calls = {
        side: [lambda one=one: [step(one, *arrays) for arrays in given]]
        for side, one in ((name, function), ("eager", eager))
    }
    versus = "eager" if goals else None
    return row | figures(
        place, timed(place, calls), ours=name, operations=operations, versus=versus, goals=goals
    )  # fmt: skip


def sweeps(place: Place) -> Iterator[Case]:
    for rows, n_in in ((16, 40),) if place.small else ((768, 768), (3072, 768), (768, 3072)):
        for name, sparsity in (("unstructured", 0.875), ("2:4", 0.5)):
            yield Case(f"{name} {rows}x{n_in}", partial(_sweep, place, name, sparsity, rows, n_in))


def _sweep(place: Place, name: str, sparsity: float, rows: int, n_in: int) -> Row:
    """Both sides are given the factor U, in float32, and are called from Python."""
    from sparsebert.kernels.obs_prune import obs_sweep

    rng, pattern = place.generator(("sweeps", name, rows)), patterns.parse(name)
    h, weight = moments_like(n_in, rng), torch.randn(rows, n_in, generator=rng)
    u = _inverse_factor(h).float()
    arguments = weight.to(place.device), u.to(place.device), pattern, sparsity, 128
    zeros = rows * n_in - patterns.kept_in(pattern, rows, n_in, sparsity)
    if not sweeps_its_own_mask(*arguments[:2], obs_sweep(*arguments), zeros):
        raise harness.WrongOutput(f"the weights are not those of a sweep with {zeros} zeros")
    calls, loop = {"ours": [partial(obs_sweep, *arguments)], LOOP: [partial(eager_sweep, *arguments)]}, LOOP
    if place.reference is not None:
        published, case = Published(place.reference), SweepCase("obs_sweep", rows, n_in, pattern, sparsity)
        loop = "published loop"
        calls[loop] = [partial(published.sweep, arguments[0], h.float().to(place.device), arguments[1], case)]
    goals = (Goal("ratio", "≥", 15),)
    return figures(place, timed(place, calls, rounds=5), operations=rows * n_in**2, versus=loop, goals=goals)


# Methods that decide by formulas; those of ADMM amplify the last digits of sums, so that they keep other weights.
EXACT = ({"method": "sparsegpt"}, {"method": "obs"}, {"method": "knowledge", "tier": 0, "without": "admm"})
AS_GOOD = 2.0  # times the divergence that the CPU's weights give


def pruning(place: Place) -> Iterator[Case]:
    """Random weights and texts: first against the CPU at a small size, then tier 1 is timed."""
    for settings in EXACT:
        title = ", ".join(f"{name} {value}" for name, value in settings.items())
        yield Case(f"weights as on the CPU: {title}", partial(_as_on_the_cpu, place, settings))
    yield Case("logits as near as the CPU's: tier 1", partial(_as_near_as_the_cpus, place))
    for name, sizes, bound in (("BERT-base", BERT_BASE, 30), ("BERT-large", BERT_LARGE, 90)):
        tokens = 1500 if place.small else 150_000
        run = partial(_pruning, place, TINY if place.small else sizes, tokens, (Goal("seconds", "≤", bound),))
        yield Case(f"tier 1, {name}, {tokens} tokens", run)


def _settings(place: Place, tokens: int, device: str | None = None, **settings) -> PruneConfig:
    if "device" not in PruneConfig.model_fields:
        raise UnsupportedError("this version prunes on the CPU only", fix="take one whose PruneConfig has a device")
    device = device or ("cpu" if place.rehearsal else "cuda")
    return PruneConfig(sparsity=SPARSITY, calibration_tokens=tokens, device=device, **settings)


def _on_both(place: Place, **settings) -> tuple[list[torch.nn.Module], list[dict]]:
    """A small model, pruned on the CPU and on the device, and the calibration batches. Products are float32 on both."""
    encoders.bf16_is_fast = lambda *given: False  # in this process, which is the section's own
    models, tokens = [classifier(TINY, place.seed_of("small")) for _ in range(2)], 1500
    texts = _texts(place, models[0], tokens)
    for model, device in zip(models, ("cpu", None), strict=True):
        prune(model, texts, _settings(place, tokens, device, **settings))
    return models, texts.batches


def _as_on_the_cpu(place: Place, settings: dict) -> Row:
    models, _ = _on_both(place, **settings)
    want, got = ({name: one.weight for name, one in encoder_linears(model).items()} for model in models)
    return near(got, want, PRUNED_ALIKE)


def _as_near_as_the_cpus(place: Place) -> Row:
    models, batches = _on_both(place, tier=1)
    with torch.inference_mode():
        dense, *found = (
            torch.cat([model(**batch).logits for batch in batches])
            for model in (classifier(TINY, place.seed_of("small")), *models)
        )
    cpus, mine = (float((logits - dense).square().sum()) for logits in found)
    if not mine <= AS_GOOD * cpus:
        raise harness.WrongOutput(f"the logits are off by {mine / cpus:.2f} times as much as with the CPU's weights")
    return {"error": max(0.0, mine / cpus - 1), "tolerance": AS_GOOD - 1}


def _texts(place: Place, model: torch.nn.Module, tokens: int):
    """Calibration texts of random words, of about 128 tokens, or of 32 if the model's positions are few."""
    length = min(128, model.config.max_position_embeddings - 8) - 2
    rng = np.random.default_rng(place.seed_of("texts"))
    number = -(-tokens * 5 // 4 // length) + 40  # some are held out
    texts = [" ".join(rng.choice(WORDS, length)) for _ in range(number)]
    examples = data.Examples("random", "train", texts, None, None)
    return draw(model, tokenizer(), examples, tokens, None, seed=0)


def _pruning(place: Place, sizes: dict, tokens: int, goals: tuple[Goal, ...]) -> Row:
    settings, model = _settings(place, tokens, tier=1), classifier(sizes, place.seed_of("pruned"))
    texts = _texts(place, model, tokens)
    start = time.perf_counter()
    result = prune(model, texts, settings)
    seconds = time.perf_counter() - start
    if abs(result.sparsity - SPARSITY) > 1e-3:
        raise harness.WrongOutput(f"a share of {result.sparsity:.4f} is zero, {SPARSITY} was asked for")
    if any(not weight.isfinite().all() for weight in model.parameters()):
        raise harness.WrongOutput("a weight is not finite")
    row = {"ms": 1e3 * seconds, "seconds": seconds, "why": f"{result.tokens} tokens"}
    return row | against(place, row, goals)


def attentions(place: Place) -> Iterator[Case]:
    large = (1, 128, 12, 64), (32, 128, 12, 64), (8, 512, 12, 64)
    for shape in ((2, 9, 2, 16),) if place.small else large:
        yield Case("{} x {}, {} heads of {}".format(*shape), partial(_attention, place, *shape))


def _attention(place: Place, texts: int, tokens: int, heads: int, size: int) -> Row:
    from sparsebert.kernels.sparse_encoder import attention

    hidden, width = heads * size, texts * tokens
    number = copies(place, 4 * hidden * width * BF16)
    by_feature = [torch.randn(3 * hidden, width, device=place.device, dtype=torch.bfloat16) for _ in range(number)]
    first = torch.arange(width, device=place.device, dtype=torch.int32) // tokens * tokens
    count, out = torch.tensor([width], dtype=torch.int32, device=place.device), torch.empty_like(by_feature[0][:hidden])
    by_text = [
        qkv.view(3, heads, size, texts, tokens).permute(0, 3, 1, 4, 2).contiguous() for qkv in by_feature
    ]  # fmt: skip
    ours = [partial(attention, qkv, first, first + tokens, count, heads, out) for qkv in by_feature]
    sdpa = [partial(F.scaled_dot_product_attention, *qkv) for qkv in by_text]
    want = sdpa[0]().permute(1, 3, 0, 2).reshape(hidden, width)
    row = near({"out": ours[0]()}, {"out": want}, STATES[torch.bfloat16])
    timings = timed(place, {"ours": ours, "SDPA": sdpa}, graph=True)
    moved, operations = 4 * hidden * width * BF16, 4.0 * hidden * width * tokens
    return row | figures(place, timings, size=moved, operations=operations)


def solvers(place: Place) -> Iterator[Case]:
    """The ops of pruning, on the shapes of BERT-base's feed-forward part, against what torch has for them."""
    yield Case("gram", partial(_gram, place))
    yield Case("topk_mask", partial(_topk_mask, place))
    yield Case("masked_lstsq", partial(_masked_lstsq, place))


def _gram(place: Place) -> Row:
    tokens, n = (30, 20) if place.small else (8192, 3072)
    x = [torch.randn(tokens, n, device=place.device) for _ in range(copies(place, 4 * tokens * n))]
    calls = {"ours": [partial(gram, part) for part in x], "x.T @ x": [lambda part=part: part.T @ part for part in x]}
    return figures(place, timed(place, calls), size=4 * tokens * n + 8 * n * n, operations=2.0 * tokens * n * n)


def _topk_mask(place: Place) -> Row:
    n, k = (300, 30) if place.small else (3072 * 768, 3072 * 768 // 10)
    scores = [torch.rand(n, device=place.device) for _ in range(copies(place, 4 * n))]
    calls = {
        "ours": [partial(topk_mask, part, k) for part in scores],
        "torch.topk": [partial(torch.topk, part, k, sorted=False) for part in scores],
    }
    return figures(place, timed(place, calls), size=5 * n)


def _masked_lstsq(place: Place) -> Row:
    rows, n_in, group = (8, 30, 2) if place.small else (768, 3072, 32)
    rng = place.generator("lstsq")
    h = moments_like(n_in, rng).to(place.device)
    mask = (torch.rand(rows // group, n_in, generator=rng) < 0.1).repeat_interleave(group, 0).to(place.device)
    target = torch.randn(rows, n_in, generator=rng, dtype=torch.float64).to(place.device)

    def by_group() -> torch.Tensor:
        v = torch.zeros_like(target)
        for first in range(0, rows, group):
            kept = mask[first].nonzero().flatten()
            factor = torch.linalg.cholesky(h[kept][:, kept])
            v[first : first + group, kept] = torch.cholesky_solve(target[first : first + group, kept].T, factor).T
        return v

    row = near({"V": masked_lstsq(target, h, mask)}, {"V": by_group()}, SOLVED)
    calls = {"ours": [partial(masked_lstsq, target, h, mask)], "torch, by group": [by_group]}
    return row | figures(place, timed(place, calls, rounds=5))

"""The timings of bench.gpu_report, but for linears and pruning: the device, the engine, mask training, attention and
the solvers, with their goals. Each function gives the cases of one section; each case checks its output before its
clock starts.
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
from bench.gpu_checks import PRODUCTS, SOLVED, STATES, moments_like
from bench.gpu_models import (
    BERT_BASE,
    TINY,
    DenseBert,
    Ids,
    checked_logits,
    directory_of,
    engine_of,
    expected_logits,
    token_ids,
)
from bench.gpu_place import (
    BF16,
    DENSE,
    SPARSITY,
    Case,
    Goal,
    Place,
    compiled,
    copies,
    figures,
    near,
    replayed,
    timed,
)
from bench.harness import Row
from sparsebert import patterns
from sparsebert.errors import UnsupportedError, first_line
from sparsebert.ops.gram import gram
from sparsebert.ops.masked_lstsq import masked_lstsq
from sparsebert.ops.masked_matmul import masked_matmul, masked_matmul_ref
from sparsebert.ops.obs_prune import _inverse_factor
from sparsebert.ops.topk_mask import topk_mask, topk_threshold

LOOP = "torch loop"


def device(place: Place) -> Iterator[Case]:
    """Which GPU it is. Its row is not available if there is none that the engine runs on."""
    yield Case("which", partial(_which, place))


def rates(place: Place) -> Iterator[Case]:
    """What a copy and a matrix product reach on the GPU."""
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

"""The correctness checks of bench.gpu_report: every op on the GPU against its reference on the CPU, on fresh random
data. Each function gives the cases of one section.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from bench import harness
from bench.bench_obs_prune_cuda import sweeps_its_own_mask
from bench.gpu_forms import FormLinear, forms_of, samples
from bench.gpu_models import TINY, checked_logits, directory_of, engine_of, expected_logits, token_ids
from bench.gpu_place import Case, Place, near, require_equal
from bench.harness import Row
from bench.shapes import layer_problem
from sparsebert import patterns
from sparsebert.ops import admm_prune as admm
from sparsebert.ops.gram import gram, gram_ref
from sparsebert.ops.masked_lstsq import masked_lstsq, masked_lstsq_ref
from sparsebert.ops.masked_matmul import masked_matmul, masked_matmul_ref
from sparsebert.ops.obs_prune import _inverse_factor, obs_prune, obs_prune_ref, obs_sweep, obs_sweep_ref
from sparsebert.ops.topk_mask import pattern_mask, topk_mask, topk_mask_ref
from sparsebert.patterns import Pattern, kept_in

# Errors are shares of the largest value of a result.
MOMENTS = 4e-6  # float32 sums over at most 256 tokens
SOLVED = 1e-8  # float64 systems, whose condition number is up to 1e4
# float32: sums of at most 4,096 products. bfloat16: results are rounded by 2^-9 of their size, by the interpreter by
# 2^-8, and masked weights before.
PRODUCTS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
STATES = {torch.float32: 2e-5, torch.bfloat16: 4e-2}  # of what stands between the linears: rounded up to three times
REFITTED = 0.03  # errors of supports that float32 and float64 choose may differ by this share, as near-ties do
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y, "gelu": F.gelu, "relu": torch.relu, "tanh": torch.tanh,
}  # fmt: skip


def moments(place: Place) -> Iterator[Case]:
    for shape in place.shapes([(1, 1, 1), (257, 47, 49), (515, 97, 31)], [(4096, 768, 2304), (1000, 3072, 768)]):
        yield Case(f"gram {shape}", partial(_moments, place, *shape))


def _moments(place: Place, tokens: int, n_in: int, n_y: int) -> Row:
    rng = place.generator(("gram", tokens, n_in))
    x = torch.randn(tokens, n_in, generator=rng) + torch.linspace(-2, 2, n_in)
    y, weights = torch.randn(tokens, n_y, generator=rng), torch.rand(tokens, generator=rng) + 0.1
    rows = []
    for w in (None, weights):
        want = dict(zip(("gram", "cross"), gram_ref(x, y, w), strict=True))
        on_device = [None if part is None else part.to(place.device) for part in (x, y, w)]
        found = gram(*on_device)
        rows.append(near({"gram": found.gram, "cross": found.cross}, want, MOMENTS))
    return max(rows, key=lambda row: row["error"])


def highest(place: Place) -> Iterator[Case]:
    for shape in place.shapes([(1, 1), (7, 31), (3, 1025)], [(768, 768), (1, 3072 * 768)]):
        yield Case(f"topk_mask {shape}", partial(_highest, place, *shape))
    for name, sparsity in (("unstructured", 0.9), ("2:4", 0.5), ("16x1", 0.75), ("16:2:8", 0.75)):
        yield Case(f"pattern_mask {name}", partial(_pattern_mask, place, name, sparsity))


def _highest(place: Place, rows: int, n: int) -> Row:
    # Whole numbers, so that many are equal: of these the lower index is kept.
    scores = torch.randint(0, max(2, n // 3), (rows, n), generator=place.generator(("topk", rows, n))).float()
    for k in {0, 1, n // 3, n - 1, n}:
        require_equal(f"k = {k}", topk_mask(scores.to(place.device), k), topk_mask_ref(scores, k))
    return {"error": 0.0, "tolerance": 0.0}


def _pattern_mask(place: Place, name: str, sparsity: float) -> Row:
    scores = torch.rand(64, 96, generator=place.generator(("pattern", name)))
    pattern = patterns.parse(name)
    want = pattern_mask(scores, pattern, sparsity)
    require_equal(name, pattern_mask(scores.to(place.device), pattern, sparsity), want)
    return {"error": 0.0, "tolerance": 0.0}


def least_squares(place: Place) -> Iterator[Case]:
    small = [(1, 1, 1.0), (13, 31, 0.5), (40, 150, 0.9)]
    for shape in place.shapes(small, [(64, 768, 0.1), (64, 768, 0.9), (32, 3072, 0.1)]):
        yield Case(f"masked_lstsq {shape}", partial(_least_squares, place, *shape))


def _least_squares(place: Place, rows: int, n_in: int, kept: float) -> Row:
    rng = place.generator(("lstsq", rows, n_in, kept))
    h, target = moments_like(n_in, rng), torch.randn(rows, n_in, generator=rng, dtype=torch.float64)
    # Groups of three rows share a support; one row keeps nothing.
    mask = (torch.rand(-(-rows // 3), n_in, generator=rng) < kept).repeat(3, 1)[:rows].contiguous()
    mask[rows // 2] = False
    got = masked_lstsq(*(part.to(place.device) for part in (target, h, mask)))
    require_equal("the support", got != 0, mask)
    return near({"V": got}, {"V": masked_lstsq_ref(target, h, mask)}, SOLVED)


def moments_like(n_in: int, rng: torch.Generator) -> torch.Tensor:
    """H of random inputs, float64 [n_in, n_in], symmetric to the last bit."""
    x = torch.randn(2 * n_in + 20, n_in, generator=rng, dtype=torch.float64)
    h = x.T @ x / len(x) + 0.1 * torch.eye(n_in, dtype=torch.float64)
    return torch.triu(h) + torch.triu(h, 1).T


PRUNED = (("unstructured", 0.7), ("2:4", 0.5), ("8x1", 0.5), ("16:2:8", 0.75))


def surgeon(place: Place) -> Iterator[Case]:
    for name, sparsity in PRUNED:
        for shape in place.shapes([(16, 24)], [(32, 192)]):
            yield Case(f"obs_prune {name} {shape}", partial(_surgeon, place, name, sparsity, *shape))
    for name, sparsity in PRUNED:
        for dtype in (torch.float64, torch.float32):
            for shape in place.shapes([(16, 136)], [(768, 768)]):
                title = f"obs_sweep {name} {shape} {_short(dtype)}"
                yield Case(title, partial(_sweep, place, name, sparsity, *shape, dtype))


def _surgeon(place: Place, name: str, sparsity: float, rows: int, n_in: int) -> Row:
    rng = place.generator(("obs", name, rows))
    weight, h = torch.randn(rows, n_in, generator=rng, dtype=torch.float64), moments_like(n_in, rng)
    pattern, found = patterns.parse(name), []
    for per_row in (True, False):
        want = obs_prune_ref(weight, h, pattern, sparsity, per_row=per_row)
        got = obs_prune(weight.to(place.device), h.to(place.device), pattern, sparsity, per_row=per_row)
        require_equal("the support", got != 0, want != 0)
        found.append(near({"V": got}, {"V": want}, SOLVED))
    return max(found, key=lambda row: row["error"])


def _sweep(place: Place, name: str, sparsity: float, rows: int, n_in: int, dtype: torch.dtype) -> Row:
    rng = place.generator(("sweep", name, rows))
    weight, h = torch.randn(rows, n_in, generator=rng, dtype=torch.float64), moments_like(n_in, rng)
    pattern = patterns.parse(name)
    got = swept(place, weight.to(dtype), h, pattern, sparsity)
    if dtype == torch.float32:  # near-ties may fall differently
        zeros = rows * n_in - kept_in(pattern, rows, n_in, sparsity)
        if not sweeps_its_own_mask(weight.float(), _inverse_factor(h), got.cpu(), zeros):
            raise harness.WrongOutput(f"the weights are not those of a sweep with {zeros} zeros")
        return {"tolerance": 1e-3}
    want = obs_sweep_ref(weight, h, pattern, sparsity)
    require_equal("the support", got != 0, want != 0)
    return near({"V": got}, {"V": want}, SOLVED)


def swept(place: Place, weight: torch.Tensor, h: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """obs_sweep by its Triton kernel."""
    if place.rehearsal:
        from sparsebert.kernels.obs_prune import obs_sweep as kernel

        return kernel(weight, _inverse_factor(h).to(weight.dtype), pattern, sparsity)
    return obs_sweep(weight.to(place.device), h.to(place.device), pattern, sparsity)


def multipliers(place: Place) -> Iterator[Case]:
    for shape in place.shapes([(7, 31), (33, 49)], [(64, 192)]):
        yield Case(f"admm_prune, no near-ties {shape}", partial(_separated, place, *shape))
    for name, sparsity in place.shapes([("2:4", 0.5)], [("unstructured", 0.875), ("32x1", 0.75), ("32:2:16", 0.875)]):
        yield Case(f"admm_prune {name}", partial(_multipliers, place, name, sparsity))


def _separated(place: Place, rows: int, n_in: int) -> Row:
    """Nearly independent inputs, and weights to keep that are at least three times the others: one right answer."""
    rng = place.generator(("separated", rows))
    h = 0.02 * torch.randn(n_in, n_in, generator=rng, dtype=torch.float64)
    h = h @ h.T + torch.eye(n_in, dtype=torch.float64)
    weight = 0.3 * torch.rand(rows, n_in, generator=rng, dtype=torch.float64)
    kept = kept_in(patterns.Unstructured(), rows, n_in, 0.75)
    weight.view(-1)[torch.randperm(rows * n_in, generator=rng)[:kept]] += 1.0
    want = admm.admm_prune_ref(weight, h, patterns.Unstructured(), 0.75)
    got = admm.admm_prune(weight.to(place.device), h.to(place.device), patterns.Unstructured(), 0.75)
    require_equal("the support", got, want)
    return {"error": 0.0, "tolerance": 0.0}


def _multipliers(place: Place, name: str, sparsity: float) -> Row:
    rows, n_in = (32, 48) if place.small else (64, 192)
    weight, h = map(torch.from_numpy, layer_problem(rows, n_in, seed=place.seed_of(("admm", name))))
    pattern = patterns.parse(name)
    kept = admm.admm_prune(weight.to(place.device), h.to(place.device), pattern, sparsity).cpu()
    require_equal("the pattern", pattern_mask(kept.float(), pattern, sparsity), kept)
    mine, reference = (
        _refitted(weight, h, support) for support in (kept, admm.admm_prune_ref(weight, h, pattern, sparsity))
    )
    if not mine <= reference * (1 + REFITTED):
        raise harness.WrongOutput(f"the error after a refit is {mine:.5g}, the reference's is {reference:.5g}")
    return {"error": mine / reference - 1, "tolerance": REFITTED}


def _refitted(weight: torch.Tensor, h: torch.Tensor, support: torch.Tensor) -> float:
    """tr((V - W*) H (V - W*)ᵀ) of the best V on a support."""
    lost = masked_lstsq_ref(weight @ h, h, support) - weight
    return float(((lost @ h) * lost).sum())


def masked(place: Place) -> Iterator[Case]:
    # tokens, n_in, n_out, rows that share a score, inputs that share a threshold (0: all)
    small = [(1, 1, 1, 1, 0), (67, 33, 64, 1, 0), (35, 66, 160, 32, 0), (9, 72, 64, 16, 8)]
    for shape in place.shapes(small, [(512, 768, 3072, 1, 0), (4096, 768, 768, 32, 0)]):
        for dtype in PRODUCTS:
            for way in ("op", "kernel"):
                yield Case(f"masked_matmul, {way} {shape} {_short(dtype)}", partial(_masked, place, way, dtype, *shape))


def _masked(place: Place, way: str, dtype: torch.dtype, tokens: int, n_in: int, n_out: int, share: int, reach: int):
    """Forward and backward, through the op or by the Triton kernels alone."""
    rng = place.generator(("masked", tokens, n_in, n_out, share))
    x, dy = (torch.randn(tokens, n, generator=rng).to(dtype) for n in (n_in, n_out))
    weight = torch.randn(n_out, n_in, generator=rng) / math.sqrt(n_in)
    scores, bias = torch.randn(n_out // share, n_in, generator=rng), torch.randn(n_out, generator=rng)
    threshold = torch.randn(n_out // share, n_in // reach, generator=rng) if reach else torch.tensor(0.3)
    want = _gradients(masked_matmul_ref, x.double(), weight.double(), scores.double(), threshold, bias.double(), dy)
    given = [tensor.to(place.device) for tensor in (x, weight, scores, threshold, bias)]
    if way == "op":
        got = _gradients(masked_matmul, *given, dy.to(place.device))
    else:
        from sparsebert.kernels import masked_matmul as kernel

        backward = kernel.masked_matmul_backward(dy.to(place.device), *given[:4])
        got = {"y": kernel.masked_matmul(*given), **dict(zip(("dX", "dW", "dŝ"), backward, strict=True))}
        del want["db"]  # torch sums it
    return near(got, want, PRODUCTS[dtype])


def _gradients(function: Callable, x, weight, scores, threshold, bias, dy) -> dict[str, torch.Tensor]:
    x, weight, scores, bias = (part.detach().requires_grad_() for part in (x, weight, scores, bias))
    y = function(x, weight, scores, threshold, bias)
    y.backward(dy.to(y.dtype))
    return {"y": y, "dX": x.grad, "dW": weight.grad, "dŝ": scores.grad, "db": bias.grad}


def products(place: Place) -> Iterator[Case]:
    """Each form of a linear, on a sparse weight and another one, each with an activation."""
    # n_out, n_in, tokens
    small = [((128, 48, 5), ("none", "gelu")), ((128, 80, 67), ("relu", "tanh"))]
    large = [((768, 3072, 128), ("none", "gelu")), ((3072, 768, 999), ("gelu", "none"))]
    for shape, activations in place.shapes(small, large):
        for dtype in PRODUCTS:
            for form in forms_of(dtype):
                title = f"sparse_matmul {form} {shape} {_short(dtype)}"
                yield Case(title, partial(_product, place, form, dtype, shape, activations))


def _product(place: Place, form: str, dtype: torch.dtype, shape: tuple[int, ...], activations: tuple[str, ...]) -> Row:
    n_out, n_in, tokens = shape
    rng, found = np.random.default_rng(place.seed_of((form, shape))), []
    for weight, activation in zip(samples(form, n_out, n_in, rng), activations, strict=True):
        x = torch.from_numpy(rng.standard_normal((n_in, tokens), np.float32)).to(dtype)
        bias = torch.from_numpy(rng.standard_normal(n_out, np.float32))
        want = torch.from_numpy(weight).to(dtype).double() @ x.double() + bias.double()[:, None]
        linear = FormLinear(place, form, weight, bias, activation, dtype)
        got = linear(x.to(place.device))
        found.append(near({activation: got}, {activation: ACTIVATIONS[activation](want)}, linear.tolerance))
    return max(found, key=lambda row: row["error"])


def between(place: Place) -> Iterator[Case]:
    """What stands between the linears of an encoder."""
    small = [([1], 1, 16), ([3, 1, 40, 7, 70], 2, 7), ([31, 33, 64, 1], 3, 33)]
    for lengths, heads, size in place.shapes(small, [([128] * 32, 12, 64), ([512, 3, 77], 16, 64)]):
        title = f"{len(lengths)} of at most {max(lengths)} tokens, {heads} heads of {size}"
        for dtype in STATES:
            run = partial(_attention, place, dtype, lengths, heads, size)
            yield Case(f"attention {title} {_short(dtype)}", run)
    for n in place.shapes([1, 20, 129], [768, 1024]):
        for dtype in STATES:
            yield Case(f"add_norm and embed {n} {_short(dtype)}", partial(_norms, place, dtype, n))


def _batch(place: Place, lengths: list[int]) -> dict[str, torch.Tensor]:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    counts = torch.tensor(lengths)
    arrays = {
        "first": starts[:-1].repeat_interleave(counts), "stop": starts[1:].repeat_interleave(counts),
        "tokens": starts[-1:],
    }  # fmt: skip
    return {name: tensor.to(place.device, torch.int32) for name, tensor in arrays.items()}


def _attention(place: Place, dtype: torch.dtype, lengths: list[int], heads: int, size: int) -> Row:
    from sparsebert.kernels.sparse_encoder import attention

    rng, hidden = place.generator(("attention", len(lengths), heads, size)), heads * size
    qkv = torch.randn(3 * hidden, sum(lengths), generator=rng).to(dtype)
    parts = []
    for start, stop in pairwise(np.cumsum([0, *lengths])):
        q, k, v = qkv[:, start:stop].double().reshape(3, heads, size, -1).transpose(2, 3)
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(hidden, -1))
    want, given = torch.cat(parts, 1), _batch(place, lengths)
    found = []
    for invariant in (False, True):
        out = torch.full((hidden, sum(lengths)), torch.nan, dtype=dtype, device=place.device)
        got = attention(
            qkv.to(place.device), given["first"], given["stop"], given["tokens"], heads, out, invariant=invariant
        )
        found.append(near({"out": got}, {"out": want}, STATES[dtype]))
    return max(found, key=lambda row: row["error"])


def _norms(place: Place, dtype: torch.dtype, n: int) -> Row:
    from sparsebert.kernels.sparse_encoder import add_norm, embed

    lengths, eps = [5, 1, 61], 1e-5
    tokens, rng, given = sum(lengths), place.generator(("norms", n)), _batch(place, lengths)
    x, residual = (torch.randn(n, tokens, generator=rng).to(dtype) for _ in range(2))
    words, norm = torch.randn(50, n, generator=rng).to(dtype), torch.randn(2, n, generator=rng)
    positions = torch.randn(2, max(lengths), n, generator=rng)
    ids, types = (torch.randint(most, (tokens,), generator=rng, dtype=torch.int32) for most in (50, 2))
    places = torch.arange(tokens) - given["first"].cpu()
    embedded = words[ids].double() + positions[types, places].double()
    want = {
        name: F.layer_norm(rows, (n,), *norm.double(), eps).T
        for name, rows in (("add_norm", (x.double() + residual.double()).T), ("embed", embedded))
    }
    on = partial(torch.Tensor.to, device=place.device)
    norms, out = (on(norm[0]), on(norm[1])), torch.full((n, tokens), torch.nan, dtype=dtype, device=place.device)
    arrays = (on(ids), on(types), given["first"], on(words), on(positions))
    got = {
        "embed": embed(*arrays, norms, eps, given["tokens"], out),
        "add_norm": add_norm(on(x), on(residual), norms, eps, given["tokens"], torch.empty_like(out)),
    }
    return near(got, want, STATES[dtype])


def encoders(place: Place) -> Iterator[Case]:
    """The whole engine against torch in float32: batches of one size, ragged ones, and one text at a time."""
    small = [("unstructured", "fp32", False), ("16x1", "bf16", False), ("16x1", "fp32", True)]
    for pattern, dtype, invariant in place.shapes(small, [("16x1", "fp32", False), ("2:4", "bf16", False)]):
        title = f"engine {pattern} {dtype}{', batch invariant' * invariant}"
        yield Case(title, partial(_encoder, place, pattern, dtype, invariant))


def _encoder(place: Place, pattern: str, dtype: str, invariant: bool) -> Row:
    directory = directory_of(place, "tiny", TINY, pattern, 0.8)
    engine = engine_of(place, directory, dtype, batch_invariant=invariant)
    rng = np.random.default_rng(place.seed_of((pattern, dtype)))
    lengths = [[7], [5, 20, 1, 3]] if place.small else [[7], [5, 20, 1, 3], [16] * 8, [24] * 64]
    found = []
    for ids in (token_ids(rng, of, len(engine.encoder.words)) for of in lengths):
        want, types = expected_logits(directory, ids), [[0] * len(row) for row in ids]
        for _ in range(1 if place.rehearsal else 2):  # the second time, a CUDA graph is replayed
            found.append(checked_logits(logits := engine.forward(ids, types), want, dtype))
        if invariant:
            alone = np.concatenate([engine.forward([row], [[0] * len(row)]) for row in ids[:4]])
            bits = (torch.from_numpy(part.view("i4")) for part in (alone, logits[:4].copy()))
            require_equal("bits of a text alone and in a batch", *bits)
    return max(found, key=lambda row: row["error"])


def _short(dtype: torch.dtype) -> str:
    return {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]

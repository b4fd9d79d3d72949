"""The engine on this processor against the rivals that are installed: BERT-base, dense and pruned, in each dtype.

python -m bench.cpu_report [--rivals openvino-int8,…] [--threads N] [--minutes M] [--quick] [--json] [--markdown FILE]
make cpu-report      installs the rivals first; the table goes to bench/results/cpu/, named after the processor
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers

from bench import harness
from bench.bench_end_to_end import Size
from bench.bench_sparse_matmul import rounded
from bench.harness import Clock
from bench.tables import RESULTS
from sparsebert import checkpoint, environment, machine
from sparsebert.checkpoint.scales import PARTS
from sparsebert.cli.timing import LABELS, SHAPES, texts_of
from sparsebert.config import BenchConfig, PruneConfig
from sparsebert.encoders import collate, encoder_linears
from sparsebert.engine import Engine
from sparsebert.engine.formats import DTYPES
from sparsebert.engine.measure import Timings, interleave, ratio_text
from sparsebert.engine.rivals import OURS, RIVALS, SETTLE_S, SHARE, Call, Work, named, torch_threads
from sparsebert.errors import UnsupportedError
from sparsebert.ops import _dispatch
from sparsebert.pruning import prune
from sparsebert.pruning.entry import int8_logits

DEFAULT_RIVALS = "openvino-int8,openvino-bf16,onnxruntime-int8,openvino,torch"
SIZES = (Size(1, "32", 2), Size(1, "128", 1), Size(8, "128", 8), Size(32, "mix", 32))
QUICK = (Size(1, "32", 2),)
ROUNDS, QUICK_ROUNDS = (6, 15), (2, 2)  # fewest and most; an interval needs 6
DENSE = "dense"
# Pattern -> the dtypes of our engine; SPARSITY of the weights are pruned, of dense none.
PATTERNS = {
    DENSE: ("fp32", "int8"), "unstructured": ("fp32",), "4x1": ("int8",), "32x1": ("fp32", "bf16", "int8"),
}  # fmt: skip
SPARSITY = 0.9
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "openvino", "nncf")
COLUMNS = {
    "batch": "d", "seq": "", "engine": "", "dtype": "", "pattern": "", "sparsity": ".2f", "ms": ".2f", "spread": ".0%",
    "seq_per_s": ".1f", "error": ".0e", "output": "",
}  # fmt: skip


class Candidate(NamedTuple):
    engine: str
    dtype: str
    pattern: str
    call: Call
    expected: list[np.ndarray]  # torch's logits of each batch

    def __str__(self) -> str:
        return f"{self.engine} {self.dtype}, {self.pattern}"


class Texts(NamedTuple):
    """The batches of all sizes, one size after another: as arrays padded to the longest text, and as lists of ids."""

    of_size: dict[Size, range]
    padded: list[dict]
    ids: list[list[list[int]]]


def batches(directory: Path, sizes: tuple[Size, ...]) -> Texts:
    tokenizer = checkpoint.load_tokenizer(directory)
    of_size, padded, ids = {}, [], []
    for size in sizes:
        texts = texts_of(directory, BenchConfig(n=size.n, seq=size.seq))
        first = len(padded)
        for at in range(0, size.n, size.batch):
            rows = range(at, min(at + size.batch, size.n))
            batch = collate(tokenizer, texts, rows)
            padded.append({name: batch[name] for name in ("input_ids", "attention_mask")})
            ids.append([texts[i]["input_ids"] for i in rows])
        of_size[size] = range(first, len(padded))
    return Texts(of_size, padded, ids)


def random_classifier(model: str) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.BertConfig(**SHAPES[model][1], num_labels=LABELS)
        return transformers.BertForSequenceClassification(config).eval()


@torch.no_grad()
def to_int8(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Rounds the weights of the encoder's linears to the nearest point of int8 grids, and returns the scales. Unlike
    `sparsebert quantize` it looks for no better ones, which takes minutes and changes no time.
    """
    scales, linears, ranges = {}, encoder_linears(model), {}
    hooks = [
        module.register_forward_pre_hook(lambda module, x: ranges.update({module: x[0].aminmax()}))
        for module in linears.values()
    ]
    ids = np.random.default_rng(0).integers(model.config.vocab_size // 2, model.config.vocab_size, (16, 64))
    model(torch.from_numpy(ids))
    for hook in hooks:
        hook.remove()
    for name, module in linears.items():
        low, high = min(float(ranges[module].min), 0.0), max(float(ranges[module].max), 0.0)
        grid = rounded(module.weight.numpy(), (high - low) / 255, round(-low / (high - low) * 255))
        module.weight.copy_(torch.from_numpy(grid.weight))
        scales |= {f"{name}.{part}": getattr(grid, part) for part in PARTS}
    return scales


def with_more_sentences(padded: list[dict], sentences: list[int]) -> list[dict]:
    """The batches that rivals in int8 are calibrated on: as many of sentences, whose numbers are given, as of random
    words. NNCF averages ranges over batches: with one of sentences among four of random words, its logits of sentences
    are off by up to half of the largest logit.
    """
    times = (len(padded) - len(sentences)) // len(sentences) if sentences else 0
    return padded + [padded[i] for i in sentences] * (times - 1)


def prepared(
    model: str, sizes: tuple[Size, ...], rivals: list[str], threads: int, clock: Clock, stack: contextlib.ExitStack
) -> tuple[Texts, list[Candidate], dict[str, str]]:
    """(texts, what is timed, rival -> why it is not). The rivals run the dense model, and are prepared once."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    source = checkpoint.resolve("minilm")  # of the tokenizer
    texts, dense = batches(source, sizes), random_classifier(model)
    scales, tokenizer = to_int8(dense), checkpoint.load_tokenizer(source)
    sentences = [i for size, numbers in texts.of_size.items() if size.seq == "mix" for i in numbers]
    work = Work(
        dense, texts.padded, threads, folder, None, stack, calibrate_on=with_more_sentences(texts.padded, sentences)
    )
    found: list[Candidate] = []
    for pattern, dtypes in PATTERNS.items():
        clock.say(f"preparing {OURS}, {pattern}")
        module = copy.deepcopy(dense)
        if pattern != DENSE:  # by magnitude; what is kept stays on its grid
            prune(module, None, PruneConfig(method="magnitude", pattern=pattern, sparsity=SPARSITY))
        expected = torch_logits(replace(work, model=module))
        checkpoint.save(
            module, tokenizer, folder / pattern, recipe={"command": "bench"}, figures={}, scales=scales,
            int8_logits=int8_logits,
        )  # fmt: skip
        for dtype in dtypes:
            if dtype == "bf16" and not DTYPES[dtype].has_kernel(_dispatch.isa()):
                continue
            engine = Engine.load(folder / pattern, dtype=dtype, threads=threads)
            found.append(Candidate(OURS, dtype, pattern, partial(forward, engine, texts.ids), expected))
        shutil.rmtree(folder / pattern)
    found.sort(key=lambda candidate: list(DTYPES).index(candidate.dtype))
    missing, expected = {}, torch_logits(work)
    for name in rivals:
        clock.say(f"preparing {name}")
        try:
            found.append(Candidate(name, RIVALS[name].dtype, DENSE, RIVALS[name].prepare(work), expected))
        except UnsupportedError as error:
            missing[name] = str(error)
            clock.say(missing[name])
    return texts, found, missing


def torch_logits(work: Work) -> list[np.ndarray]:
    call = RIVALS["torch"].prepare(work)
    return [call(i) for i in range(len(work.padded))]


def forward(engine: Engine, ids: list[list[list[int]]], i: int) -> np.ndarray:
    return engine.forward(ids[i], [[0] * len(row) for row in ids[i]])


def checked(size: Size, numbers: range, candidate: Candidate) -> tuple[float, bool]:
    """The largest difference of a logit from torch's, and whether the dtype allows it. Raises harness.WrongOutput if it
    is ours that differs.
    """
    error = float(np.max([np.abs(candidate.call(i) - candidate.expected[i]).max() for i in numbers]))
    largest = max(float(np.abs(logits).max()) for logits in candidate.expected)
    allowed = checkpoint.GOLDEN_TOLERANCE + SHARE[candidate.dtype] * largest
    if candidate.engine == OURS and not error <= allowed:
        raise harness.WrongOutput(f"{size}: {candidate} is off by {error:.3g}, at most {allowed:.3g} is allowed")
    return error, error <= allowed


def measure(
    size: Size, numbers: range, candidates: list[Candidate], threads: int, rounds: tuple[int, int], seconds: float
) -> list[harness.Row]:
    """One row per candidate. numbers: of the batches. rounds: fewest and most; between them, as many as fit into the
    seconds. Raises harness.WrongOutput.
    """
    end, (fewest, most) = time.monotonic() + seconds, rounds
    errors = [checked(size, numbers, candidate) for candidate in candidates]
    # A list of the logits, so that a call ends when they are there.
    calls = {str(of): lambda call=of.call: [call(i) for i in numbers] for of in candidates}
    start = time.monotonic()
    timings = interleave(calls, fewest, warmup=0, settle=SETTLE_S)
    now = time.monotonic()
    more = min(int((end - now) / (now - start) * fewest), most - fewest)
    if more > 0:
        later = interleave(calls, more, warmup=0, settle=SETTLE_S).seconds
        timings = Timings({name: np.append(each, later[name]) for name, each in timings.seconds.items()})
    rows = []
    for candidate, (error, match) in zip(candidates, errors, strict=True):
        name = str(candidate)
        ratios = {of.engine: timings.ratio(str(of), name) for of in candidates if of.engine != OURS}
        rows.append({
            "batch": size.batch, "seq": size.seq, "engine": candidate.engine, "dtype": candidate.dtype,
            "pattern": candidate.pattern, "sparsity": 0.0 if candidate.pattern == DENSE else SPARSITY,
            "threads": threads, "rounds": len(timings.seconds[name]), "ms": timings.median(name) / len(numbers) * 1e3,
            "spread": timings.spread(name), "seq_per_s": size.n / timings.median(name), "error": error,
            "output": "matches" if match else "differs", "ratios": ratios,
        } | {rival: ratio_text(ratio.value, ratio[1:]) for rival, ratio in ratios.items()})  # fmt: skip
    return rows


def report(
    model: str, sizes: tuple[Size, ...], rivals: list[str], threads: int, rounds: tuple[int, int], clock: Clock
) -> tuple[list[harness.Row], bool]:
    """(rows of all sizes, then of the rivals that are not installed; whether all sizes could be reported)."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        texts, candidates, missing = prepared(model, sizes, rivals, threads, clock, stack)

        def timed(size: Size) -> list[harness.Row]:
            clock.say(f"timing batches of {size.batch}, {size.seq} tokens")
            seconds = clock.left / (len(sizes) - sizes.index(size))
            return measure(size, texts.of_size[size], candidates, threads, rounds, seconds)

        rows, complete = harness.measured(partial(timed, size) for size in sizes)
    for name, why in missing.items():
        rows.append({"engine": name, "dtype": RIVALS[name].dtype, "output": "not installed", "why": why})
    return rows, complete


def page_of(cpu: str) -> Path:
    """Where the table of a processor goes: another page if SPARSEBERT_ISA limits it."""
    name = re.sub(r"\((r|tm)\)", "", f"{cpu} {environment.isa_cap() or ''}".lower())
    return RESULTS / "cpu" / f"{harness.file_name(name)}.md"


def notes(model: str, threads: int, load: float, rows: list[harness.Row]) -> str:
    isa = _dispatch.isa()
    kernels = ", ".join(f"{dtype.kernel(isa)} for {name}" for name, dtype in DTYPES.items())
    versions = ", ".join(f"{name} {machine.version_of(name)}" for name in PACKAGES)
    missing = ", ".join(row["engine"] for row in rows if row["output"] == "not installed")
    return (
        f"Instruction sets: {kernels}. Threads: {threads}. Versions: {versions}. Load of the machine at the start: "
        f"{load:.1f}. Rivals that are not installed, and so not timed: {missing or 'none'}.\n\n"
        f"The model is {model} with random weights, on int8 grids in all dtypes. The rivals run it dense; `pattern` "
        "and `sparsity` say what is pruned. Tokenizing is outside all timings. `seq` is the number of tokens of every "
        "text, or mix: sentences of MR, 27 tokens on average, which the rivals pad to the longest of a batch. All take "
        "turns. `ms` is the median over rounds of the milliseconds per batch, `spread` their inter-quartile range over "
        "it. A column named after a rival is the median over rounds of its time over the time of the row, with the "
        "95 % interval by order statistics. `error` is the largest difference of a logit from torch's in float32, "
        "`output` whether that is within the tolerance of the dtype."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, threads=min(2, _dispatch.threads()))
    parser.add_argument("--rivals", default=DEFAULT_RIVALS, help="as for `sparsebert bench` (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=7.0, help="6 to 15 rounds, as fit into them (default 7)")
    args = parser.parse_args()
    model, sizes, rounds = ("minilm", QUICK, QUICK_ROUNDS) if args.quick else ("bert-base", SIZES, ROUNDS)
    rivals, load, cpu = named(args.rivals), os.getloadavg()[0], machine.cpu()
    rows, complete = report(model, sizes, rivals, args.threads, rounds, Clock(args.minutes))
    page = args.markdown or (None if args.quick else page_of(cpu))
    columns, told = COLUMNS | dict.fromkeys(rivals, ""), notes(model, args.threads, load, rows)
    harness.report(f"The engine on {cpu}", rows, columns, told, page, json_only=args.json)
    if page is not None:
        print(f"written: {os.path.relpath(page)}", file=sys.stderr)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())

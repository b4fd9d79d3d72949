"""The demo: MiniLM and real sentences → fine-tune → prune → check → run → report.html. Every step is kept and reused by
the next run.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path

import numpy as np

from sparsebert import checkpoint, data, heads
from sparsebert.cli.output import progress, table
from sparsebert.cli.timing import texts_of
from sparsebert.config import AttackConfig, BenchConfig, DemoConfig, PruneConfig, TrainConfig
from sparsebert.encoders import predict
from sparsebert.engine.measure import ratio_text
from sparsebert.engine.rivals import OURS, time_rivals
from sparsebert.jobs import Ledger, code_of, place, require_place
from sparsebert.pruning import PruneResult, prune_checkpoint
from sparsebert.robustness import Evaluation, compare, evaluate
from sparsebert.robustness.drift import OUTSIDE, drift, unlike
from sparsebert.robustness.report import shifted_and_attacked, write_report
from sparsebert.training import train

MODEL, TASK = "minilm", "mr"
METHODS = ("magnitude", "adaptive", "knowledge")
TIMED = "knowledge"
ATTACK = "textfooler"
SHIFTED, DOMAIN_N = ("sst2",), 500  # other sets of sentiment, short ones, and how many texts of each
BATCHES = (1, 32)  # sentences a call: one request alone, and a server's batch


def run_demo(output: Path, config: DemoConfig, *, quiet: bool, overwrite: bool = False) -> dict:
    """Runs or resumes the demo in the folder `output` and returns the document the command prints last."""
    start = time.perf_counter()
    output = place(output)
    require_place(output)
    dense = output / "dense"
    with progress("1/6 fine-tune MiniLM-L6 on MR") as update:
        trained = train(
            MODEL, TASK, dense, TrainConfig(epochs=config.epochs, n=config.train_n, seed=config.seed),
            overwrite=overwrite, progress=update,
        )  # fmt: skip
    pruned = {}
    for method in METHODS:
        with progress(f"2/6 prune ({method})") as update:
            chosen = {"calibration_tokens": config.calibration_tokens} if config.calibration_tokens else {}
            settings = PruneConfig(method=method, seed=config.seed, **chosen)
            pruned[method] = prune_checkpoint(
                dense, TASK, output / method, settings, overwrite=overwrite, progress=update
            )
    evaluations = _evaluate(output, config, overwrite)
    evaluations = {name: _attacked(output, name, found, config) for name, found in evaluations.items()}
    timings = _time(output, config)

    report = output / "report.html"
    with progress("6/6 write the report") as update:
        write_report(
            report, evaluations, {name: result.density for name, result in pruned.items()}, timings, config.model_dump()
        )
        update(1, 1)
    if not quiet:
        _show(evaluations, pruned, timings, report)
    return {
        "task": TASK,
        "dense_accuracy": evaluations["dense"].accuracy,
        "dense_accuracy_ci": evaluations["dense"].accuracy_ci,
        "methods": {
            method: {
                "accuracy": evaluations[method].accuracy,
                "accuracy_ci": evaluations[method].accuracy_ci,
                "difference": evaluations[method].difference,
                "difference_ci": evaluations[method].difference_ci,
                "kl_to_dense": evaluations[method].kl_to_dense,
                "agreement": evaluations[method].agreement,
                "outside": evaluations[method].outside,
                "attacks": evaluations[method].attacks,
                "domains": evaluations[method].domains,
                "sparsity": pruned[method].sparsity,
            }
            for method in METHODS
        },
        "latency_ms": timings[0]["latency_ms"],
        "speedup": {str(timing["batch"]): timing["speedup"] for timing in timings},
        "speedup_ci": {str(timing["batch"]): timing["speedup_ci"] for timing in timings},
        "max_logit_error": max(timing["max_logit_error"] for timing in timings),
        "n": evaluations["dense"].n,
        "threads": timings[0]["threads"],
        "isa": timings[0]["machine"]["isa"],
        "resumed_from_step": trained.resumed_from,
        "report": str(report),
        "seconds": time.perf_counter() - start,
    }


def _evaluate(output: Path, config: DemoConfig, overwrite: bool) -> dict[str, Evaluation]:
    """Dense and pruned models on the test sentences, the pruned ones paired with dense, there and on texts unlike them.
    One ledger unit a model.
    """
    task = data.get_task(TASK)
    examples = data.load(task, task.test, limit=config.test_n, seed=config.seed)
    names = ("dense", *METHODS)
    weights = {name: checkpoint.weights_sha256(output / name) for name in names}
    book = Ledger(output / "units.sqlite", overwrite=overwrite)
    outside = unlike(examples)
    found = {}

    @functools.cache
    def logits_of(name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        model, tokenizer = checkpoint.load(output / name)
        with progress(f"3/6 evaluate ({name})") as update:
            inside = predict(model, tokenizer, examples, max_length=task.max_length, progress=update)
        return inside, {name: predict(model, tokenizer, texts, max_length=None) for name, texts in outside.items()}

    def figures_of(name: str) -> dict:
        (dense, dense_outside), (own, own_outside) = logits_of("dense"), logits_of(name)
        if name == "dense":
            return dataclasses.asdict(compare(task, examples, dense))
        problem = heads.PROBLEMS[task.problem]
        far = {texts: drift(problem, dense_outside[texts], logits) for texts, logits in own_outside.items()}
        return dataclasses.asdict(dataclasses.replace(compare(task, examples, own, dense), outside=far))

    for name in names:
        inputs = {
            "weights": weights[name],
            "dense": weights["dense"],
            "data": examples.sha256,
            "outside": [texts.sha256 for texts in outside.values()],
            "max_length": task.max_length,
        }
        code = code_of("sparsebert.robustness.run") + code_of("sparsebert.robustness.drift")
        found[name] = Evaluation(**book.once("evaluate", inputs, lambda name=name: figures_of(name), code))
    book.close()
    return found


def _attacked(output: Path, name: str, found: Evaluation, config: DemoConfig) -> Evaluation:
    """The evaluation with accuracy under attack on some test sentences, and on the other sets of sentiment that are on
    this machine, if there are any.
    """
    dense = None if name == "dense" else output / "dense"
    ledger = AttackConfig(ledger=str(output / "units.sqlite"))
    at_hand = [of for of in SHIFTED if data.at_hand(data.TASKS[of], data.TASKS[of].test)]
    with progress(f"4/6 attack ({name})") as update:
        under = evaluate(
            output / name, TASK, vs=dense, attacks=ATTACK, attack=ledger, n=config.attack_n, seed=config.seed,
            device="cpu", progress=update,
        )  # fmt: skip
    if not at_hand:
        return dataclasses.replace(found, attacks=under.attacks)
    with progress(f"4/6 other domains ({name})") as update:
        shifted = evaluate(
            output / name, TASK, vs=dense, domains=",".join(at_hand), n=DOMAIN_N, seed=config.seed, device="cpu",
            progress=update,
        )  # fmt: skip
    return dataclasses.replace(found, attacks=under.attacks, domains=shifted.domains)


def _time(output: Path, config: DemoConfig) -> list[dict]:
    """The model TIMED in the engine against dense torch, at each batch size. Never reused: a timing belongs to its
    moment.
    """
    timings = []
    for batch in BATCHES:
        chosen = {"rounds": config.rounds} if config.rounds else {}
        settings = BenchConfig(
            task=TASK, n=max(config.bench_n, 2 * batch), batch=batch, dtype="fp32", threads=config.threads,
            seed=config.seed, **chosen,
        )  # fmt: skip
        with progress(f"5/6 time (batch {batch})") as update:
            result = time_rivals(output / TIMED, texts_of(output / TIMED, settings), settings, progress=update)
        rows = {row["engine"]: row for row in result["rows"]}
        timings.append({
            "batch": batch, "threads": rows["torch"]["threads"], "machine": result["machine"],
            "latency_ms": {name: 1e3 / rows[name]["seq_per_s"] for name in ("torch", OURS)},
            "speedup": rows["torch"]["ratio"], "speedup_ci": rows["torch"]["ratio_ci"],
            "max_logit_error": rows[OURS]["error"],
        })  # fmt: skip
    return timings


def _show(
    evaluations: dict[str, Evaluation], pruned: dict[str, PruneResult], timings: list[dict], report: Path
) -> None:
    rows = []
    for name, result in evaluations.items():
        low, high = result.accuracy_ci
        row = [
            name,
            f"{pruned[name].sparsity:.1%}" if name in pruned else "0 %",
            f"{result.accuracy:.1%} [{low:.1%}, {high:.1%}]",
        ]
        if result.difference_ci is not None:
            low, high = result.difference_ci
            row += [
                f"{100 * result.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
                f"{result.kl_to_dense:.4f}",
                f"{result.agreement:.1%}",
            ]
            row += [f"{part['kl']:.4f}, {part['agreement']:.1%}" for part in result.outside.values()]
        rows.append(row + [""] * (6 + len(OUTSIDE) - len(row)))
    table(
        f"MiniLM-L6 on MR, {evaluations['dense'].n} test sentences, 95 % intervals",
        ["model", "zeros", "accuracy", "points from dense (paired)", "KL to dense", "same label", *OUTSIDE],
        rows,
    )
    rows = []
    for name, result in evaluations.items():
        for what, part in shifted_and_attacked(result):
            low, high = part["ci"]
            row = [what, name, f"{part['value']:.1%} [{low:.1%}, {high:.1%}]"]
            rows.append(
                [*row, f"{100 * part['difference']:+.1f}" if part["difference"] is not None else "", str(part["n"])]
            )
    columns = ["set", "model", "accuracy", "points from dense (paired)", "sentences"]
    table("under attack, and in other domains", columns, sorted(rows, key=lambda row: row[0]))
    rows = []
    for timing in timings:
        torch_ms, our_ms = timing["latency_ms"]["torch"], timing["latency_ms"][OURS]
        rows.append(
            [
                str(timing["batch"]),
                f"{torch_ms:.2f}",
                f"{our_ms:.2f}",
                ratio_text(timing["speedup"], timing["speedup_ci"]),
                f"{timing['max_logit_error']:.1e}",
            ]
        )
    machine = timings[0]["machine"]
    title = f"{TIMED} model, fp32, {timings[0]['threads']} threads, {machine['isa']} on {machine['cpu']}"
    table(title, ["batch", "dense torch ms/sentence", "sparsebert ms/sentence", "speed-up", "max logit error"], rows)
    print(f"report: {report}")

"""The commands, each a thin layer over a public function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsebert.cli.options import flags, option
from sparsebert.cli.output import emit, progress, say_what_was_read, table, then
from sparsebert.config import MAX_LENGTH, BenchConfig, DemoConfig, EvalConfig, PruneConfig, TrainConfig
from sparsebert.errors import InputError, cut
from sparsebert.pruning.trained import TRAINED, SubnetConfig

app = typer.Typer(
    name="sparsebert",
    help="Sparse BERT-family classifiers that stay accurate and robust, and really run faster.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        from sparsebert import __version__

        print(f"sparsebert {__version__}")
        raise typer.Exit


@app.callback()
def command(
    version: Annotated[
        bool, option("--version", callback=_say_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    pass


Directory = Annotated[Path, typer.Argument(metavar="DIR", help="model directory")]
Output = Annotated[Path, option("--output", "-o", help="model directory to write")]
TaskName = Annotated[
    str,
    option(help="task name, or a file of your own (.csv, .tsv, .jsonl, .parquet), or a folder of train and test"),
]
Overwrite = Annotated[
    bool,
    option("--overwrite", help="replace what other settings or code left at the output, finished or not"),
]
Json = Annotated[bool, option("--json", help="print the JSON document alone")]


@app.command()
@flags(DemoConfig)
def demo(
    *,
    output: Annotated[Path, option("--output", "-o", help="folder for models and report")] = Path("sparsebert-demo"),
    overwrite: Overwrite = False,
    json: Json = False,
    config: DemoConfig,
) -> None:
    """Fine-tune, prune, check and time a real encoder, and write report.html."""
    from sparsebert.cli.demo import run_demo

    emit(run_demo(output, config, quiet=json, overwrite=overwrite))


@app.command()
@flags(TrainConfig, basic=("epochs", "lr", "batch_size", "n", "max_length", "seed"))
def train(
    model: Annotated[str, typer.Argument(help="model directory, or `minilm` for the packaged encoder")],
    *,
    task: TaskName,
    output: Output,
    recipe: Annotated[
        str | None,
        option(
            metavar="FILE",
            help="fine-tune every model of a recipe into OUTPUT/<name>; packaged: quick-soup, emnlp2023-soup",
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    config: TrainConfig,
) -> None:
    """Fine-tune MODEL on a task."""
    from sparsebert.training import train as run
    from sparsebert.training import train_recipe

    if recipe is not None:
        if config != TrainConfig():
            raise InputError("--recipe has every setting in its file, got others beside it", fix="leave them out")
        with progress("fine-tune") as update:
            results = train_recipe(model, task, output, recipe, overwrite=overwrite, progress=update)
        if not json:
            rows = [[name, str(r.steps), f"{r.loss:.4f}", f"{r.seconds:.0f}"] for name, r in results.items()]
            table(f"{model} fine-tuned on {task} by {recipe}", ["model", "steps", "training loss", "seconds"], rows)
        emit({"task": task, "models": {name: result.as_json() for name, result in results.items()}})
        return
    with progress("fine-tune") as update:
        result = run(model, task, output, config, overwrite=overwrite, progress=update)
    say_what_was_read(result)
    if not json:
        rows = [
            ["steps", str(result.steps)],
            ["training loss", f"{result.loss:.4f}"],
            ["seconds", f"{result.seconds:.1f}"],
            ["saved in", str(output)],
        ]
        table(f"{model} fine-tuned on {task}", ["", ""], rows)
        then("sparsebert", "prune", output, "--task", task, "-o", f"{output}-sparse")
    emit({"task": task, "seed": config.seed, **result.as_json()})


@app.command(help=f"Prune the classifier in DIR: without labels, or by training with them ({', '.join(TRAINED)}).")
@flags(PruneConfig, basic=("method", "tier", "sparsity", "pattern", "calibration"), subnet=SubnetConfig)
def prune(
    directory: Directory,
    *,
    task: TaskName,
    output: Output,
    dry_run: Annotated[bool, option("--dry-run", help="print the plan, its memory and time, and stop")] = False,
    overwrite: Overwrite = False,
    verbose: Annotated[bool, option("--verbose", help="also show the density of every linear")] = False,
    json: Json = False,
    config: PruneConfig,
    subnet: SubnetConfig,
) -> None:
    from sparsebert.pruning import prune_checkpoint

    if dry_run:
        from sparsebert.pruning.plan import plan

        planned = plan(directory, task, output, config, subnet, overwrite=overwrite)
        if not json:
            rows = [["prunable weights", f"{planned.weights:,} in {planned.linears} linears"]]
            rows += [["zeros", f"{planned.zeros:,} ({planned.zeros / planned.weights:.2%})"]]
            if planned.optimizer_steps:
                rows += [["optimizer steps", f"{planned.optimizer_steps:,}"], ["tokens, about", f"{planned.tokens:,}"]]
            else:
                rows += [[f"calibration tokens: {part}", f"{count:,}"] for part, count in planned.calibration.items()]
                rows += [["steps", ", ".join(planned.steps) or "one"]]
            rows += [[f"memory: {name}", f"{value:,.0f} MiB"] for name, value in planned.memory_mb.items()]
            rows += [[f"time, about: {name}", f"{value:,.0f} s"] for name, value in planned.seconds.items()]
            table(f"{config.method}, {config.pattern}: the plan for {directory}", ["", ""], rows)
        emit(planned.as_json())
        return
    with progress(f"prune ({config.method})") as update:
        result = prune_checkpoint(directory, task, output, config, subnet, overwrite=overwrite, progress=update)
    say_what_was_read(result)
    kept = _kept(output, directory, task, config.max_length)
    if not json:
        rows = [[name, f"{density:.4f}"] for name, density in result.density.items()] if verbose else []
        rows += [["zeros in the encoder's linears", f"{result.sparsity:.2%}"]]
        if kept is not None:
            of = f"of {kept['n']:,} test texts"
            interval = kept["agreement_ci"]
            told = "" if interval is None else f" [{interval[0]:.1%}, {interval[1]:.1%}]"
            what = "rank correlation with dense" if interval is None else "same label as dense"
            rows += [[f"{what}, {of}", f"{kept['agreement']:.1%}{told}"]]
            rows += [["KL to the dense model, nats", f"{kept['kl']:.4f}"]]
        rows += [["saved in", str(output)]]
        table(f"{config.method}, {config.pattern}: pruned in {result.seconds:.0f} s", ["", ""], rows)
        then("sparsebert", "eval", output, "--task", task, "--vs", directory)
    emit({**result.as_json(), "kept": kept})


def _kept(pruned: Path, dense: Path, task: str, max_length: int | None) -> dict | None:
    """How near a pruned model is to the dense one; None, and why on stderr, where that cannot be said."""
    from sparsebert import checkpoint
    from sparsebert.errors import DataError
    from sparsebert.robustness import kept

    if not checkpoint.has_head(checkpoint.resolve(dense)):
        return None
    try:
        with progress("compare with dense") as update:
            return kept(pruned, dense, task, max_length=max_length, progress=update)
    except (DataError, InputError) as error:
        print(f"not compared with dense: {error}", file=sys.stderr)
        return None


@app.command()
def soup(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR…", help="models fine-tuned with --hold-out")],
    *,
    task: TaskName,
    output: Output,
    max_length: Annotated[int | None, option(min=3, help=MAX_LENGTH)] = None,
    score: Annotated[
        str, option(help="what decides, on held-out examples: accuracy, or perturbed (loss when embeddings move)")
    ] = "perturbed",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Average fine-tuned models greedily: each is added where the average does not get worse."""
    from sparsebert.training import soup as run

    with progress("soup") as update:
        result = run(
            directories, task, output, score=score, max_length=max_length, overwrite=overwrite, progress=update
        )
    if not json:
        rows = [
            [name, f"{value:.4f}", "yes" if name in result.members else "no"] for name, value in result.scores.items()
        ]
        table(f"soup on {task}: {score} {result.score:.4f}", ["model", score, "in the soup"], rows)
    emit({"task": task, "score_name": score, **result.as_json()})


@app.command("eval")
@flags(EvalConfig)
def evaluate(
    directory: Directory,
    *,
    task: TaskName,
    vs: Annotated[Path | None, option(metavar="DENSE", help="dense model directory to compare with, paired")] = None,
    json: Json = False,
    config: EvalConfig,
) -> None:
    """Accuracy of the classifier in DIR with its interval, its distance from a dense model, and how it does out of
    distribution.
    """
    from dataclasses import asdict

    from sparsebert.robustness import evaluate as run

    with progress("evaluate") as update:
        result = run(
            directory, task, vs=vs, ood=config.ood, n=config.n, seed=config.seed, max_length=config.max_length,
            progress=update,
        )  # fmt: skip
    say_what_was_read(result)
    figures = asdict(result)
    if not json:
        tests = {task: {name: value for name, value in figures.items() if name != "ood"}} | (result.ood or {})
        for name, found in tests.items():
            table(f"{directory} on {name}", ["figure", "value", "95 % interval"], _with_intervals(found))
        then("sparsebert", "bench", directory, "--task", task)
    emit(figures)


@app.command()
def predict(
    directory: Directory,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT…", help="texts to classify, or - for the lines of stdin")],
    *,
    json: Json = False,
) -> None:
    """Classify texts: a line per text, with its label and that label's probability. Texts that are too long are cut.
    JSON is printed only if asked for.
    """
    from sparsebert.engine import Engine
    from sparsebert.heads import answers

    if texts == ["-"]:
        texts = [line.rstrip("\r\n") for line in sys.stdin]
    engine = Engine.load(directory)
    found = answers(engine.problem, engine.labels, engine.logits(texts, truncate=True))
    if json:
        rows = [{"text": text, **answer._asdict()} for text, answer in zip(texts, found, strict=True)]
        emit({"problem": engine.problem.name, "texts": rows})
        return
    for text, answer in zip(texts, found, strict=True):
        said = ", ".join(f"{label} {score:.3f}" for label, score in answer.predicted.items())
        print(f"{said or 'no label'}\t{cut(text, 200)}")


@app.command()
def seal(directory: Directory, *, json: Json = False) -> None:
    """Make a stock model directory verifiable: write its manifest, with the hash of every tensor and golden logits."""
    from sparsebert.checkpoint import seal as run

    sealed = run(directory)
    if not json:
        table(f"{directory} is sealed", ["", ""], [[name, str(value)] for name, value in sealed.items()])
    emit(sealed)


@app.command()
def reseal(
    directory: Directory,
    *,
    labels: Annotated[
        str | None, option(metavar="A,B,…", help="also write these label names, in the order of the outputs")
    ] = None,
    json: Json = False,
) -> None:
    """Accept corrected label names in config.json of a sealed directory; weights and tokenizer must be unchanged."""
    from sparsebert.checkpoint import reseal as run

    names = None if labels is None else [name.strip() for name in labels.split(",")]
    sealed = run(directory, labels=names)
    if not json:
        table(f"{directory} is sealed", ["output", "label"], [[str(i), n] for i, n in enumerate(sealed["labels"])])
    emit(sealed)


@app.command()
@flags(BenchConfig)
def bench(
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="model directory")] = None,
    *,
    explain: Annotated[bool, option("--explain", help="also show what each linear runs as, and why")] = False,
    json: Json = False,
    config: BenchConfig,
) -> None:
    """Time the engine against its rivals on the classifier in DIR, interleaved, with the output checked."""
    import tempfile

    from sparsebert import environment

    environment.cap_rivals()  # before anything imports torch
    from sparsebert.cli.timing import random_model, texts_of
    from sparsebert.engine.measure import ratio_text
    from sparsebert.engine.rivals import named, time_rivals

    if (directory is None) == (config.random is None):
        raise InputError("bench needs DIR or --random, and not both", fix="name a model directory, or --random minilm")
    named(config.rivals)  # before anything long
    with tempfile.TemporaryDirectory() as folder, progress("bench") as update:
        if directory is None:
            directory = random_model(config, Path(folder))
        result = time_rivals(directory, texts_of(directory, config), config, explain=explain, progress=update)
    if not json:
        rows = [
            [
                f"{row['engine']} {row['dtype']}",
                f"{row['p50_ms']:.3f}",
                f"{row['p99_ms']:.3f}",
                f"{row['seq_per_s']:.0f}",
                ratio_text(row["ratio"], row["ratio_ci"]),
                f"{row['error']:.1e}" + ("" if row["match"] else " differs"),
            ]
            for row in result["rows"]
        ]
        head = f"batch {config.batch} x {config.seq}, {result['rows'][0]['threads']} threads"
        title = f"{head}, {result['machine']['isa']} on {result['machine']['cpu']}"
        table(title, ["engine", "p50 ms/batch", "p99 ms/batch", "texts/s", "time over ours", "logit error"], rows)
        if explain:
            rows = [
                [
                    str(row["layer"]),
                    row["linear"],
                    "x".join(map(str, row["shape"])),
                    f"{row['density']:.1%}",
                    row["form"] + (f", short: {row['short']}" if row["short"] else ""),
                    row["kernel"],
                    f"{row['gflops']:.0f}",
                    f"{row['share_of_peak']:.0%}",
                    row["why"],
                ]
                for row in result["layers"]
            ]
            table("linears", ["layer", "linear", "shape", "kept", "form", "kernel", "Gflop/s", "of peak", "why"], rows)
        if config.random is None:
            then("sparsebert", "predict", directory, "a text of yours")
    emit(result)


@app.command()
def study(
    which: Annotated[Literal["srnets"], typer.Argument(help="srnets: sparse and robust subnetworks, Liu et al. 2022")],
    *,
    grid: Annotated[str, option(help="YAML file of cells, or a packaged one: srnets-small, srnets-paper")],
    output: Annotated[Path, option("--output", "-o", help="folder for ledger, models and report")],
    hours: Annotated[
        float | None, option(min=0, help="begin no cell that would probably end later [default: no limit]")
    ] = None,
    shard: Annotated[
        str,
        option(metavar="I/N", help="run part I of 0 to N - 1; cells that share a task and seed stay together"),
    ] = "0/1",
    take: Annotated[
        list[Path] | None, option(metavar="CELLS", help="cells.jsonl of other runs, whose cells are taken over")
    ] = None,
    markdown: Annotated[Path | None, option(metavar="FILE", help="also write the tables to this file")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Run a grid of training, pruning and evaluation; killed, the same command goes on."""
    from sparsebert.study import publish, read_grid, read_shard, run_grid

    cells, part = read_grid(grid), read_shard(shard)
    with progress(f"study {which}") as update:
        outcome = run_grid(
            cells, output, hours=hours, shard=part, others=take or [], overwrite=overwrite, progress=update
        )
    document = publish(cells, outcome, output, markdown)
    if not json:
        rows = [[name, str(value)] for name, value in document.items() if not isinstance(value, list)]
        table(f"{grid}: {len(outcome.done)} cells done, {len(outcome.left_out)} left out", ["", ""], rows)
    emit(document)


@app.command()
def doctor(
    *,
    tune: Annotated[
        bool, option("--tune", help="time the engine's forms here, some seconds, and choose by that from now on")
    ] = False,
    json: Json = False,
) -> None:
    """What this machine can run, and why a backend is off."""
    from dataclasses import asdict

    from sparsebert.engine.costs import costs, measure
    from sparsebert.machine import describe

    if tune:
        with progress("tune") as update:
            measure(update)
    facts = describe()
    if facts["isa"] is not None:
        facts["ns_per_entry"] = asdict(costs(facts["isa"]))
    if not json:
        rows = [
            [name, "; ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)]
            for name, value in facts.items()
        ]
        table("sparsebert doctor", ["", ""], rows)
    emit(facts)


@app.command()
def cache(
    *,
    prune: Annotated[bool, option("--prune", help="remove all of them; running engines go on")] = False,
    json: Json = False,
) -> None:
    """List the packed models that are kept to load fast, or remove them: they are made anew when needed."""
    import time

    from sparsebert import environment
    from sparsebert.engine import cache

    entries = cache.prune() if prune else cache.entries()
    limit, folder = environment.cache_mb(), environment.cache_dir()
    megabytes = sum(row["bytes"] for row in entries) / 1e6
    if not json:
        rows = [
            [row["model"], row["dtype"], f"{row['bytes'] / 1e6:.1f}", f"{(time.time() - row['used']) / 86400:.1f}"]
            for row in entries
        ]
        title = f"{'removed from' if prune else 'packed models in'} {folder}: {megabytes:.1f} of {limit:,} MB"
        table(title, ["made of", "dtype", "MB", "days since used"], rows)
    packed = str(folder / "packed") if folder else None
    emit({"folder": packed, "limit_mb": limit, "mb": megabytes, "removed": prune, "entries": entries})


def _with_intervals(figures: dict, prefix: str = "") -> list[list[str]]:
    """A row a figure that is not None; an interval, which follows its figure, in that one's row."""
    rows: list[list[str]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            rows += _with_intervals(value, f"{prefix}{name.removeprefix('by_')} ")
        elif value is not None and name.endswith("_ci"):
            rows[-1][-1] = _figure(value)
        elif value is not None:
            rows.append([prefix + name, _figure(value), ""])
    return rows


def _figure(value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_figure(part) for part in value) + "]"
    return str(value)

"""The commands, each a thin layer over a public function."""

from __future__ import annotations

import json as jsons
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsebert.cli.figures import (
    rows_of_attack,
    rows_of_kept,
    rows_of_machine,
    rows_of_plan,
    table_of_load,
    table_of_study,
    tables_of_evaluation,
    tables_of_replay,
    tables_of_timing,
)
from sparsebert.cli.options import Commands, flags, option
from sparsebert.cli.output import emit, of_task, print_change, progress, say_what_was_read, stop_for_errors, table, then
from sparsebert.config import (
    ATTACKS,
    MAX_LENGTH,
    AttackConfig,
    BenchConfig,
    BudgetConfig,
    DemoConfig,
    EvalConfig,
    LoadtestConfig,
    PruneConfig,
    QuantizeConfig,
    ServeConfig,
    TaskConfig,
    TrainConfig,
)
from sparsebert.errors import InputError, cut
from sparsebert.pruning.trained import TRAINED, SubnetConfig

BENCH = "sparsebert bench DIR --json"
DRAWN = (".png", ".svg", ".pdf")
SHOWN = 5  # adversarial texts that `attack` prints

app = Commands(
    name="sparsebert",
    help="Makes BERT-family classifiers sparse, checks what they kept, and runs them fast on a CPU.",
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
Overwrite = Annotated[
    bool,
    option("--overwrite", help="replace an output that is there already and was made with other settings or code"),
]
Json = Annotated[
    bool, option("--json", help="print one line of JSON alone (where output is no terminal it follows the tables)")
]
Timing = Annotated[
    list[Path] | None,
    option(metavar="FILE.json", help="what `sparsebert bench --json` printed, for the latency; may be repeated"),
]
LedgerFile = Annotated[
    str | None, option(metavar="FILE", help="the ledger that the attacks were kept in [default: the one in the cache]")
]


def _attack_flag(name: str, *names: str):
    """A flag of AttackConfig, for a command that takes a few of them."""
    return Annotated[str | None, option(*names, help=AttackConfig.model_fields[name].description)]


@app.command()
@flags(config=DemoConfig)
def demo(
    *,
    output: Annotated[Path, option("--output", "-o", help="folder for models and report")] = Path("sparsebert-demo"),
    overwrite: Overwrite = False,
    json: Json = False,
    config: DemoConfig,
) -> None:
    """Fine-tune, prune, check and time a real encoder, and write report.html."""
    from sparsebert.cli.demo import run_demo

    emit(run_demo(output, config, quiet=json, overwrite=overwrite), json)


@app.command()
@flags(basic=("epochs", "lr", "batch_size", "n", "max_length", "seed"), task=TaskConfig, config=TrainConfig)
def train(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="model directory, or `minilm` for the packaged encoder")
    ],
    *,
    task: TaskConfig,
    output: Output,
    recipe: Annotated[
        str | None,
        option(
            metavar="FILE",
            help="fine-tune each model of a recipe into OUTPUT/NAME: a YAML file, or quick-soup or emnlp2023-soup",
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
            raise InputError("--recipe takes every setting from its file, got others beside it", fix="leave them out")
        with progress("fine-tune") as update:
            results = train_recipe(model, task, output, recipe, overwrite=overwrite, progress=update)
        if not json:
            rows = [[name, str(r.steps), f"{r.loss:.4f}", f"{r.seconds:.0f}"] for name, r in results.items()]
            table(
                f"{model} fine-tuned on {task.task} by {recipe}", ["model", "steps", "training loss", "seconds"], rows
            )
        emit({"task": task.task, "models": {name: result.as_json() for name, result in results.items()}}, json)
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
        how = "was fine-tuned before" if result.resumed_from == result.steps else "fine-tuned"
        table(f"{model} {how} on {task.task}", ["", ""], rows)
        then("sparsebert", "prune", output, *of_task(task), "-o", Path(f"{output}-sparse"))
    emit({"task": task.task, "seed": config.seed, **result.as_json()}, json)


@app.command(help=f"Prune the classifier in DIR: without labels, or by training with them ({', '.join(TRAINED)}).")
@flags(
    basic=("method", "tier", "sparsity", "pattern", "calibration"),
    task=TaskConfig,
    config=PruneConfig,
    budget=BudgetConfig,
    subnet=SubnetConfig,
)
def prune(
    directory: Directory,
    *,
    task: TaskConfig,
    output: Output,
    dry_run: Annotated[
        bool, option("--dry-run", help="print what would be done, with memory and time, and stop")
    ] = False,
    overwrite: Overwrite = False,
    verbose: Annotated[bool, option("--verbose", help="also print the density of every linear")] = False,
    json: Json = False,
    config: PruneConfig,
    budget: BudgetConfig,
    subnet: SubnetConfig,
) -> None:
    from sparsebert.pruning import check, prune_checkpoint

    if budget.min_speedup is not None or budget.max_robust_drop is not None:
        if dry_run or config.method in TRAINED:
            raise InputError("a budget is for methods without labels, without --dry-run", fix="leave one of them out")
        check(config, subnet)  # no flag of a method that trains is taken and ignored
        _prune_within(budget, directory, task, output, config, overwrite=overwrite, json=json)
        return

    if budget != BudgetConfig():
        raise InputError(
            "--budget-attack and --budget-n belong to a budget, none was given",
            fix="give --min-speedup and --max-robust-drop, or leave them out",
        )
    if dry_run:
        from sparsebert.pruning.plan import plan
        from sparsebert.robustness import misfit

        planned = plan(directory, task, output, config, subnet, overwrite=overwrite)
        if not json:
            table(
                f"{config.method}, {config.pattern}: the plan for {directory}", ["", ""], rows_of_plan(planned, verbose)
            )
            if config.method not in TRAINED and (refused := misfit(directory, task)) is not None:
                print(f"prune needs no labels, but eval would say: {refused}", file=sys.stderr)
        emit(planned.as_json(), json)
        return
    with progress(f"prune ({config.method})") as update:
        result = prune_checkpoint(directory, task, output, config, subnet, overwrite=overwrite, progress=update)
    say_what_was_read(result)
    # A model in int8 runs on the CPU.
    kept = _kept(output, directory, task, config.max_length, "cpu" if config.int8 else config.device)
    if not json:
        rows = [[name, f"{density:.4f}"] for name, density in result.density.items()] if verbose else []
        rows += [["zeros in the encoder's linears", f"{result.sparsity:.2%}"]]
        rows += rows_of_kept(kept, "the dense model")
        rows += [["saved in (same size on disk: zeros are stored)", str(output)]]
        how = "was pruned before, in" if result.reused else "pruned in"
        what = f"{config.method}, {config.pattern}" + (", int8" if config.int8 else "")
        table(f"{what}: {how} {result.seconds:.0f} s", ["", ""], rows)
        _then_eval_or_bench(output, directory, task, kept)
    emit({**result.as_json(), "output": str(output), "kept": kept}, json)


def _prune_within(
    budget: BudgetConfig,
    directory: Path,
    task: TaskConfig,
    output: Path,
    config: PruneConfig,
    *,
    overwrite: bool,
    json: bool,
) -> None:
    from sparsebert.pruning.budget import search

    with progress("prune within a budget") as update:
        choice = search(directory, task, output, config, budget, overwrite=overwrite, progress=update)
    kept = _kept(output, directory, task, config.max_length, "cpu")
    if not json:
        rows = [["chosen", str(choice.chosen)], ["why", choice.why]]
        rows += [["also fast enough", str(other)] for other in choice.candidates if other != choice.chosen]
        rows += [["too slow", str(other)] for other in choice.too_slow]
        rows += [*rows_of_kept(kept, "the dense model"), ["saved in", str(output)]]
        table("within the budget" if choice.met else "out of the budget: the nearest", ["", ""], rows)
        _then_eval_or_bench(output, directory, task, kept)
    emit({**choice.as_json(), "output": str(output), "kept": kept}, json)


@app.command()
@flags(task=TaskConfig, config=QuantizeConfig)
def quantize(
    directory: Directory,
    *,
    task: TaskConfig,
    output: Output,
    overwrite: Overwrite = False,
    json: Json = False,
    config: QuantizeConfig,
) -> None:
    """Round the classifier in DIR, pruned or dense, to int8, calibrated on texts of the task. Zeros stay zeros."""
    from sparsebert.pruning import quantize_checkpoint

    with progress("quantize") as update:
        result = quantize_checkpoint(directory, task, output, config, overwrite=overwrite, progress=update)
    say_what_was_read(result)
    kept = _kept(output, directory, task, config.max_length, "cpu")
    if not json:
        rows = [["zeros in the encoder's linears", f"{result.sparsity:.2%}"], *rows_of_kept(kept, f"{directory}")]
        rows += [["saved in (same size on disk: as float32)", str(output)]]
        how = "was rounded before, in" if result.reused else "rounded in"
        table(f"{directory} in int8: {how} {result.seconds:.0f} s", ["", ""], rows)
        _then_eval_or_bench(output, _dense_of(directory), task, kept)
    emit({**result.as_json(), "output": str(output), "kept": kept}, json)


def _dense_of(directory: Path) -> Path:
    """The model that `directory` was pruned from, if it was pruned here and that is still there; else itself."""
    from sparsebert import checkpoint
    from sparsebert.errors import CheckpointError

    try:
        made = checkpoint.ancestors(directory)
        dense = next((path for path, recipe in made if recipe.get("command") != "prune"), directory)
    except CheckpointError:
        return directory
    return dense.relative_to(Path.cwd()) if dense.is_relative_to(Path.cwd()) else dense


def _then_eval_or_bench(made: Path, source: Path, task: TaskConfig, kept: dict | None) -> None:
    """Names the next command: `eval`, if the task has the labels for it; else why it would be refused, and `bench`."""
    from sparsebert.robustness import misfit

    refused = misfit(made, task)
    if kept is not None and refused is None:
        then("sparsebert", "eval", made, *of_task(task), "--vs", source)
        return
    if refused is not None:
        print(f"this needed no labels, but eval would say: {refused}", file=sys.stderr)
    then("sparsebert", "bench", made, *of_task(task))


def _kept(pruned: Path, dense: Path, task: TaskConfig, max_length: int | None, device: str) -> dict | None:
    """How near a pruned model is to the dense one. None if that cannot be measured; stderr says why."""
    from sparsebert import checkpoint
    from sparsebert.errors import DataError
    from sparsebert.robustness import kept

    if not checkpoint.has_head(checkpoint.resolve(dense)):
        return None
    try:
        with progress("compare with dense") as update:
            return kept(pruned, dense, task, max_length=max_length, device=device, progress=update)
    except (DataError, InputError) as error:
        print(f"not compared with the dense model: {error}", file=sys.stderr)
        return None


@app.command()
@flags(task=TaskConfig)
def soup(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="model directories, fine-tuned with --hold-out")
    ],
    *,
    task: TaskConfig,
    output: Output,
    max_length: Annotated[int | None, option(min=3, help=MAX_LENGTH)] = None,
    score: Annotated[
        str,
        option(
            help="what is compared, on held-out examples: accuracy, perturbed (the loss under perturbed embeddings) or "
            "attacked (accuracy under TextFooler, on 300)"
        ),
    ] = "perturbed",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Average fine-tuned models greedily: a model is added if the average does not get worse."""
    from sparsebert.training import soup as run

    with progress("soup") as update:
        result = run(
            directories, task, output, score=score, max_length=max_length, overwrite=overwrite, progress=update
        )
    if not json:
        rows = [
            [name, f"{value:.4f}", "yes" if name in result.members else "no"] for name, value in result.scores.items()
        ]
        table(f"soup on {task.task}: {score} {result.score:.4f}", ["model", score, "in the soup"], rows)
    emit({"task": task.task, "score_name": score, **result.as_json()}, json)


@app.command("eval")
@flags(
    basic=tuple(EvalConfig.model_fields.keys() - {"match_confidence"}),
    task=TaskConfig, config=EvalConfig, attack=AttackConfig,
)  # fmt: skip
def evaluate(
    directory: Directory,
    *,
    task: TaskConfig,
    vs: Annotated[
        Path | None, option(metavar="DENSE", help="directory of the dense model, to compare with on the same texts")
    ] = None,
    report: Annotated[
        Path | None, option(metavar="FILE.html", help="also write a page with card, charts, worst flips and settings")
    ] = None,
    timing: Timing = None,
    save: Annotated[
        bool,
        option("--save", help="also write the figures into DIR: sparsebert/eval.json, rows of attacks, README.md"),
    ] = False,
    json: Json = False,
    config: EvalConfig,
    attack: AttackConfig,
) -> None:
    """Measure the classifier in DIR: its accuracy with an interval, how near it is to a dense model (--vs), and the
    same out of distribution (--ood), in other domains (--domains, --texts) and under attack (--attacks).
    """
    from sparsebert.robustness import card, saving, trade_off
    from sparsebert.robustness import evaluate as run

    if timing and report is None and not save:
        raise InputError("--timing is for --report and --save, neither is given", fix="add one of them")
    timings = card.read_documents(timing or [], BENCH)
    if report is not None:
        trade_off.require_page(report)
    if save:
        saving.require_savable(directory)
    with progress("evaluate") as update:
        result = run(
            directory, task, vs=vs, ood=config.ood, domains=config.domains, texts=config.texts,
            attacks=config.attacks, attack=attack, match_confidence=config.match_confidence, n=config.n,
            seed=config.seed, max_length=config.max_length, device=config.device, progress=update,
        )  # fmt: skip
    say_what_was_read(result)
    figures = result.as_json()
    if not json:
        for each in tables_of_evaluation(figures, task.task, directory, vs):
            table(*each)
        then("sparsebert", "bench", directory, *of_task(task))
    if report is not None:
        trade_off.write_trade_off(report, [figures], timings)
        print(f"report: {report}", file=sys.stderr)
    if save:
        for path in saving.save(directory, result, timings):
            print(f"saved: {path}", file=sys.stderr)
    emit(figures, json)
    for found in (result.attacks or {}).values():
        stop_for_errors(found["errors"], found["n"] + found["errors"])


@app.command()
@flags(basic=("n", "seed", "workers", "ledger", "max_length"), task=TaskConfig, config=AttackConfig)
def attack(
    directory: Directory,
    *,
    task: TaskConfig,
    attack: Annotated[str, option("--attack", help=f"one of {', '.join(ATTACKS)}")],
    output: Annotated[
        Path | None, option("--output", "-o", metavar="FILE", help="also write a row per example to this parquet file")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    config: AttackConfig,
) -> None:
    """Attack the classifier in DIR: change words of its texts and keep what they mean, and count what it then gets
    wrong. After an interruption the same command goes on.
    """
    from sparsebert.robustness import attack as run
    from sparsebert.robustness.attacks.entry import require_output, write_rows

    if output is not None:
        require_output(output, overwrite=overwrite)
    with progress(f"attack ({attack})") as update:
        found = run(directory, task, attack, config, progress=update)
    if output is not None:
        write_rows(output, found, overwrite=overwrite)
    if not json:
        table(
            f"{directory} under attack, {task.task}",
            ["figure", "value", "95 % interval"],
            rows_of_attack(found.figures),
        )
        for row in [row for row in found.rows if row["outcome"] == "succeeded"][:SHOWN]:
            print_change(row)
    emit(
        {"task": task.task, "attack": attack, **found.figures, "output": None if output is None else str(output)}, json
    )
    stop_for_errors(found.figures["errors"], len(found.rows))


@app.command()
def report(
    evaluations: Annotated[
        list[Path],
        typer.Argument(
            metavar="EVAL.json",
            help="what `sparsebert eval --json` printed, or the directory of a model after `eval --save`, of several "
            "models",
        ),
    ],
    *,
    output: Annotated[Path, option("--output", "-o", metavar="FILE.html", help="page to write")],
    timing: Timing = None,
    json: Json = False,
) -> None:
    """Put evaluations of several models on one page: a card, a chart of accuracy against cost, the worst flips."""
    from sparsebert.robustness import card, saving, trade_off

    trade_off.require_page(output)
    files = [path / saving.FIGURES if path.is_dir() else path for path in evaluations]
    documents = card.read_documents(files, "sparsebert eval DIR --task TASK --json")
    made = trade_off.write_trade_off(output, documents, card.read_documents(timing or [], BENCH))
    columns, rows = card.table_of(made)
    if not json:
        table(f"{made.n:,} examples of {made.task}, {made.split}", columns, rows)
        if said := card.verdict(made):
            print(said)
    cheapest = None if made.cheapest is None else made.cheapest.facts["directory"]
    emit({"report": str(output), "models": columns[1:], "rows": rows, "cheapest": cheapest}, json)


@app.command()
def query(
    sql: Annotated[str, typer.Argument(metavar="SQL", help="one SELECT of DuckDB, from the table attacks")],
    *,
    ledger: LedgerFile = None,
    json: Json = False,
) -> None:
    """Ask the ledger of attacks, in SQL. Its table `attacks` has a row per attacked example; "describe attacks" lists
    the columns. Nothing is changed.
    """
    from sparsebert.robustness.attacks.stored import query as run

    columns, rows = run(sql, ledger)
    if not json:
        shown = [["" if value is None else str(value) for value in row] for row in rows]
        table("1 row" if len(rows) == 1 else f"{len(rows):,} rows", columns, shown)
    emit({"columns": columns, "rows": rows}, json)


@app.command()
def replay(
    example: Annotated[
        str, typer.Argument(metavar="ID", help="id of an attacked example: the first digits of its key, as in `query`")
    ],
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="directory of the model that was attacked, to attack it again")
    ] = None,
    *,
    ledger: LedgerFile = None,
    neighbours: _attack_flag("neighbours") = None,
    sentence_encoder: _attack_flag("sentence_encoder") = "minilm",
    masked_lm: _attack_flag("masked_lm") = None,
    texts: _attack_flag("stored", "--stored") = None,
    json: Json = False,
) -> None:
    """Show an attacked example. With DIR, attack it again, step by step, and say whether the result is the same."""
    from sparsebert.robustness.attacks import stored

    unit = stored.find(example, ledger)
    document = {"id": unit["key"][: stored.ID], **{name: unit[name] for name in ("inputs", "result", "finished")}}
    if directory is not None:
        document |= stored.replay(
            unit, directory, neighbours=neighbours, sentence_encoder=sentence_encoder, masked_lm=masked_lm, texts=texts
        )
    if not json:
        row = unit["result"] | {"original": unit["inputs"]["text"], "label": f"label {unit['inputs']['label']}"}
        if row["perturbed"] is not None:
            print_change(row | {"label": document.get("label", row["label"])})
        for each in tables_of_replay(document):
            table(*each)
    emit(document, json)


def _require_file(file: Path | None, text_column: list[str] | None) -> None:
    if text_column and file is None:
        raise InputError("--text-column is of a --file, none is given", fix="leave it out, or give --file")


def _rows_of(file: Path, text_column: list[str] | None) -> tuple[list[tuple[str, ...]], int]:
    """(the texts, one or two per row; how many lines were blank) of a file."""
    from sparsebert import data

    columns, blank = data.read_texts(file, tuple(text_column or ()), must=True)
    return list(zip(*columns, strict=True)), blank


@app.command()
def predict(
    directory: Directory,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="texts to classify, or - for the lines of standard input"),
    ] = None,
    *,
    file: Annotated[
        Path | None,
        option(metavar="FILE", help="classify the texts or pairs of a file (.txt, .csv, .tsv, .jsonl, .parquet)"),
    ] = None,
    text_column: Annotated[
        list[str] | None, option("--text-column", help=TaskConfig.model_fields["text_column"].description)
    ] = None,
    json: Json = False,
) -> None:
    """Classify texts: prints a line per text with its label and that label's probability. Texts that are too long are
    cut.
    """
    from sparsebert import data
    from sparsebert.engine import Engine
    from sparsebert.heads import answers

    _require_file(file, text_column)
    if bool(texts) == (file is not None):
        raise InputError(f"predict needs either texts or --file, got {'both' if texts else 'neither'}", fix="give one")
    if file is not None:
        rows, blank = _rows_of(file, text_column)
        left = f", {blank:,} blank left out" if blank else ""
        print(f"{len(rows):,} {'pairs' if len(rows[0]) == 2 else 'texts'} read{left}", file=sys.stderr)
    elif "-" in texts:
        if len(texts) > 1:
            raise InputError("- is standard input, and stands alone; it has texts beside it", fix="leave them out")
        if sys.stdin is None:
            raise InputError("standard input is closed", fix="give texts as arguments, or --file")
        found, blank = data.lines_of(sys.stdin.buffer.read(), "standard input")
        rows = [(line,) for line in found]
        if blank:
            print(f"{blank:,} blank {'line was' if blank == 1 else 'lines were'} left out", file=sys.stderr)
    else:
        rows = [(text,) for text in texts]
        alone = cut(texts[0], 256) if len(texts) == 1 else ""
        if alone.endswith(data.OF_TEXTS) or (len(texts[0]) < 256 and len(texts) == 1 and os.path.isfile(texts[0])):
            print(f"warning: {alone} looks like a file; --file classifies the texts in one", file=sys.stderr)
    engine = Engine.load(directory)
    given = [row if len(row) == 2 else row[0] for row in rows]
    ids, types, were_cut = engine.encode(given, truncate=True)
    logits = engine.forward(ids, types)
    if were_cut:
        print(f"{len(were_cut):,} of {len(rows):,} texts were cut at {engine.truncates_at} tokens", file=sys.stderr)
    found = answers(engine.problem, engine.labels, logits)
    if json:
        told = [
            {**dict(zip(("text", "text_b"), row, strict=False)), **answer._asdict()}
            for row, answer in zip(rows, found, strict=True)
        ]
        emit({"problem": engine.problem.name, "texts": told}, json)
        return
    for row, answer in zip(rows, found, strict=True):
        said = ", ".join(f"{label} {score:.3f}" for label, score in answer.predicted.items())
        longest = 200 if sys.stdout.isatty() else sys.maxsize
        print("\t".join([said or "no label", *(cut(text, longest) for text in row)]))


@app.command()
@flags(basic=("host", "port", "api_key_file", "insecure", "threads"), config=ServeConfig)
def serve(directory: Directory, *, config: ServeConfig) -> None:
    """Serve the classifier in DIR over HTTP: a page at /, routes at /docs. SIGTERM stops it when the requests in flight
    are answered. Every flag has a variable, such as SPARSEBERT_SERVE_PORT for --port.
    """
    from sparsebert import environment

    for name in environment.unknown_variables(ServeConfig.variables, ServeConfig.model_fields):
        print(f"warning: {name} is the variable of no flag", file=sys.stderr)
    if config.ray:
        from sparsebert.serving.ray_serve import serve_on_ray

        serve_on_ray(directory, config, ready=lambda told: emit(told, True), log=_say)
        return
    from sparsebert.serving.lines import Lines
    from sparsebert.serving.server import serve as run

    log = Lines(sys.stderr)
    try:
        run(directory, config, ready=lambda told: emit(told, True), log=log)
    finally:
        log.close()


def _say(line: dict) -> None:
    print(jsons.dumps(line), file=sys.stderr, flush=True)


@app.command()
@flags(basic=("rate", "seconds", "batch", "api_key_file"), config=LoadtestConfig)
def loadtest(
    url: Annotated[str, typer.Argument(metavar="URL", help="address of the server, such as http://127.0.0.1:8080")],
    *,
    file: Annotated[
        Path | None,
        option(
            metavar="FILE",
            help="send the texts or pairs of a file (.txt, .csv, .tsv, .jsonl, .parquet) "
            "[default: film reviews that come with the package]",
        ),
    ] = None,
    text_column: Annotated[
        list[str] | None, option("--text-column", help=TaskConfig.model_fields["text_column"].description)
    ] = None,
    plot: Annotated[
        Path | None, option(metavar="FILE", help="also draw the latencies to this file (.png, .svg, .pdf)")
    ] = None,
    json: Json = False,
    config: LoadtestConfig,
) -> None:
    """Send requests to a server at a fixed rate, whether or not it keeps up, and tell their latencies."""
    from sparsebert import data
    from sparsebert.serving.loadtest import LATE
    from sparsebert.serving.loadtest import loadtest as run
    from sparsebert.serving.loadtest import plot as draw

    _require_file(file, text_column)
    if plot is not None:
        if plot.suffix not in DRAWN or not plot.parent.is_dir():
            raise InputError(
                f"{plot} must end in {', '.join(DRAWN)}, in a folder that is there", fix="choose another file"
            )
        import matplotlib  # noqa: F401  what is missing is said before the run
    if not url.startswith(("http://", "https://")):
        raise InputError(f"the server's URL must begin with http://, got {url}", fix=f"write http://{url}")
    if file is None:
        spec = data.get_task("mr")
        texts = list(data.load(spec, spec.test).texts)
    else:
        texts = [row if len(row) == 2 else row[0] for row in _rows_of(file, text_column)[0]]
    with progress("loadtest") as update:
        info, found = run(url, texts, config, update)
    rows = [row for row, _ in found]
    if plot is not None:
        draw(found, plot, info["model"])
    if not json:
        table(*table_of_load(f"{info['model']} at {url}, texts per request: {config.batch}", rows))
    for row in rows:
        if row["late_ms"] > LATE:
            print(
                f"warning: at {row['rate']:g} requests/s this machine sent requests up to {row['late_ms']:.0f} ms too "
                "late: the latencies hold that too; test from another machine, or at a lower rate",
                file=sys.stderr,
            )
        for why, count in row["why"].items():
            print(f"{count:,} requests at {row['rate']:g}/s failed: {why}", file=sys.stderr)
    emit({"model": info["model"], "url": url, "batch": config.batch, "arrivals": config.arrivals, "rows": rows}, json)


@app.command()
def seal(directory: Directory, *, json: Json = False) -> None:
    """Make a stock model directory verifiable: write a manifest with the hash of every tensor and golden logits."""
    from sparsebert.checkpoint import seal as run

    sealed = run(directory)
    if not json:
        table(f"{directory} is sealed", ["", ""], [[name, str(value)] for name, value in sealed.items()])
    emit(sealed, json)


@app.command()
def reseal(
    directory: Directory,
    *,
    labels: Annotated[
        str | None, option(metavar="A,B,…", help="write these label names, in the order of the model's outputs")
    ] = None,
    json: Json = False,
) -> None:
    """Accept corrected label names in config.json of a sealed directory; weights and tokenizer must be unchanged."""
    from sparsebert.checkpoint import reseal as run

    names = None if labels is None else [name.strip() for name in labels.split(",")]
    sealed = run(directory, labels=names)
    if not json:
        table(f"{directory} is sealed", ["output", "label"], [[str(i), n] for i, n in enumerate(sealed["labels"])])
    emit(sealed, json)


@app.command()
@flags(
    basic=("task", "text_column", "label_column", "n", "batch", "rounds", "threads", "dtype", "rivals"),
    config=BenchConfig,
)
def bench(
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="model directory")] = None,
    *,
    vs: Annotated[
        Path | None, option(metavar="DENSE", help="directory of another model, such as the dense one, to time as well")
    ] = None,
    explain: Annotated[bool, option("--explain", help="also print how each linear is computed, and why")] = False,
    json: Json = False,
    config: BenchConfig,
) -> None:
    """Time the classifier in DIR in our engine and in others, which run alternately, and compare the logits."""
    import tempfile

    from sparsebert import environment

    environment.cap_rivals()  # before anything imports torch
    from sparsebert.cli.timing import random_model, texts_of
    from sparsebert.engine.rivals import named, time_rivals

    if (directory is None) == (config.random is None):
        raise InputError("bench needs either DIR or --random", fix="name a model directory, or --random minilm")
    if directory is not None and (config.pattern != BenchConfig().pattern or config.sparsity is not None):
        raise InputError("--pattern and --sparsity belong to --random, a model has its own", fix="leave them out")
    named(config.rivals)  # before anything long
    load, cores = os.getloadavg()[0], os.cpu_count()
    with tempfile.TemporaryDirectory() as folder, progress("bench") as update:
        if directory is None:
            directory = random_model(config, Path(folder))
        result = time_rivals(directory, texts_of(directory, config), config, vs=vs, explain=explain, progress=update)
    if load > cores / 2:
        print(f"warning: this machine was busy (load {load:.1f} on {cores} cores), times will vary", file=sys.stderr)
    if not json:
        for title, columns, rows in tables_of_timing(result, config, explain):
            table(title, columns, rows)
        if config.random is None:
            then("sparsebert", "predict", directory, "a text of yours")
    emit(result, json)


@app.command()
def study(
    which: Annotated[
        Literal["srnets", "adaptive"],
        typer.Argument(
            help="srnets: sparse and robust subnetworks, Liu et al. 2022. adaptive: robust pruning, Li et al. 2023"
        ),
    ],
    *,
    grid: Annotated[
        str | None,
        option(
            help="YAML file of cells, or a packaged grid: srnets-small, srnets-paper; adaptive, keeping, "
            "keeping-tier2 [default: for adaptive: adaptive]"
        ),
    ] = None,
    output: Annotated[Path, option("--output", "-o", help="folder for ledger, models and report")],
    hours: Annotated[
        float | None,
        option(
            "--budget",
            "--hours",
            min=0,
            help="do not begin a cell that would probably end after this many hours [default: no limit]",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        option(metavar="FIELD=VALUE,…", help="run only cells with such a field, as in the grid; may be repeated"),
    ] = None,
    dry_run: Annotated[
        bool, option("--dry-run", help="for adaptive: print the cells and about how long they take, and run nothing")
    ] = False,
    shard: Annotated[
        str,
        option(
            metavar="I/N",
            help="run only part I of N (I from 0); cells that share a fine-tuned model stay together",
        ),
    ] = "0/1",
    take: Annotated[
        list[Path] | None,
        option(metavar="CELLS", help="cells.jsonl of another run: do not compute its cells again; may be repeated"),
    ] = None,
    markdown: Annotated[Path | None, option(metavar="FILE", help="also write the tables to this file")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Run a grid of training, pruning and evaluation. After an interruption the same command goes on."""
    from sparsebert import study as studies

    if which == "srnets" and (grid is None or dry_run):
        raise InputError("srnets needs --grid and has no --dry-run", fix="--grid srnets-small")
    read = studies.read_grid if which == "srnets" else studies.read_adaptive
    run = studies.run_grid if which == "srnets" else studies.run_adaptive
    cells, part = read(grid or which), studies.read_shard(shard)
    wanted = studies.read_only(only or [], cells.cells)
    if dry_run:
        rows = studies.planned(cells, wanted, hours)
        if not json:
            table(*table_of_study(rows))
        emit({"grid": cells.name, "seconds": sum(row["seconds"] for row in rows), "cells": rows}, json)
        return
    with progress(f"study {which}") as update:
        outcome = run(
            cells, output, hours=hours, shard=part, only=wanted, others=take or [], overwrite=overwrite, progress=update
        )
    asked = [] if hours is None else [f"--budget {hours:g}"]
    asked += [f"--only {each}" for each in only or []] + ([f"--shard {shard}"] if shard != "0/1" else [])
    asked += [f"--take {studies.path_told(path)}" for path in take or []]
    publish = studies.publish if which == "srnets" else studies.publish_adaptive
    document = publish(cells, outcome, output, markdown, asked)
    if not json:
        rows = [[name, str(value)] for name, value in document.items() if not isinstance(value, list)]
        table(f"{cells.name}: {len(outcome.done)} cells done, {len(outcome.left_out)} left out", ["", ""], rows)
    emit(document, json)


@app.command()
def doctor(
    *,
    tune: Annotated[
        bool,
        option("--tune", help="time the engine's forms on this machine (some seconds), and use the result from now on"),
    ] = False,
    json: Json = False,
) -> None:
    """Show what this machine can run, and why a backend is off."""
    from dataclasses import asdict

    from sparsebert.engine.costs import costs, measure
    from sparsebert.machine import describe

    if tune:
        with progress("tune") as update:
            measure(update)
        _tune_gpu()
    facts = describe()
    if facts["isa"] is not None:
        facts["ns_per_entry"] = asdict(costs(facts["isa"]))
    facts["gpu_forms"] = _gpu_forms()
    if not json:
        table("sparsebert doctor", ["", ""], rows_of_machine(facts))
    emit(facts, json)


def _gpu_forms() -> dict[str, str] | str:
    """The engine's forms on the GPU, or why it does not run there."""
    from sparsebert.machine import version_of

    for name in ("torch", "triton"):
        if version_of(name) == "not installed":
            return f"off: {name} is not installed, pip install 'sparsebert[triton]'"
    from sparsebert.engine import cuda

    return cuda.forms_here()


def _tune_gpu() -> None:
    """Times the forms on the GPU, if there is one on which the engine runs; `_gpu_forms` says why not."""
    if isinstance(_gpu_forms(), str):
        return
    from sparsebert.engine import cuda

    with progress("tune the GPU") as update:
        cuda.measure(update)


@app.command()
def cache(
    *,
    prune: Annotated[
        bool, option("--prune", help="remove all of them; engines that are running are not disturbed")
    ] = False,
    json: Json = False,
) -> None:
    """List or remove the packed models, which make loading fast. They are made again when needed."""
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
    emit({"folder": packed, "limit_mb": limit, "mb": megabytes, "removed": prune, "entries": entries}, json)

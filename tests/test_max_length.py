"""How much of a text is kept: all commands have one rule, report cuts, and refuse impossible lengths at the start."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from models import classifier, saved, stock, tokenizer

from sparsebert import Engine, checkpoint, data, encoders
from sparsebert.checkpoint import encoding
from sparsebert.cli import main
from sparsebert.cli.timing import texts_of
from sparsebert.config import BenchConfig, PruneConfig, TrainConfig
from sparsebert.errors import InputError, OutputError
from sparsebert.pruning import SubnetConfig, prune_checkpoint
from sparsebert.robustness import evaluate
from sparsebert.training import soup, train

TINY = {"steps": 2, "batch_size": 4, "precision": "fp32"}
TRAINED = {"method": "mask"}
ROWS = {"train": 40, "test": 40, "split": "files", "columns": ["text", "label"]}  # of `folder`


@pytest.fixture
def folder(tmp_path):
    """A task of which half the texts are long and half are short; the word that decides the label is at the end."""
    for day, split in (("monday", "train"), ("friday", "test")):
        rows = [(f"on {day} {i} . {'and so on ' * (60 if i % 2 else 1)} {'good' if i % 4 < 2 else 'bad'}", i % 4 < 2)
                for i in range(10, 50)]  # fmt: skip
        lines = (json.dumps({"text": text, "label": "positive" if good else "negative"}) for text, good in rows)
        (tmp_path / "own" / f"{split}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / "own" / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path / "own"


def lengths(examples: data.Examples) -> np.ndarray:
    return np.array([len(ids) for ids in tokenizer()(examples.texts, examples.texts_b)["input_ids"]])


def test_own_texts_are_kept_whole_as_the_engine_keeps_them(tmp_path, folder):
    model = saved(tmp_path / "model")
    examples = data.load(data.get_task(str(folder)), "test")
    assert lengths(examples).max() > 128
    found = evaluate(model, str(folder))
    engine = Engine.load(model, cached=False)
    accuracy = (engine.logits(examples.texts).argmax(1) == examples.labels).mean()
    assert found.accuracy == accuracy
    assert (found.max_length, found.cut, found.rows) == (512, 0.0, ROWS)


def test_own_texts_are_no_longer_than_the_tokenizer_lets_them_be_as_in_predict(tmp_path, folder):
    model = stock(saved(tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 20}))
    examples = data.load(data.get_task(str(folder)), "test")
    found = evaluate(model, str(folder))
    served = Engine.load(model, cached=False).logits(examples.texts, truncate=True)
    assert found.max_length == 20 and found.accuracy == (served.argmax(1) == examples.labels).mean()
    assert evaluate(model, str(folder), max_length=100).max_length == 100, "who asks for more gets more"


def test_a_length_that_leaves_a_pair_no_room_is_refused(tmp_path):
    model, path = saved(tmp_path / "model"), tmp_path / "pairs.jsonl"
    rows = [{"text": f"one {i}", "text_b": f"two {i}", "label": i % 2} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="max_length must be 6 to 512, got 5"):
        evaluate(model, str(path), max_length=5)
    assert evaluate(model, str(path), max_length=6).max_length == 6


def test_the_share_of_texts_cut_is_that_of_longer_ones(tmp_path, folder):
    model = saved(tmp_path / "model")
    examples = data.load(data.get_task(str(folder)), "test")
    for limit in (3, 8, 100, int(lengths(examples).max())):
        want = (lengths(examples) > limit).mean()
        encoded = encoders.tokenize(tokenizer(), examples, limit)
        assert encoders.cut_share(tokenizer(), examples, encoded, limit) == want
    found = evaluate(model, str(folder), max_length=100)
    assert (found.max_length, found.cut) == (100, 0.5)
    other = evaluate(model, str(folder), max_length=100, vs=saved(tmp_path / "short", max_position_embeddings=100))
    assert (other.max_length, other.cut) == (100, 0.5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_long_texts_get_the_tokens_of_transformers(kind, side, monkeypatch):
    monkeypatch.setattr(encoders, "LONG_TEXT", 2000)  # transformers fills the memory with long pairs
    made = copy.deepcopy(tokenizer(kind))
    made.truncation_side = side
    long = " ".join(f"word {i} of a long text, 它" for i in range(400))
    assert len(long) > encoding.PIECE
    texts, other = [long, "short", " " * len(long) + "good", "a" + long], ["short", "b", "end", long[::-1]]
    for examples in (data.Examples("t", "s", texts, None, None), data.Examples("t", "s", texts, other, None)):
        want = made(examples.texts, examples.texts_b, truncation=True, max_length=100)
        got = encoders.tokenize(made, examples, 100)
        assert got == [{name: want[name][i] for name in want} for i in range(4)]
        share = sum(len(ids) > 100 for ids in made(examples.texts, examples.texts_b, verbose=False)["input_ids"]) / 4
        assert encoders.cut_share(made, examples, got, 100) == share


def test_of_a_long_text_little_is_read(monkeypatch):
    made = copy.deepcopy(tokenizer())
    monkeypatch.setattr(type(made), "__call__", lambda *args, **kwargs: pytest.fail("read whole"))
    (row,) = encoders.tokenize(made, data.Examples("t", "s", ["a film . " * 10**6], None, None), 16)
    assert row["input_ids"] == [101, *[1037, 2143, 1012] * 4, 1037, 2143, 102]


def test_of_two_models_the_shorter_one_decides(tmp_path, folder):
    found = evaluate(
        saved(tmp_path / "a"), str(folder), vs=saved(tmp_path / "b", seed=0, max_position_embeddings=64)
    )  # fmt: skip
    assert (found.max_length, found.cut) == (64, 0.5)


@pytest.mark.parametrize(
    "settings",
    [{"tier": 0, "calibration_tokens": 2000}, {"tier": 0, "calibration_tokens": 500, "calibration": ["none"]}, TRAINED],
    ids=str,
)
def test_a_pruning_tells_the_length_the_share_cut_and_the_rows(tmp_path, folder, settings):
    config = PruneConfig(sparsity=0.5, max_length=100, **settings)
    subnet = SubnetConfig(**TINY) if config.method == "mask" else None
    pruned = prune_checkpoint(saved(tmp_path / "model"), str(folder), tmp_path / "out", config, subnet).as_json()
    told = pruned["training"] if subnet else pruned
    assert told["max_length"] == 100 and told["cut"] == pytest.approx(0.5, abs=0.1)
    assert told["rows"] == (ROWS if subnet else ROWS | {"columns": ["text"]})  # without labels none are read
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["sparsebert"]
    assert stored["max_length"] == 100


def test_a_pruning_on_longer_texts_than_the_tasks_is_another_one(tmp_path):
    model, settings = saved(tmp_path / "model"), {"tier": 0, "sparsity": 0.5, "calibration_tokens": 2000}
    whole = prune_checkpoint(model, "mr", tmp_path / "out", PruneConfig(**settings))
    assert whole.max_length == 512 and whole.cut == 0.0
    with pytest.raises(OutputError, match="max_length"):
        prune_checkpoint(model, "mr", tmp_path / "out", PruneConfig(**settings, max_length=128))
    again = prune_checkpoint(model, "mr", tmp_path / "out", PruneConfig(**settings, max_length=512))
    assert again == replace(whole, reused=True)


def test_training_tells_it_too_and_the_default_said_aloud_is_the_same_run(tmp_path, folder):
    model, out = saved(tmp_path / "model"), tmp_path / "out"
    first = train(model, str(folder), out, TrainConfig(**TINY))
    assert (first.max_length, first.cut, first.rows["train"]) == (512, 0.0, 40)
    again = train(model, str(folder), out, TrainConfig(**TINY, max_length=512))
    assert again.resumed_from == 2 and again.weights_sha256 == first.weights_sha256
    with pytest.raises(OutputError, match="max_length"):
        train(model, str(folder), out, TrainConfig(**TINY, max_length=100))
    shorter = train(model, str(folder), tmp_path / "shorter", TrainConfig(**TINY, max_length=100))
    assert (shorter.max_length, shorter.cut) == (100, 0.5) and shorter.weights_sha256 != first.weights_sha256


def test_a_known_task_keeps_what_it_needs_unless_it_is_asked_otherwise(tmp_path):
    model = saved(tmp_path / "model")
    assert evaluate(model, "mr", n=20).max_length == 128
    assert evaluate(model, "mr", n=20, max_length=200).max_length == 200
    small = saved(tmp_path / "small", max_position_embeddings=40)
    assert evaluate(small, "mr", n=20).max_length == 40
    roberta = saved(tmp_path / "roberta", kind="roberta", max_position_embeddings=66)
    limit = encoders.token_limit(checkpoint.load(roberta)[0].config, None)
    with pytest.raises(InputError, match=f"max_length must be 3 to {limit}, got {limit + 1}"):
        evaluate(roberta, "mr", n=20, max_length=limit + 1)


@pytest.mark.parametrize("length", [2, 65])
def test_what_the_model_cannot_take_is_refused_before_any_work(tmp_path, folder, length):
    model, task, out = saved(tmp_path / "model", max_position_embeddings=64), str(folder), tmp_path / "out"
    fields = {"max_length": length} if length > 2 else {}
    calls = {
        "train": lambda: train(model, task, out, TrainConfig(**TINY, **fields)),
        "prune": lambda: prune_checkpoint(model, task, out, PruneConfig(**fields)),
        "subnet": lambda: prune_checkpoint(model, task, out, PruneConfig(**TRAINED, **fields), SubnetConfig(**TINY)),
        "eval": lambda: evaluate(model, task, max_length=length),
        "bench": lambda: texts_of(model, BenchConfig(task=task, **fields)),
    }
    for name, call in calls.items():
        if fields or name == "eval":
            with pytest.raises(InputError, match=f"max_length must be 3 to 64, got {length}; choose a length"):
                call()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


def test_a_soup_is_scored_on_texts_of_that_length(tmp_path, folder):
    start = saved(tmp_path / "start", classifier(max_position_embeddings=64))
    for seed in (0, 1):
        train(start, str(folder), tmp_path / f"m{seed}", TrainConfig(**TINY, hold_out=8, seed=seed))
    models = [tmp_path / "m0", tmp_path / "m1"]
    with pytest.raises(InputError, match="max_length must be 3 to 64"):
        soup(models, str(folder), tmp_path / "soup", max_length=65)
    whole = soup(models, str(folder), tmp_path / "whole")
    cut = soup(models, str(folder), tmp_path / "cut", max_length=8)
    assert whole.scores != cut.scores


def test_bench_cuts_the_tasks_texts_alone(tmp_path, folder):
    model = saved(tmp_path / "model")
    cut = texts_of(model, BenchConfig(task=str(folder), n=40, max_length=20))
    whole = texts_of(model, BenchConfig(task=str(folder), n=40))
    assert max(len(row["input_ids"]) for row in cut) == 20 and max(len(row["input_ids"]) for row in whole) > 128
    with pytest.raises(InputError, match="--max-length belongs to --seq mix, got --seq 16; leave it out"):
        texts_of(model, BenchConfig(seq="16", max_length=20))


def test_the_commands_say_on_stderr_what_was_read_and_cut(tmp_path, capsys):
    model, path = saved(tmp_path / "model"), tmp_path / "own.csv"
    path.write_text("text,label\n" + "".join(f"{'so on ' * (i % 2 * 9)}{i},{'good' if i % 3 else 'bad'}\n"
                                             for i in range(200)))  # fmt: skip
    named = tmp_path / "named"
    runs = {
        "train": ["train", str(model), "-o", str(named), "--steps", "2", "--batch-size", "4"],
        "prune": ["prune", str(named), "-o", str(tmp_path / "pruned"), "--tier", "0", "--calibration-tokens", "500"],
        "eval": ["eval", str(named)],
    }
    for name, run in runs.items():
        code = main([*run, "--task", str(path), "--max-length", "12", "--json"])
        out = capsys.readouterr()
        assert code == 0, out.err
        told = json.loads(out.out.splitlines()[-1])
        assert told["max_length"] == 12 and 0.3 < told["cut"] < 0.7, name
        assert told["rows"]["train"] + told["rows"]["test"] == 200
        assert (
            f"{told['rows']['train']} of train, {told['rows']['test']} of test, split by a hash of the texts" in out.err
        )
        assert f"{told['cut']:.1%} of the texts were cut at 12 tokens (--max-length)" in out.err


def test_texts_alone_are_pruned_on_and_refused_elsewhere_by_name(tmp_path, capsys):
    model, path = saved(tmp_path / "model"), tmp_path / "texts.csv"
    path.write_text("text\n" + "".join(f"some words and {i}\n" for i in range(200)))
    settings = ["--tier", "0", "--calibration-tokens", "500", "--json"]
    assert main(["prune", str(model), "--task", str(path), "-o", str(tmp_path / "out"), *settings]) == 0
    capsys.readouterr()
    for run in (["eval", str(model)], ["train", str(model), "-o", str(tmp_path / "t")],
                ["prune", str(model), "--method", "mask", "-o", str(tmp_path / "m")]):  # fmt: skip
        assert main([*run, "--task", str(path)]) == 2
        assert f"error: {path} must have a column 'label', has 'text'" in capsys.readouterr().err
    assert not (tmp_path / "t").exists() and not (tmp_path / "m").exists()


def test_class_names_of_a_file_are_the_models_afterwards(tmp_path, folder):
    train(saved(tmp_path / "model", labels=3), str(folder), tmp_path / "out", TrainConfig(**TINY))
    assert list(Engine.load(tmp_path / "out", cached=False).labels) == ["negative", "positive"]

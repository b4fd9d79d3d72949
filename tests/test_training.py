from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from models import classifier, saved, stock, tokenizer

from sparsebert import checkpoint, config, data, encoders, jobs
from sparsebert.errors import CheckpointError, InputError, OutputError, SparsebertWarning
from sparsebert.training import loop, train
from sparsebert.training.setup import origin

SETTINGS = config.TrainConfig(n=32, batch_size=8, epochs=1.5, lr=1e-3)  # 6 steps
SHORT = SETTINGS.model_copy(update={"epochs": 0.25})  # 1 step


class Killed(Exception):
    """Stands for a kill in the middle of a run."""


@pytest.fixture
def snapshots(monkeypatch):
    monkeypatch.setattr(loop, "STEPS_PER_SNAPSHOT", 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_resumes_to_the_same_weights(start, tmp_path, snapshots, precision):
    settings = SETTINGS.model_copy(update={"precision": precision})
    whole = train(start, "mr", tmp_path / "whole", settings)

    def kill(done, total):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        train(start, "mr", tmp_path / "cut", settings, progress=kill)
    assert not (tmp_path / "cut").exists()
    resumed = train(start, "mr", tmp_path / "cut", settings)
    assert resumed.resumed_from == 4
    assert resumed.weights_sha256 == whole.weights_sha256
    assert resumed.loss == whole.loss
    assert not list(tmp_path.glob("*partial*"))


def test_a_finished_run_returns_at_once_and_a_changed_one_is_refused(start, tmp_path):
    first = train(start, "mr", tmp_path / "m", SHORT)
    steps = []
    again = train(start, "mr", tmp_path / "m", SHORT, progress=lambda done, total: steps.append(done))
    assert steps == [] and again.weights_sha256 == first.weights_sha256 and again.resumed_from == again.steps
    changed = SHORT.model_copy(update={"seed": 1})
    with pytest.raises(OutputError, match=r"m was made with --seed 0, not 1; .*--overwrite"):
        train(start, "mr", tmp_path / "m", changed)
    assert checkpoint.weights_sha256(tmp_path / "m") == first.weights_sha256
    other = train(start, "mr", tmp_path / "m", changed, overwrite=True)
    assert other.resumed_from == 0 and other.weights_sha256 != first.weights_sha256


def test_a_snapshot_of_other_settings_is_refused_with_the_difference(start, tmp_path, snapshots):
    def kill(done, total):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        train(start, "mr", tmp_path / "m", SETTINGS, progress=kill)
    changed = SETTINGS.model_copy(update={"lr": 2e-3})
    with pytest.raises(OutputError, match=r"m\.partial holds an unfinished run with --lr 0\.001, not 0\.002; .*--over"):
        train(start, "mr", tmp_path / "m", changed)
    with pytest.raises(Killed):
        train(start, "mr", tmp_path / "m", SETTINGS, progress=kill)  # resumes from step 2
    assert train(start, "mr", tmp_path / "m", changed, overwrite=True).resumed_from == 0


def test_a_snapshot_of_other_code_is_refused_and_said(start, tmp_path, snapshots, monkeypatch):
    def kill(done, total):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        train(start, "mr", tmp_path / "m", SETTINGS, progress=kill)
    monkeypatch.setattr(jobs.job, "code_of", lambda module: "0123456789abcdef" * 4)
    with pytest.raises(
        OutputError, match=r"unfinished run with other code \(sha256 [0-9a-f]{8}…, not 01234567…\); .*--overwrite"
    ):
        train(start, "mr", tmp_path / "m", SETTINGS)
    assert train(start, "mr", tmp_path / "m", SETTINGS, overwrite=True).resumed_from == 0


@pytest.mark.parametrize("damage", ["torn", "one bit", "missing"])
def test_a_damaged_snapshot_is_refused(start, tmp_path, snapshots, damage):
    def kill(done, total):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        train(start, "mr", tmp_path / "m", SETTINGS, progress=kill)
    (snapshot,) = (tmp_path / "m.partial").glob("*.safetensors")
    content = bytearray(snapshot.read_bytes())
    content[-5] ^= 1
    if damage == "missing":
        snapshot.unlink()
    else:
        snapshot.write_bytes(content if damage == "one bit" else content[:1000])
    with pytest.raises(OutputError, match=rf"{snapshot.name} is damaged or missing .* delete .*m\.partial"):
        train(start, "mr", tmp_path / "m", SETTINGS)
    assert not (tmp_path / "m").exists()
    assert train(start, "mr", tmp_path / "m", SETTINGS, overwrite=True).resumed_from == 0


def test_training_learns_and_leaves_the_callers_random_state(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    settings = config.TrainConfig(n=32, batch_size=8, epochs=6, lr=2e-4)
    train("minilm", "mr", tmp_path / "m", settings)
    assert torch.equal(torch.get_rng_state(), before)
    model, tok = checkpoint.load(tmp_path / "m")
    examples = data.load(data.get_task("mr"), "train", limit=32, seed=0)
    right = encoders.predict(model, tok, examples, max_length=128).argmax(1) == examples.labels
    assert right.mean() > 0.85, "32 sentences can be learnt by heart"
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_the_schedule_warms_up_and_ends_at_zero():
    shares = [loop.rise_and_fall(step, 100, 0.1) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == 1.0 and shares[99] == pytest.approx(1 / 90)
    assert np.all(np.diff(shares[10:]) < 0)


def test_batches_are_of_similar_length_and_cover_an_epoch():
    encoded = [{"input_ids": [0] * n} for n in np.random.default_rng(0).integers(3, 100, 5000)]
    lengths = np.array([len(row["input_ids"]) for row in encoded])
    batches = encoders.bucketed(encoded, 32, np.random.default_rng(1))
    assert sorted(np.concatenate(batches)) == list(range(5000))
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    assert padded < 1.05 * lengths.sum()
    again = encoders.bucketed(encoded, 32, np.random.default_rng(2))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(again))


def test_a_task_without_training_split_is_refused(start, tmp_path):
    with pytest.raises(InputError, match="no training split"):
        train(start, "fever_symm_v1", tmp_path / "m")


def test_predictions_do_not_depend_on_the_batch():
    model, tok = classifier(), tokenizer()
    examples = data.load(data.get_task("mr"), "test", limit=30)
    alone = encoders.predict(model, tok, examples, max_length=128, batch_size=1)
    together = encoders.predict(model, tok, examples, max_length=128, batch_size=30)
    np.testing.assert_allclose(alone, together, atol=2e-5)


def test_a_run_that_diverges_says_so_and_saves_nothing(start, tmp_path):
    with pytest.raises(InputError, match=r"diverged at step \d+.*--lr"):
        train(start, "mr", tmp_path / "m", SETTINGS.model_copy(update={"lr": 1e30}))
    assert not list(tmp_path.iterdir())


def test_another_config_or_tokenizer_of_the_start_is_another_run(start, tmp_path):
    first = train(start, "mr", tmp_path / "m", SHORT)
    other = stock(shutil.copytree(start, tmp_path / "other"))
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"num_attention_heads": 4}))
    with pytest.raises(
        OutputError, match=r"was made with other weights or tokenizer in the model directory \(sha256 [0-9a-f]{8}…"
    ):
        train(other, "mr", tmp_path / "m", SHORT)
    second = train(other, "mr", tmp_path / "m", SHORT, overwrite=True)
    assert second.resumed_from == 0 and second.weights_sha256 != first.weights_sha256


def test_texts_are_cut_to_the_models_positions(tmp_path):
    start = saved(tmp_path / "short", classifier(max_position_embeddings=40))
    train(start, "mr", tmp_path / "m", SETTINGS)
    model, tok = checkpoint.load(tmp_path / "m")
    long = data.Examples("mr", "test", ["word " * 300], None, np.array([0]))
    assert np.isfinite(encoders.predict(model, tok, long, max_length=256)).all()


def test_a_partial_folder_of_the_users_is_left_alone(start, tmp_path):
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"holds no unfinished work of this package \(thesis\.tex\)"):
            train(start, "mr", tmp_path / "m", SETTINGS, overwrite=overwrite)
    assert (tmp_path / "m.partial" / "thesis.tex").read_text() == "mine"


def test_confidence_regularisation_trains_its_teacher_first(encoder, tmp_path):
    settings = config.TrainConfig(loss="confreg", bias="weak", n=40, batch_size=8, steps=2, precision="fp32")
    parts = []
    result = train(encoder, "mr", tmp_path / "m", settings, progress=lambda done, total, what="": parts.append(what))
    assert list(dict.fromkeys(parts)) == [
        "teacher", "weak learner 1 of 2", "weak learner 2 of 2", "ask the teacher", "",
    ]  # fmt: skip
    assert checkpoint.read_recipe(tmp_path / "m.teacher")["loss"] == "ce"
    assert 0 < result.bias["mean_probability_of_label"] < 1
    taught = settings.model_copy(update={"teacher": str(tmp_path / "m.teacher")})
    again = train(encoder, "mr", tmp_path / "other", taught)
    assert again.weights_sha256 == result.weights_sha256 and not (tmp_path / "other.teacher").exists()
    # From a model of this package, the teacher and the weak learner begin at the encoder that it descends from.
    train(tmp_path / "m.teacher", "mr", tmp_path / "again", settings)
    assert checkpoint.read_recipe(tmp_path / "again.teacher")["model"] == str(encoder)


@pytest.mark.parametrize(
    ("fields", "fix"),
    [
        ({"loss": "poe", "bias": "weak"}, "--bias"),
        ({"loss": "confreg", "bias": "weak"}, "--bias"),
        ({"loss": "distill"}, "--teacher"),
        ({"loss": "rmc", "teacher": "minilm"}, "sparsebert train"),
    ],
)
def test_models_beside_a_run_do_not_begin_at_a_classifier(start, tmp_path, fields, fix):
    """Its head, or what its encoder has learnt, knows the labels."""
    for source in (start, stock(saved(tmp_path / "elsewhere"))):
        with pytest.raises(InputError, match=f"encoder that {source} was fine-tuned from is not known") as raised:
            train(source, "mr", tmp_path / "m", SHORT.model_copy(update=fields))
        assert fix in raised.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_classifier_is_fine_tuned_on_with_a_teacher_that_is_named(start, encoder, tmp_path):
    train(encoder, "mr", tmp_path / "teacher", SHORT)
    settings = SHORT.model_copy(update={"loss": "distill", "teacher": str(tmp_path / "teacher")})
    assert train(start, "mr", tmp_path / "m", settings).steps == 1


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"loss": "poe"}, "task 'mr' has no default one"),
        ({"loss": "ce", "bias": "weak"}, "loss ce uses no bias model"),
        ({"loss": "poe", "bias": "weak", "teacher": "x"}, "loss poe uses no teacher"),
        ({"select": "best"}, "hold_out 0"),
        ({"keep": "0.5,1.5"}, "above 0 and below 1"),
        ({"keep": "half"}, "above 0 and below 1"),
        ({"mix_ood": True}, "no out-of-distribution training examples"),
    ],
)
def test_what_a_run_lacks_is_said_before_it_begins(start, tmp_path, fields, match):
    with pytest.raises(InputError, match=match):
        train(start, "mr", tmp_path / "m", config.TrainConfig(**fields))
    assert not list(tmp_path.iterdir())


def test_a_teacher_of_other_labels_is_refused(encoder, tmp_path):
    teacher = saved(tmp_path / "teacher", labels=3)
    settings = config.TrainConfig(loss="confreg", bias="weak", teacher=str(teacher))
    with pytest.raises(InputError, match=r"teacher .* has 3 labels"):
        train(encoder, "mr", tmp_path / "m", settings)


def test_the_best_weights_are_those_of_the_best_check(start, tmp_path, monkeypatch):
    """If held-out accuracy falls after the second check, the weights of the second check are kept."""
    accuracies = iter([0.5, 0.8, *[0.6] * 98])
    kept_at = []

    def keep_best(self):
        self.score = lambda: next(accuracies)
        kept_at.append({name: p.detach().clone() for name, p in self.parameters.items()})
        original(self)

    original = loop.TrainingLoop._keep_best
    monkeypatch.setattr(loop.TrainingLoop, "_keep_best", keep_best)
    settings = SETTINGS.model_copy(update={"hold_out": 20, "select": "best"})
    result = train(start, "mr", tmp_path / "m", settings)
    assert result.held_out == 0.8 and result.chosen == 2 and len(kept_at) == 6
    model, _ = checkpoint.load(tmp_path / "m")
    for name, p in model.named_parameters():
        assert torch.equal(p, kept_at[1][name]), name


# Where a model comes from


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """pretrained → tuned → again, trained with relative paths in tmp_path/a."""
    place = tmp_path / "a"
    place.mkdir()
    monkeypatch.chdir(place)
    saved(place / "pretrained")
    quick = config.TrainConfig(n=16, batch_size=8, steps=1, precision="fp32")
    train("pretrained", "mr", "tuned", quick)
    train("tuned", "mr", "again", quick)
    monkeypatch.chdir("/")
    return place


def test_the_origin_is_found_from_any_working_directory(chain, tmp_path):
    assert origin(chain / "again") == chain / "pretrained"
    moved = chain.rename(tmp_path / "b")  # all of them together
    assert origin(moved / "again") == moved / "pretrained"


def test_an_origin_that_moved_or_changed_is_refused(chain, tmp_path):
    settings = config.TrainConfig(loss="poe", bias="weak", n=16, batch_size=8, steps=1, precision="fp32")
    (chain / "pretrained").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"tuned was made from .*/a/pretrained, which is not there any more"):
        train(chain / "again", "mr", tmp_path / "m", settings)
    train(chain / "again", "mr", tmp_path / "plain", settings.model_copy(update={"loss": "ce", "bias": "auto"}))
    saved(chain / "pretrained", seed=3)
    with pytest.raises(CheckpointError, match=r"tuned was made from .*/a/pretrained, which has changed since"):
        train(chain / "again", "mr", tmp_path / "m", settings)
    assert not (tmp_path / "m").exists()


def test_an_origin_noted_relative_to_an_unknown_place_is_refused(chain):
    recipe = chain / "again" / "sparsebert" / "recipe.yaml"
    recipe.write_text("command: train\nmodel: tuned\n")  # as an earlier version wrote it
    with pytest.raises(CheckpointError, match=r"was made from 'tuned', and does not say where that is"):
        origin(chain / "again")


# Places


def test_an_output_that_other_hands_have_made_is_replaced_by_overwrite_alone(start, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"m exists and is no model directory of this package; .*--overwrite"):
        train(start, "mr", tmp_path / "m", SHORT)
    assert (tmp_path / "m" / "thesis.tex").read_text() == "mine"
    train(start, "mr", tmp_path / "m", SHORT, overwrite=True)
    assert not (tmp_path / "m" / "thesis.tex").exists()


def test_models_kept_on_the_way_replace_no_others(start, tmp_path):
    settings = SHORT.model_copy(update={"keep": "0.5"})
    other = train(start, "mr", tmp_path / "m-at-0.5", SHORT).weights_sha256
    with pytest.raises(OutputError, match=r"m-at-0\.5 was made with --keep none, not 0\.5"):
        train(start, "mr", tmp_path / "m", settings)
    assert checkpoint.weights_sha256(tmp_path / "m-at-0.5") == other and not (tmp_path / "m").exists()


def test_other_settings_are_refused_before_a_teacher_is_trained(encoder, tmp_path):
    settings = config.TrainConfig(loss="confreg", bias="weak", n=40, batch_size=8, steps=4, precision="fp32")
    train(encoder, "mr", tmp_path / "m", SHORT)
    with pytest.raises(OutputError, match=r"m was made with .*--loss ce, not confreg"):
        train(encoder, "mr", tmp_path / "m", settings)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_every_step_of_a_run_may_be_given(start, tmp_path):
    assert train(start, "mr", tmp_path / "m", SETTINGS.model_copy(update={"steps": 2})).steps == 2


def test_zeros_that_another_tool_made_stay(tmp_path):
    model = classifier()
    with torch.no_grad():
        for module in encoders.encoder_linears(model).values():
            module.weight[torch.rand(module.weight.shape) < 0.8] = 0.0
    source = stock(saved(tmp_path / "theirs", model))
    with pytest.warns(SparsebertWarning, match=r"theirs has (79|80)\.\d% zeros"):
        train(source, "mr", tmp_path / "tuned", SETTINGS)
    tuned = checkpoint.read_weights(tmp_path / "tuned")
    changed = 0
    for name, module in encoders.encoder_linears(model).items():
        was, now = module.weight.detach().numpy(), tuned[f"{name}.weight"]
        assert not now[was == 0].any()
        changed += int((now != was).sum())
    assert changed > 0


def test_a_dense_model_is_trained_whole(start, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsebertWarning)
        train(start, "mr", tmp_path / "tuned", SETTINGS)

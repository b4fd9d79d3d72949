"""The texts that pruning calibrates on: which, how many, how long; the user's own files."""

from __future__ import annotations

import numpy as np
import pytest
from models import classifier, saved, tokenizer

from sparsebert import checkpoint, config, data
from sparsebert.data import general_texts
from sparsebert.errors import DataError, InputError
from sparsebert.pruning import draw, prune, prune_checkpoint
from sparsebert.pruning.calibration import HELD_OUT, SHARES, others
from sparsebert.pruning.plan import plan

MR = data.load(data.get_task("mr"), "train")
PAIRS = data.Examples("nli", "train", MR.texts[:400], MR.texts[400:800], None)


def drawn(tokens=20_000, seed=0, beside=None, examples=MR, max_length=None):
    return draw(
        classifier(),
        tokenizer(),
        examples,
        tokens,
        max_length,
        seed,
        others=general_texts() if beside is None else beside,
    )


def test_the_general_set_is_packaged_and_of_sentences():
    seen, unseen = general_texts(), general_texts(unseen=True)
    texts = {*seen, *unseen}
    assert len(seen) == 13_499 and len(unseen) == 500 and len(texts) == 13_999
    assert all(5 <= len(text.split()) <= 40 and text == text.strip() for text in texts)


def test_each_part_has_its_share_of_the_tokens():
    found = drawn()
    assert found.parts.keys() == SHARES.keys()
    for part, share in SHARES.items():
        assert share * 20_000 <= found.parts[part] < share * 20_000 + 512, part  # the text that crosses it is included
    assert found.tokens == sum(found.parts.values())


def test_joined_texts_reach_the_models_last_position_and_no_text_has_more():
    lengths = np.array([batch["input_ids"].shape[1] for batch in drawn(60_000).batches])
    assert lengths.max() > 480 and lengths.max() <= 512
    short = drawn(60_000, max_length=64)
    assert max(batch["input_ids"].shape[1] for batch in short.batches) == 64 == short.max_length


def test_the_same_seed_draws_the_same_texts_and_another_others():
    assert drawn().sha256 == drawn().sha256 != drawn(seed=1).sha256


def test_without_other_texts_the_tasks_own_are_taken_as_they_are():
    found = drawn(beside=())
    assert set(found.texts.texts) <= set(MR.texts) and found.parts.keys() == {"task"}
    assert len(found.held_out) == HELD_OUT and not set(found.held_out.texts) & set(found.texts.texts)


def test_nothing_held_out_is_calibrated_on():
    few = tuple(f"general sentence number {i} of many" for i in range(900))
    found = drawn(60_000, beside=few, examples=MR.take(range(1500)))
    calibrated, held = " | ".join(found.texts.texts), found.held_out.texts
    assert held and not any(text in calibrated for text in held)
    assert any(len(text.split()) > 60 for text in held), "joined ones are chosen on as well"


def test_pairs_stay_pairs_and_are_joined_side_by_side():
    found = drawn(examples=PAIRS)
    assert found.texts.texts_b is not None and len(found.texts.texts_b) == len(found.texts.texts)
    own = set(zip(PAIRS.texts, PAIRS.texts_b, strict=True))
    assert sum(pair in own for pair in zip(found.texts.texts, found.texts.texts_b, strict=True)) > 100
    assert any(len(b.split()) > 60 for b in found.texts.texts_b)


def test_few_texts_are_no_endless_loop():
    found = drawn(20_000, examples=MR.take(range(30)))
    assert found.parts["task"] < 1500 and found.parts["task, joined"] >= 0.15 * 20_000


FEW = {"sparsity": 0.5, "calibration_tokens": 600}


def own_task(folder, count: int) -> str:
    """A folder with that many training texts."""
    folder.mkdir()
    for name, rows in (("train", range(count)), ("test", range(20, 22))):
        lines = [f"text number {i} of this film is {'good' if i % 2 else 'bad'},{i % 2}" for i in rows]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    return str(folder)


@pytest.mark.parametrize("count", [2, 9])
def test_distillation_of_too_few_texts_to_choose_on_is_refused_before_any_work(tmp_path, count):
    """A tenth of the texts are held out: of nine, none."""
    dense, task = saved(tmp_path / "dense"), own_task(tmp_path / "task", count)
    settings = config.PruneConfig(tier=2, **FEW)
    for asked in (plan, prune_checkpoint):
        with pytest.raises(InputError, match=r"step distill needs a held-out text"):
            asked(dense, task, tmp_path / "m", settings)
    assert not list(tmp_path.glob("m*"))
    with pytest.raises(InputError, match=r"step distill needs a held-out text"):
        prune(classifier(), drawn(600, examples=MR.take(range(count))), settings)


@pytest.mark.parametrize("fields", [{"tier": 2, "without": "distill,perturb"}, {"tier": 1}, {"method": "wanda"}])
def test_without_distillation_a_few_texts_will_do(tmp_path, fields):
    settings = config.PruneConfig(**FEW, **fields)
    result = prune_checkpoint(saved(tmp_path / "dense"), own_task(tmp_path / "task", 9), tmp_path / "m", settings)
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)


def test_ten_texts_are_enough_to_distil(tmp_path, monkeypatch):
    for name, value in {"STEPS": 6, "CHECK_EVERY": 2, "BATCH": 8}.items():
        monkeypatch.setattr(f"sparsebert.pruning.distillation.{name}", value)
    dense, task = saved(tmp_path / "dense"), own_task(tmp_path / "task", 10)
    result = prune_checkpoint(dense, task, tmp_path / "m", config.PruneConfig(tier=2, **FEW))
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)


FILES = {
    "a.txt": "first text\n\nsecond text \n",
    "b.csv": "text,other\nthird text,1\n",
    "c.tsv": 'sentence\n"fourth text\n',
    "d.jsonl": '{"premise": "fifth text", "hypothesis": "sixth text"}\n',
}


def test_files_of_every_kind_are_read_in_order(tmp_path):
    for name, body in FILES.items():
        (tmp_path / name).write_text(body)
    found = others([str(tmp_path / name) for name in FILES])
    assert found == ["first text", "second text", "third text", '"fourth text', "fifth text", "sixth text"]
    assert others([]) == list(general_texts()) and others(["none"]) == []
    assert others([str(tmp_path / "a.txt"), "general"])[2:] == list(general_texts())


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("empty.txt", b"\n \n", "must hold at least one line"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "line 1: must be UTF-8"),
        ("x.csv", b"review\nfine\n", "must have a column 'text', has 'review'"),
    ],
)
def test_a_file_that_cannot_be_calibrated_on_is_named(tmp_path, name, body, says):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(DataError, match=says) as caught:
        others([str(tmp_path / name)])
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["absent.txt", "absent.csv"])
def test_an_absent_file_is_named(tmp_path, name):
    with pytest.raises(DataError, match="absent"):
        others([str(tmp_path / name)])


def test_none_goes_alone():
    with pytest.raises(InputError, match="calibration must be none or texts"):
        others(["none", "general"])


def test_what_was_calibrated_on_is_in_the_result_and_decides_whether_it_is_the_same_run(tmp_path):
    source = saved(tmp_path / "dense")
    settings = {"method": "wanda", "sparsity": 0.5, "calibration_tokens": 4000}
    first = prune_checkpoint(source, "mr", tmp_path / "out", config.PruneConfig(**settings))
    assert first.calibration.keys() == SHARES.keys() and first.max_length == 512
    (tmp_path / "own.txt").write_text("\n".join(MR.texts[:200]))
    other = config.PruneConfig(**settings, calibration=(str(tmp_path / "own.txt"),))
    with pytest.raises(Exception, match="calibration"):
        prune_checkpoint(source, "mr", tmp_path / "out", other)
    prune_checkpoint(source, "mr", tmp_path / "other", other)
    assert checkpoint.read_recipe(tmp_path / "other")["calibration"] == [str(tmp_path / "own.txt")]
    weights = [checkpoint.weights_sha256(tmp_path / name) for name in ("out", "other")]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    "wrong", [{"method": "magnitude"}, {"method": "adaptive", "as_published": True}, {"method": "mask"}]
)
def test_methods_that_look_at_no_other_texts_refuse_them(tmp_path, wrong):
    with pytest.raises(InputError, match="calibration"):
        prune_checkpoint(
            saved(tmp_path / "m"), "mr", tmp_path / "o", config.PruneConfig(calibration=("general",), **wrong)
        )


def test_another_kind_of_file_and_one_text_for_pairs_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"files that end in \.txt, \.parquet, .*, got .*x\.docx"):
        others([str(tmp_path / "x.docx")])
    pairs = data.Examples("t", "train", ["a b"] * 40, ["c d"] * 40, None)
    with pytest.raises(InputError, match="pairs needs at least two other texts, got 1"):
        draw(classifier(), tokenizer(), pairs, 100, 32, 0, others=["alone"])


def test_held_out_texts_are_not_calibrated_on_even_where_they_repeat():
    texts = [f"film number {i:02d}" for i in range(40)] * 5
    for beside in ((), tuple(f"sentence {i} of another kind" for i in range(40)) * 5):
        found = draw(
            classifier(), tokenizer(), data.Examples("t", "train", texts, None, None), 2000, 64, 0, others=beside
        )
        assert found.texts.texts and found.held_out.texts
        whole = [text for text in found.held_out.texts if text in texts]
        assert whole and not any(text in calibrated for text in whole for calibrated in found.texts.texts)

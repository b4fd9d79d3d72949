"""The trade-off card and its page, and the figures that `eval --save` leaves beside a model."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet
import pytest
import torch
from browser import tab
from command_line import refused, run
from huggingface_hub import ModelCard
from models import classifier, saved

from sparsebert import checkpoint, data
from sparsebert.data import Examples
from sparsebert.errors import InputError
from sparsebert.robustness import attacks, card, compare, saving, trade_off
from sparsebert.robustness.run import worst

N = 20
EVIL = "<script>document.title = 'owned'</script>"
DENSE = {"directory": "models/dense", "sparsity": 0.0, "bytes": 4_000_000}


def facts(name: str, sparsity: float, size: int) -> dict:
    made = {"method": "knowledge", "pattern": "unstructured", "dtype": "f32", "parameters": 10, "non_zeros": 5}
    hashes = {"weights_sha256": f"weights of {name}", "content_sha256": f"content of {name}"}
    return {"directory": f"models/{name}", "sparsity": sparsity, "bytes": size, **made, **hashes}


def rows(fooled: set[int]) -> list[dict]:
    """Rows of an attack that fools the model on these of N examples."""
    return [
        {
            "id": i, "unit": f"{i:012x}", "original": f"a good {EVIL} film {i}", "label": "positive",
            "outcome": "succeeded" if i in fooled else "failed", "perturbed": f"a {'fine'} {EVIL} film {i}",
            "queries": 10 + i, "words_changed": 0.2 * (1 + i % 3), "score": 0.5 + i / 100, "capped": None,
            "error": None, "seconds": 0.1,
        } for i in range(N)
    ]  # fmt: skip


def document(name: str = "s50", sparsity: float = 0.5, size: int = 2_000_000, fooled: int = 4) -> dict:
    """What eval --json prints: the model is fooled on `fooled` examples, the dense one on four."""
    task, rng = data.get_task("mr"), np.random.default_rng(0)
    examples = Examples("mr", "test", ["text"] * N, None, np.arange(N) % 2)
    logits = rng.normal(size=(N, 2)).astype(np.float32)
    own, dense = rows(set(range(fooled))), rows({0, 1, 2, 19})
    found = attacks.figures("textfooler (toy)", own, dense) | {
        "settings": {"attack": "textfooler", "resources": {"encoder": "0" * 64}, "seed": 0},
        "worst": worst(own, dense), "temperature": 1.0,
    }  # fmt: skip
    figures = compare(task, examples, logits, logits + 0.1).as_json() | {"engine": "sparsebert", "dtype": "fp32"}
    about = {
        "model": facts(name, sparsity, size), "dense": facts("dense", 0.0, 4_000_000), "data": "d" * 64, "seed": 0,
        "versions": {"sparsebert": "0.1.0"},
    }  # fmt: skip
    domain = compare(task, examples, logits, logits).figures("task") | {"data": "e" * 64, "max_length": 128}
    figures |= {"attacks": {"textfooler": found}, "domains": {"imdb": domain}, "about": about}
    return json.loads(json.dumps(figures))


def timing(**milliseconds: float) -> dict:
    """What bench --json prints, of models by name."""
    shared = {"batch": 1, "seq": "mix", "threads": 2}
    ours = [
        {"engine": "sparsebert", "p50_ms": ms, "content_sha256": f"content of {name}", **shared}
        for name, ms in milliseconds.items()
    ]
    return {"machine": {"cpu": "a CPU"}, "rows": [*ours, {**ours[0], "engine": "torch", "p50_ms": 99.0}]}


# --- the card --------------------------------------------------------------------------------------------------------


def test_a_card_has_the_dense_model_first_then_the_others_by_sparsity():
    made = card.card([document("s90", 0.9, 1_000_000), document("s50")])
    assert [column.name for column in made.columns] == ["dense", "s50", "s90"]
    assert made.lines == ["accuracy", "under textfooler", "imdb, other domain"]
    dense, s50, _ = (column.figures["under textfooler"] for column in made.columns)
    assert (dense.value, dense.difference) == (0.8, None) and s50.value == 0.8 and s50.difference[0] == 0
    assert dense.interval[0] < 0.8 < dense.interval[1]
    columns, table = card.table_of(made)
    cells = {row[0]: row[1:] for row in table}
    assert columns[1] == "dense (dense)" and cells["share of zeros"] == ["0.0%", "50.0%", "90.0%"]
    assert cells["MB without zeros"] == ["4.0", "2.0", "1.0"]
    assert re.fullmatch(r"80\.0 % \[.*\]; \+0\.0 \[-.*, \+.*\]", cells["under textfooler"][1])
    assert cells["same label as dense, imdb"] == ["", "100.0%, KL 0.0000", "100.0%, KL 0.0000"]


def test_the_star_is_the_cheapest_model_within_a_point_of_dense_under_every_attack():
    documents = [document("s50"), document("s90", 0.9, 1_000_000), document("s95", 0.95, 500_000, fooled=5)]
    made = card.card(documents)
    assert made.cheapest.name == "s90" and "smallest" in card.verdict(made), "s95 loses five points"
    times = timing(dense=9.0, s50=2.0, s90=3.0, s95=1.0)
    made = card.card(documents, [times])
    assert made.cheapest.name == "s50" and "fastest" in card.verdict(made)
    assert made.columns[0].milliseconds == {"1 text, mixed lengths, 2 threads, a CPU": 9.0}, "torch is not on the card"
    made = card.card(documents, [timing(s90=3.0)])
    assert made.cheapest.name == "s90" and "smallest" in card.verdict(made), "not all of them were timed"
    made = card.card([document("s95", 0.95, 500_000, fooled=5)])
    assert made.cheapest is None and card.verdict(made).startswith("No model")


def test_without_a_dense_model_or_attacks_there_is_a_card_and_no_star():
    alone = document()
    alone["about"]["dense"] = None
    assert [column.name for column in card.card([alone]).columns] == ["s50"] and card.verdict(card.card([alone])) == ""
    plain = document() | {"attacks": None}
    assert card.card([plain]).cheapest is None and card.verdict(card.card([plain])) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(task="sst2"), "the same task, got 'mr' and 'sst2'"),
        (lambda d: d.update(n=19), "the same n"),
        (lambda d: d["about"].update(data="other"), "the same examples"),
        (lambda d: d.update(max_length=8), "the same max_length, got None and 8"),
        (lambda d: d["domains"]["imdb"].update(data="other"), "the same examples of imdb"),
        (lambda d: d["domains"]["imdb"].update(max_length=64), "the same max_length of imdb, got 128 and 64"),
        (lambda d: d["domains"]["imdb"].pop("data"), "make them anew with this version|KeyError 'data'"),
        (lambda d: d["attacks"]["textfooler"].update(temperature=1.5), "the same confidence under textfooler"),
        (lambda d: d["about"]["dense"].update(content_sha256="other"), "the same dense model"),
        (lambda d: d["attacks"]["textfooler"].update(variant="other"), "the same attack textfooler"),
        (lambda d: d["about"].update(model=facts("s50", 0.5, 1)), "is there twice"),
        (lambda d: d.update(about=None), "must say what they are of"),
    ],
)
def test_what_does_not_compare_is_refused(change, said):
    other = document("s90", 0.9)
    change(other)
    with pytest.raises(InputError, match=said):
        card.card([document(), other])


def test_each_evaluation_must_compare_with_all_others_not_with_the_first_alone():
    alone, other = document("s30", 0.3), document("s90", 0.9)
    alone["about"]["dense"], alone["attacks"] = None, None
    other["about"]["dense"]["content_sha256"] = "other"
    with pytest.raises(InputError, match="the same dense model, got 'content of dense' and 'other'"):
        card.card([alone, document(), other])
    other = document("s90", 0.9)
    other["attacks"]["textfooler"]["variant"] = "other"
    with pytest.raises(InputError, match="the same attack textfooler"):
        card.card([alone, document(), other])


def test_an_attack_with_the_confidence_of_the_dense_model_says_so_wherever_it_is_shown():
    matched = document()
    matched["attacks"]["textfooler"]["temperature"] = 1.25
    made = card.card([matched])
    assert "under textfooler, confidence matched" in made.lines and "under textfooler" not in made.lines
    page = saving.model_card("m", matched, made)
    said = "logits divided by 1.2500, for the dense model's confidence"
    assert f"* attack: textfooler (toy); {said}" in page
    (under,) = (result for result in saving._results(matched) if "under textfooler" in result["dataset"]["name"])
    assert said in under["dataset"]["args"]["attack"]
    assert "divided" not in saving.model_card("m", document(), card.card([document()]))


def test_a_timing_of_another_model_is_refused():
    with pytest.raises(InputError, match="one is of none"):
        card.card([document()], [timing(other=1.0)])


def test_documents_without_a_field_or_with_another_type_are_refused_or_shown(tmp_path, monkeypatch):
    # Without the 5 MB of plotly's script in each page.
    monkeypatch.setattr(trade_off, "write_page", lambda path, title, body: path.write_text(title + body))
    whole = document()
    shown = {}
    for name in whole:
        for value in (None, "text", [], 0.5):
            path = tmp_path / f"{name}-{value}.html"
            try:
                trade_off.write_trade_off(path, [copy.deepcopy(whole) | {name: value}])
                shown.setdefault(name, []).append(value)
            except InputError:
                assert not path.exists()
    assert "about" not in shown, "what the card cannot do without"
    assert None in shown["attacks"] and None in shown["domains"], "what need not have been evaluated"
    for name in ("attacks", "about", "metric", "split", "outside"):
        with pytest.raises(InputError, match="sparsebert eval --json"):
            card.card([{key: value for key, value in whole.items() if key != name}])
    with pytest.raises(InputError, match="bench"):
        card.card([whole], [{"rows": [{}]}])


def test_worst_flips_are_each_shown_once_with_a_reason():
    found = worst(rows({0, 1, 2, 3, 4, 5, 19}), rows({0, 1, 2}))
    assert [row["why"] for row in found] == ["the dense model resists"] * 3 + ["fewest words"] * 3 + [
        "surest of the wrong label"
    ]
    assert [row["id"] for row in found] == [3, 19, 4, 0, 1, 5, 2]
    assert worst(rows(set())) == []


def test_the_fewest_words_are_counted_without_punctuation():
    one, two = ("bad film , . ! ? - ' ; :", 0.5), ("ten plain words are in this text and two changed", 0.2)
    shared = {"unit": "", "label": "negative", "outcome": "succeeded", "perturbed": "", "queries": 1, "score": 0.6}
    texts = [two, two, two, one]
    found = worst([shared | {"id": i, "original": t, "words_changed": share} for i, (t, share) in enumerate(texts)])
    assert [row["id"] for row in found if row["why"] == "fewest words"] == [3, 0, 1]


def test_the_facts_of_a_model_count_its_zeros_and_what_it_takes_without_them(tmp_path):
    model = classifier()
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    with torch.no_grad():
        weight[:, ::2] = 0
    found = card.facts(saved(tmp_path / "m", model))
    linears = [p for name, p in model.named_parameters() if ".layer." in name and p.ndim == 2]
    assert found["sparsity"] == sum(int((p == 0).sum()) for p in linears) / sum(p.numel() for p in linears)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    sizes = [min(4 * p.numel(), 4 * int((p != 0).sum()) + -(-p.numel() // 8)) for p in model.parameters()]
    assert found["bytes"] == sum(sizes) and found["dtype"] == "f32" and found["method"] is None


# --- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text outside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        self.text += "" if self.inside else text


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two models of awkward names, attacked on texts with a script in them."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    evil = document(f"s90 {EVIL}", 0.9, 1_000_000)
    trade_off.write_trade_off(path, [document(), evil], [timing(dense=9.0, s50=2.0)])
    return path


def test_the_page_fetches_nothing_and_what_it_shows_is_inert(page):
    found = Page(page.read_text())
    assert not [(tag, a) for tag, a in found.tags if {"src", "href", "srcset", "data", "action"} & a.keys()]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    assert sum(tag == "table" for tag, _ in found.tags) == 3 and sum(tag == "del" for tag, _ in found.tags) > 3
    assert EVIL in found.text and "good" in found.text and "sparsebert replay 000000000003" in found.text
    scripts = [a for tag, a in found.tags if tag == "script"]
    assert len(scripts) <= 1 + 2 * 2, "plotly, and those of two charts"
    assert "@import" not in page.read_text().split("</style>")[0]
    assert "encoder" in found.text and "0" * 64 in found.text and "d" * 64 in found.text


MEASURE = """({
  title: document.title, wide: document.documentElement.scrollWidth, window: innerWidth,
  charts: document.querySelectorAll(".main-svg").length, bars: document.querySelectorAll(".bars .point").length,
  whiskers: document.querySelectorAll(".errorbar").length,
  owned: document.querySelectorAll("p script, td script").length,
})"""


def test_in_a_browser_at_phone_width_without_network_the_charts_are_drawn_and_nothing_sticks_out(page, tmp_path):
    with tab(page.as_uri(), tmp_path / "profile", width=390) as shown:
        shown.until("document.querySelectorAll('.bars .point').length == 9")
        found = shown.value(MEASURE)
        assert not shown.errors
    assert found["window"] == 390 and found["wide"] <= 390, "no scrolling sideways"
    assert found["title"] == "sparsebert: mr" and found["owned"] == 0, "the script in a text has not run"
    assert found["charts"] >= 2 and found["whiskers"] >= 9


def test_a_report_is_written_over_a_report_only(page, tmp_path, capsys):
    (tmp_path / "eval.json").write_text("a table\n" + json.dumps(document()) + "\n")
    own = tmp_path / "own.html"
    own.write_text("<html>my thesis</html>")
    command = ("report", tmp_path / "eval.json", "--json", "-o")
    assert "is no report" in refused(capsys, *command, own) and own.read_text() == "<html>my thesis</html>"
    assert "must end in .html" in refused(capsys, *command, tmp_path / "report.pdf")
    for _ in range(2):
        code, out, _ = run(capsys, *command, tmp_path / "report.html")
        assert code == 0 and json.loads(out)["cheapest"] == "models/s50"
    assert (tmp_path / "report.html").stat().st_size > 1_000_000, "plotly is inline"


def test_files_that_hold_no_evaluation_are_refused_and_nothing_is_written(tmp_path, capsys):
    for name, text, said in (
        ("empty", "", "must hold"), ("text", "no JSON", "must hold"), ("list", "[]", "holds no object"),
        ("other", '{"a": 1}', "sparsebert eval --json"), ("deep", "[" * 100_000, "must hold"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        assert said in refused(capsys, "report", tmp_path / name, "-o", tmp_path / "r.html")
    assert "must hold" in refused(capsys, "report", tmp_path / "absent", "-o", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


# --- beside the model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(folder, command): a pruned and a dense model, and the command that evaluates one beside the other."""
    folder = tmp_path_factory.mktemp("evaluated")
    saved(folder / "dense", classifier(seed=3))
    model = classifier(seed=3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layer." in name and weight.ndim == 2:
                weight[weight.abs() < 0.3] = 0
    saved(folder / "model", model)
    (folder / "texts").mkdir()
    texts = ["a gripping film of rare beauty", "a tedious mess", "warm and splendid", "it drags on and on"]
    lines = [f"{text},{label}" for text, label in zip(texts, ["positive", "negative"] * 2, strict=True)]
    (folder / "texts" / "test.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    command = ["eval", folder / "model", "--task", folder / "texts", "--vs", folder / "dense", "--device", "cpu"]
    return folder, [*command, "--json"]


def test_eval_saves_figures_rows_and_a_model_card_beside_the_model_which_stays_verified(evaluated, capsys):
    folder, command = evaluated
    attacked = ["--attacks", "deepwordbug", "--ledger", folder / "l.sqlite"]
    code, out, err = run(capsys, *command, *attacked, "--save", "--report", folder / "r.html")
    assert code == 0, err
    found = json.loads(out)
    assert "attacked" not in found and found["about"]["model"]["directory"] == str(folder / "model")
    assert json.loads((folder / "model" / saving.FIGURES).read_text()) == found
    rows = pyarrow.parquet.read_table(folder / "model/sparsebert/attacks-deepwordbug.parquet").to_pylist()
    assert len(rows) == 4 == found["attacks"]["deepwordbug"]["n"]
    checkpoint.load(folder / "model")

    index = ModelCard.load(folder / "model/README.md").data.eval_results
    values = {result.metric_name: result.metric_value for result in index}
    under = found["attacks"]["deepwordbug"]
    assert values == {"accuracy": found["accuracy"], "accuracy under deepwordbug": under["aua"]}
    assert {result.dataset_split for result in index} == {"test"}
    assert under["variant"] in (folder / "model/README.md").read_text()
    assert Page((folder / "r.html").read_text()).text.count("deepwordbug") > 1

    for flags in (["--field", "text_b"], ["--workers", 2], ["--max-queries", 1]):
        assert "is a setting of attacks, and none is asked for; add --attacks" in refused(capsys, *command, *flags)
    alone = ["attack", folder / "model", "--task", folder / "texts", "--attack", "deepwordbug"]
    assert "No such option: --match-confidence" in refused(capsys, *alone, "--match-confidence")

    page = folder / "of-a-directory.html"
    code, out, err = run(capsys, "report", folder / "model", "-o", page, "--json")
    assert code == 0 and "under deepwordbug" in out, err
    assert "must hold" in refused(capsys, "report", folder / "dense", "-o", page)

    code, _, err = run(capsys, *command, "--save")
    assert code == 0 and not list((folder / "model/sparsebert").glob("attacks-*")), "rows that the figures lack"
    assert "accuracy under" not in (folder / "model/README.md").read_text()


def test_a_readme_of_the_users_own_is_left_alone(evaluated, capsys):
    folder, command = evaluated
    readme = folder / "model/README.md"
    readme.write_text("# My model\n")
    code, _, err = run(capsys, *command, "--save")
    assert code == 0 and readme.read_text() == "# My model\n" and f"saved: {folder / 'model' / saving.CARD}" in err
    assert "model-index" in (folder / "model" / saving.CARD).read_text()
    readme.unlink()


def test_where_nothing_can_be_written_is_said_before_any_work(evaluated, capsys, tmp_path):
    folder, command = evaluated
    (tmp_path / "own.html").write_text("mine")
    assert "is no report" in refused(capsys, *command, "--report", tmp_path / "own.html")
    assert "must hold" in refused(capsys, *command, "--save", "--timing", tmp_path / "absent.json")
    assert "--report and --save" in refused(capsys, *command, "--timing", tmp_path / "absent.json")
    (folder / "model").chmod(0o555)
    try:
        assert "read-only" in refused(capsys, *command, "--save")
    finally:
        (folder / "model").chmod(0o755)

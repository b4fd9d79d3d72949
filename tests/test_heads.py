"""heads: labels are matched by name, and the divergence, loss, link and metric of each problem type are right."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit, softmax

from sparsebert import heads
from sparsebert.errors import CheckpointError, InputError, UnsupportedError

NLI = ("entailment", "neutral", "contradiction")


def random_logits(n: int, labels: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, labels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("order", [*itertools.permutations(NLI)])
def test_columns_put_logits_into_the_wanted_order_whatever_the_models_order(order):
    at = heads.columns(order, NLI)
    assert [order[i] for i in at] == list(NLI)


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (("NEGATIVE", "POSITIVE"), ("negative", "positive")),
        (("Pos", "Neg"), ("negative", "positive")),
        (("non-entailment", "Entailment"), ("entailment", "not_entailment")),
        (("not_duplicate", "duplicate"), ("different", "paraphrase")),
        (("equivalent", "not_equivalent"), ("different", "paraphrase")),
        (("REFUTED", "SUPPORTED"), ("SUPPORTS", "REFUTES")),
        (("sci-tech", "World", "business", "SPORTS"), ("World", "Sports", "Business", "Sci/Tech")),
        (("+", "-"), ("-", "+")),
        (("好", "差"), ("差", "好")),
    ],
)
def test_case_punctuation_and_aliases_are_folded(model, task):
    at = heads.columns(model, task)
    assert sorted(at) == list(range(len(task)))
    assert [heads.fold(model[i]) for i in at] == [heads.fold(name) for name in task]


@pytest.mark.parametrize(
    ("model", "task", "says"),
    [
        (("LABEL_0", "LABEL_1"), ("negative", "positive"), "does not name its labels (LABEL_0, LABEL_1)"),
        (("0", "1"), ("negative", "positive"), "reseal DIR --labels"),
        (("negative", "neutral", "positive"), ("negative", "positive"), "has 3 labels"),
        (("joy", "anger"), ("negative", "positive"), "has the labels joy, anger"),
        (("negative", "Neg"), ("negative", "positive"), "has the labels negative, Neg"),
        (NLI, ("LABEL_0", "LABEL_1"), "has 3 labels"),
        (NLI, ("1", "2"), "and no 0: they may count from 1"),
        (NLI, ("1", "2", "3"), "write the labels by name"),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("1", "2"), "as LABEL_1"),
    ],
)
def test_what_does_not_match_is_refused(model, task, says):
    with pytest.raises(InputError) as caught:
        heads.columns(model, task)
    assert says in str(caught.value)


def test_numbers_in_a_file_are_the_models_own_ids():
    assert heads.columns(("positive", "negative"), ("LABEL_0", "LABEL_1")).tolist() == [0, 1]


def test_numbers_without_a_0_are_names_of_a_model_that_has_them():
    assert heads.columns(("5", "1", "3"), ("1", "3", "5")).tolist() == [1, 2, 0]


@given(st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=6, unique_by=heads.fold), st.randoms())
def test_any_shuffle_of_distinct_names_is_undone(names, random):
    shuffled = random.sample(names, len(names))
    if not heads.are_anonymous(names) and not heads.are_anonymous(shuffled):
        assert [shuffled[i] for i in heads.columns(shuffled, names)] == names


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, heads.SINGLE_LABEL),
        ({"id2label": {"0": "a"}}, heads.ONE_LOGIT),
        ({"num_labels": 1}, heads.ONE_LOGIT),
        ({"id2label": {"0": "a"}, "problem_type": "regression"}, heads.ONE_LOGIT),
        ({"problem_type": "multi_label_classification"}, heads.MULTI_LABEL),
        ({"problem_type": "single_label_classification", "id2label": {"0": "a", "1": "b"}}, heads.SINGLE_LABEL),
    ],
)
def test_problem_of_a_config(config, problem):
    assert heads.problem_of(config) is problem


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ({"architectures": ["RobertaForQuestionAnswering"]}, "spans"),
        ({"problem_type": "ranking"}, "'ranking'"),
        ({"problem_type": ["regression"]}, "problem_type"),
        ({"problem_type": "regression"}, "2 labels"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "1 labels"),
    ],
)
def test_other_heads_are_refused_by_name(config, says):
    with pytest.raises(UnsupportedError, match=says):
        heads.problem_of(config)


@pytest.mark.parametrize("classes", [1, "BertForTokenClassification", [None], {"a": "b"}])
def test_classes_that_are_no_list_of_names_are_named(classes):
    with pytest.raises(CheckpointError, match=r"config.json: architectures must be a list of names of classes, got"):
        heads.problem_of({"architectures": classes})


def test_label_names_fill_in_what_config_does_not_say_and_refuse_what_is_no_name():
    assert heads.label_names({}) == ("LABEL_0", "LABEL_1")
    assert heads.label_names({"id2label": {0: "a", "1": "b"}}) == ("a", "b")
    for wrong in ({"0": None, "1": "b"}, {"0": "a", "2": "b"}, {"0": {"x": 1}, "1": "b"}):
        with pytest.raises(InputError, match="id2label"):
            heads.label_names({"id2label": wrong})


def test_single_label_divergence_is_the_kl_of_softmax_and_blind_to_shifts():
    p, q = random_logits(50, 4), random_logits(50, 4, seed=1)
    want = stats.entropy(softmax(p.numpy(), 1), softmax(q.numpy(), 1), axis=1)
    np.testing.assert_allclose(heads.SINGLE_LABEL.divergence(p, q, 1.0), want, rtol=1e-10)
    np.testing.assert_allclose(heads.SINGLE_LABEL.divergence(p, q + 7, 1.0), want, rtol=1e-10)


def test_multi_label_divergence_is_the_sum_of_bernoulli_kls_and_sees_shifts():
    p, q = random_logits(50, 3), random_logits(50, 3, seed=1)
    want = sum(
        stats.entropy([expit(a), expit(-a)], [expit(b), expit(-b)], axis=0)
        for a, b in zip(p.numpy().T, q.numpy().T, strict=True)
    )
    np.testing.assert_allclose(heads.MULTI_LABEL.divergence(p, q, 1.0), want, rtol=1e-8)
    assert (heads.MULTI_LABEL.divergence(p, p + 1, 1.0) > 0).all()


def test_one_logit_divergence_is_a_gaussian_kl_in_units_of_the_references_spread():
    p, q = random_logits(50, 1), random_logits(50, 1, seed=1)
    spread = heads.ONE_LOGIT.spread(p)
    assert spread == pytest.approx(float(p.var(unbiased=False)))
    got = heads.ONE_LOGIT.divergence(p, q, spread)
    np.testing.assert_allclose(got, (p - q)[:, 0] ** 2 / (2 * spread), rtol=1e-12)
    scaled = heads.ONE_LOGIT.divergence(100 * p, 100 * q, heads.ONE_LOGIT.spread(100 * p))
    np.testing.assert_allclose(scaled, got, rtol=1e-10)  # the unit of the logit does not matter


@pytest.mark.parametrize("problem", [*heads.PROBLEMS.values()], ids=lambda p: p.name)
def test_divergence_is_0_from_itself_positive_else_finite_far_out_and_has_a_gradient(problem):
    labels = 1 if problem is heads.ONE_LOGIT else 3
    p, q = random_logits(20, labels), random_logits(20, labels, seed=1).requires_grad_()
    assert problem.divergence(p, p, 1.0).abs().max() < 1e-12
    assert (problem.divergence(p, q, 1.0) > 0).all()
    problem.divergence(p, q, 1.0).mean().backward()
    assert q.grad.abs().sum() > 0
    assert problem.divergence(200 * p, -200 * p, 1.0).isfinite().all()


def test_losses_are_those_that_transformers_takes():
    logits = random_logits(16, 3).float()
    labels = torch.arange(16) % 3
    assert heads.SINGLE_LABEL.loss(logits, labels) == torch.nn.CrossEntropyLoss()(logits, labels)
    several = (random_logits(16, 3, seed=2) > 0).float()
    assert heads.MULTI_LABEL.loss(logits, several) == torch.nn.BCEWithLogitsLoss()(logits, several)
    values = random_logits(16, 1, seed=3)[:, 0].float()
    assert heads.ONE_LOGIT.loss(logits[:, :1], values) == torch.nn.MSELoss()(logits[:, 0], values)


def test_links_are_probabilities_or_the_logit_itself():
    logits = np.array([[1e4, -1e4, 0.0], [0.3, 0.2, 0.1]], dtype=np.float32)
    np.testing.assert_allclose(heads.SINGLE_LABEL.link(logits), softmax(logits.astype(float), 1), atol=1e-12)
    np.testing.assert_allclose(heads.MULTI_LABEL.link(logits), expit(logits.astype(float)), atol=1e-12)
    assert heads.ONE_LOGIT.link(logits[:, :1]).tolist() == logits[:, :1].astype(float).tolist()


def test_metrics():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, -1.0]])
    assert heads.SINGLE_LABEL.metric(logits, np.array([0, 0, 0])) == pytest.approx(2 / 3)
    labels = np.array([[1, 0], [0, 1], [1, 1]])
    assert heads.MULTI_LABEL.metric(logits, labels) == pytest.approx(2 * 3 / (4 + 4))
    assert heads.ONE_LOGIT.metric(logits[:, :1], np.array([5.0, 1.0, 9.0])) == pytest.approx(1.0)
    assert heads.ONE_LOGIT.metric(logits[:, :1], np.array([5.0, 9.0, 1.0])) == pytest.approx(-1.0)
    assert heads.ONE_LOGIT.metric(np.zeros((3, 1)), np.array([1.0, 2.0, 3.0])) == 0.0


def test_metrics_of_nothing_to_find():
    none = np.zeros((2, 3), dtype=bool)
    assert heads.MULTI_LABEL.metric(np.full((2, 3), -1.0), none) == 1.0  # no label is there, and none was predicted
    assert heads.MULTI_LABEL.metric(np.full((2, 3), 1.0), none) == 0.0
    assert heads.MULTI_LABEL.metric(np.full((2, 3), -1.0), ~none) == 0.0
    varied = np.array([[0.1], [0.2], [0.3]])
    assert heads.ONE_LOGIT.metric(varied, np.ones(3)) == 0.0
    assert heads.ONE_LOGIT.metric(varied, np.array([1.0, 3.0, 2.0])) == pytest.approx(0.5)  # ranks, not values


def test_predictions():
    logits = np.array([[2.0, 1.0, 0.0], [-1.0, -0.5, 0.25]], dtype=np.float32)
    assert heads.SINGLE_LABEL.predict(logits).tolist() == [0, 2]
    assert heads.MULTI_LABEL.predict(logits).tolist() == [[True, True, False], [False, False, True]]
    found = heads.ONE_LOGIT.predict(logits[:, :1])
    assert found.tolist() == [2.0, -1.0] and found.dtype == np.float64


def test_only_one_logit_is_measured_in_units_of_its_spread():
    logits = np.array([[1.0], [3.0], [5.0]])
    assert heads.ONE_LOGIT.spread(logits) == pytest.approx(8 / 3)
    assert heads.ONE_LOGIT.spread(np.ones((3, 1))) == 1.0  # a spread of 0 would not be a unit
    assert heads.SINGLE_LABEL.spread(logits) == heads.MULTI_LABEL.spread(logits) == 1.0


@pytest.mark.parametrize(
    ("config", "count"),
    [({}, 2), ({"num_labels": 5}, 5), ({"id2label": {"0": "a"}, "num_labels": 5}, 1), ({"id2label": {}}, 2)],
)
def test_labels_are_counted_by_their_names_before_their_number(config, count):
    assert heads.label_count(config) == len(heads.label_names(config)) == count


def test_a_message_lists_six_labels_at_most():
    many = [f"class {c}" for c in "abcdefgh"]
    with pytest.raises(InputError) as caught:
        heads.columns(many, NLI, whose="the dense model")
    assert "the dense model has 8 labels (class a, class b, class c, class d, class e, class f, …)" in str(caught.value)
    assert "3 are wanted (entailment, neutral, contradiction)" in str(caught.value)
    with pytest.raises(InputError) as caught:
        heads.columns(many[:6], ["x" * 99, *many[1:6]])
    assert "class f, wanted" in str(caught.value) and f"wanted are {'x' * 40}, class b" in str(caught.value)


def test_two_labels_of_one_name_are_refused():
    with pytest.raises(InputError, match="id2label gives the name 'a' to several labels; give each its own name"):
        heads.label_names({"id2label": {"0": "a", "1": "b", "2": "a"}})

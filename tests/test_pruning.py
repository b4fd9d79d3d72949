from __future__ import annotations

import functools
import gc
from dataclasses import replace
from fractions import Fraction

import greenlet
import pytest
import torch
from models import classifier, saved, tokenizer

from sparsebert import checkpoint, data, encoders, patterns
from sparsebert.config import PruneConfig
from sparsebert.errors import InputError, OutputError, UnsupportedError
from sparsebert.pruning import draw, prune, prune_checkpoint
from sparsebert.pruning.methods import LABEL_FREE
from sparsebert.pruning.plan import plan_model
from sparsebert.pruning.solve import Quadratic
from sparsebert.pruning.stages import stages

MR = data.load(data.get_task("mr"), "train")
CONFIGS = [{"method": method} for method in LABEL_FREE] + [
    {"method": "knowledge", "tier": 0},
    {"method": "adaptive", "as_published": True},
    {"method": "magnitude", "scope": "global"},
]


def drawn(tokens=1500, seed=0, kind="bert"):
    return draw(classifier(kind), tokenizer(kind), MR, tokens, 128, seed)


calibration = functools.cache(drawn)  # no test changes the result; a draw tokenizes at least 1024 texts


@pytest.fixture
def short_distillation(monkeypatch):
    """A tenth of the steps, a quarter of the batch, as many checks on held-out texts: every part of it runs."""
    for name, value in {"STEPS": 30, "CHECK_EVERY": 5, "BATCH": 32}.items():
        monkeypatch.setattr(f"sparsebert.pruning.distillation.{name}", value)


def zeros(model) -> dict[str, int]:
    return {name: int((m.weight == 0).sum()) for name, m in encoders.encoder_linears(model).items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.875, 0.96])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: " ".join(map(str, c.values())))
def test_the_budget_is_met_exactly(config, sparsity):
    model = classifier()
    tokens = 17_000 if config.get("as_published") else 1500  # it needs 256 texts of 64 tokens
    result = prune(model, calibration(tokens), PruneConfig(sparsity=sparsity, **config))
    linears = encoders.encoder_linears(model)
    assert len(linears) == 12 and result.density.keys() == linears.keys()
    sizes = {name: m.weight.numel() for name, m in linears.items()}
    got = zeros(model)
    uniform = {name: patterns.zeros_in(n, sparsity) for name, n in sizes.items()}
    if config.get("scope") == "global":
        assert sum(got.values()) == patterns.zeros_in(sum(sizes.values()), sparsity)
    elif config["method"] == "knowledge" and config.get("tier") != 0:  # allotted: only the sum is fixed
        assert sum(got.values()) == patterns.zeros_in(sum(sizes.values()), sparsity)
    elif config["method"] == "wanda" or config == {"method": "adaptive"}:  # the same number in each row
        for name, m in linears.items():
            assert (m.weight == 0).sum(1).unique().tolist() == [patterns.zeros_in(m.in_features, sparsity)], name
    elif config.get("as_published"):  # one too few per row, of weights and bias together
        for name, m in linears.items():
            row = (m.weight == 0).sum(1) + (m.bias == 0)
            assert row.unique().tolist() == [max(0, int((m.in_features + 1) * sparsity) - 1)], name
    else:
        assert got == uniform


def test_padded_batches_hold_as_many_tokens_as_were_asked_for():
    texts = calibration(40_000)
    batches = texts.padded_batches
    assert [batch["input_ids"].shape for batch in batches] == [(256, 64)] * 2  # 624 texts of 64 tokens
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert real < 512 * 64
    config = PruneConfig(method="adaptive", as_published=True, sparsity=0.5)
    assert prune(classifier(), texts, config).tokens == real
    with pytest.raises(InputError, match="16384 in total"):
        _ = calibration(16_000).padded_batches


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8x1", "8x1/8", "8:2:8"])
@pytest.mark.parametrize("method", LABEL_FREE)
def test_every_method_places_every_pattern(method, pattern):
    model = classifier()
    wanted = patterns.parse(pattern)
    config = PruneConfig(method=method, pattern=pattern, sparsity=0.7 if "x" in pattern else None)
    if method == "knowledge":
        config = config.model_copy(update={"tier": 0})
    if (method, pattern) == ("sparsegpt", "8x1/8"):
        with pytest.raises(UnsupportedError, match="cannot keep columns in multiples"):
            prune(model, calibration(), config)
        return
    prune(model, calibration(), config)
    for name, m in encoders.encoder_linears(model).items():
        kept = m.weight != 0
        n_out, n_in = kept.shape
        if isinstance(wanted, patterns.NofM):
            assert (kept.view(n_out, -1, wanted.m).sum(2) == wanted.n).all(), name
        elif isinstance(wanted, patterns.VNM):
            blocks = kept.view(n_out // wanted.v, wanted.v, -1, wanted.m)
            assert (blocks.sum(3) == wanted.n).all() and (blocks.any(1).sum(2) <= 4).all(), name
        else:
            groups = kept.unique(dim=0, return_counts=True)
            assert all(count % wanted.rows == 0 for count in groups[1].tolist()), name
            assert (groups[0].sum(1) % wanted.kept_multiple == 0).all(), name
            if method != "wanda" and method != "adaptive":  # these two give every group the same number
                assert int(kept.sum()) == patterns.kept_in(wanted, n_out, n_in, 0.7), name


@pytest.mark.parametrize("method", LABEL_FREE)
def test_what_is_not_pruned_stays(method):
    model, untouched = classifier(), classifier()
    prune(model, calibration(), PruneConfig(method=method))
    may_change = {f"{name}.{part}" for name in encoders.encoder_linears(model) for part in ("weight", "bias")}
    if method in ("adaptive", "knowledge"):
        may_change |= {f"{name}.{part}" for name in ("bert.pooler.dense", "classifier") for part in ("weight", "bias")}
    for (name, a), b in zip(model.named_parameters(), untouched.parameters(), strict=True):
        if name not in may_change:
            assert torch.equal(a, b), name
        elif name.endswith("weight"):
            assert not torch.equal(a, b), name


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "16x1", "8:2:16"])
@pytest.mark.parametrize("method", LABEL_FREE)
def test_a_plan_says_the_zeros_that_are_made(method, pattern):
    model, sparsity = classifier(), None if ":" in pattern else 0.7
    config = PruneConfig(method=method, pattern=pattern, sparsity=sparsity)
    planned = plan_model(model, config, speed=1e12)
    prune(model, calibration(), config)
    about = 0.01 if method == "knowledge" else 0  # an allotment rounds the sum, not each linear
    assert sum(zeros(model).values()) == pytest.approx(planned.zeros, rel=about)


def test_zeros_are_counted_in_decimal_or_exactly():
    assert patterns.zeros_in(100, 0.29) == 29  # 0.29 * 100 is 28.999… in binary
    assert patterns.zeros_in(10, 0.9) == 9
    assert patterns.zeros_in(7, 0.5) == 3
    assert patterns.zeros_in(49, Fraction(48, 49)) == 48


@pytest.mark.parametrize("text", ["unstructured", "2:4", "32:64", "16x1", "32x1/32", "64:2:16"])
def test_a_pattern_is_spelled_one_way(text):
    assert str(patterns.parse(text)) == text


def test_magnitude_keeps_the_largest_of_each_linear():
    model, before = classifier(), classifier()
    prune(model, None, PruneConfig(method="magnitude", sparsity=0.75))
    for name, module in encoders.encoder_linears(model).items():
        old = before.get_submodule(name).weight
        kept = module.weight != 0
        assert torch.equal(module.weight[kept], old[kept])
        assert old[kept].abs().min() >= old[~kept].abs().max()


def test_global_magnitude_keeps_the_largest_of_all():
    model, before = classifier(), classifier()
    prune(model, None, PruneConfig(method="magnitude", scope="global", sparsity=0.75))
    pairs = [(m.weight, before.get_submodule(name).weight) for name, m in encoders.encoder_linears(model).items()]
    kept = torch.cat([(new != 0).flatten() for new, _ in pairs])
    old = torch.cat([weight.flatten() for _, weight in pairs]).abs()
    assert old[kept].min() >= old[~kept].max()


STAGES = {
    "bert": ["query key value", "dense", "dense", "dense"],
    "roberta": ["query key value", "dense", "dense", "dense"],
    "electra": ["query key value", "dense", "dense", "dense"],
    "distilbert": ["q_lin k_lin v_lin", "out_lin", "lin1", "lin2"],
}
HEADS = {
    "bert": ["dense", "classifier"],
    "roberta": ["dense", "out_proj"],
    "electra": ["dense", "out_proj"],
    "distilbert": ["pre_classifier", "classifier"],
}


def without_types(batches):
    return [{k: v for k, v in b.items() if k != "token_type_ids"} for b in batches]


@pytest.mark.parametrize("kind", STAGES)
def test_stages_follow_execution_and_share_inputs(kind):
    batches = without_types(calibration(kind=kind).batches)
    found = list(stages(classifier(kind), batches, heads=True))
    named = [" ".join(name.rpartition(".")[2] for name in stage.linears) for stage in found]
    assert named == 2 * STAGES[kind] + HEADS[kind]
    assert [stage.head for stage in found] == [False] * 8 + [True] * 2
    assert found[0].moments.tokens == sum(batch["input_ids"].numel() for batch in batches)
    assert found[-1].moments.tokens == sum(len(batch["input_ids"]) for batch in batches)


def direct_moments(dense, sparse, batches, name, weights=None):
    """The definition: runs both whole models, centres, averages."""
    seen = {}
    handles = [
        dense.get_submodule(name).register_forward_hook(
            lambda _m, _a, out: seen.setdefault("y", []).append(out.double().flatten(0, -2))
        ),
        sparse.get_submodule(name).register_forward_hook(
            lambda _m, a, _o: seen.setdefault("x", []).append(a[0].double().flatten(0, -2))
        ),
    ]
    with torch.inference_mode():
        for batch in batches:
            dense(**batch)
            sparse(**batch)
    for handle in handles:
        handle.remove()
    x, y = torch.cat(seen["x"]), torch.cat(seen["y"])
    w = torch.ones(len(x)) if weights is None else torch.cat([part.flatten() for part in weights])
    w = (w / w.sum()).double()
    x0, y0 = x - w @ x, y - w @ y
    return w @ x, w @ y, (x0 * w[:, None]).T @ x0, (y0 * w[:, None]).T @ x0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", STAGES)
def test_moments_come_from_sparse_predecessors_and_dense_targets(kind, weighted):
    dense, model, batches = (
        classifier(kind),
        classifier(kind),
        without_types(calibration(700, kind=kind).batches),
    )
    names = list(encoders.encoder_linears(model))
    weights = {}
    if weighted:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.rand(batch["input_ids"].shape, generator=generator) for batch in batches]
        drawn[0][0] = 0.0
        weights = dict.fromkeys(names[1:], drawn)  # not the first, though it shares its input with others
    seen = 0
    for stage in stages(model, batches, weights=weights, heads=True):
        for name in stage.linears:
            mean_x, mean_y, gram, cross = direct_moments(dense, model, batches, name, weights.get(name))
            for got, want in (
                (stage.moments.mean_x, mean_x),
                (stage.mean_y(name), mean_y),
                (stage.moments.gram, gram),
                (stage.cross(name), cross),
            ):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
            seen += 1
        with torch.no_grad():  # the caller prunes, and later stages must see it
            for module in stage.linears.values():
                module.weight[:, ::2] = 0
    assert seen == 14
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_head_of_an_electra_with_narrow_embeddings_is_what_follows_its_encoder():
    """`embeddings_project`, a linear before the layers, is not of the head: it does not change, and the dense logits
    that the head is fitted to are those of the dense model.
    """
    model, batches = classifier("electra", embedding_size=16), calibration(kind="electra").batches
    with torch.no_grad():
        wanted = torch.cat([model(**batch).logits for batch in batches])
    heads = []
    for stage in stages(model, batches, heads=True):
        if stage.head:
            heads.append(stage)
        else:
            with torch.no_grad():
                for module in stage.linears.values():
                    module.weight.zero_()
    assert [name for stage in heads for name in stage.linears] == ["classifier.dense", "classifier.out_proj"]
    torch.testing.assert_close(heads[-1].examples[1], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["adaptive", "knowledge"])
def test_embeddings_that_are_projected_do_not_change(method):
    model, untouched = (classifier("electra", embedding_size=16) for _ in range(2))
    prune(model, calibration(kind="electra"), PruneConfig(method=method, sparsity=0.5))
    before = dict(untouched.named_parameters())
    projected = {name: p for name, p in model.named_parameters() if "embeddings_project" in name}
    assert len(projected) == 2 and all(torch.equal(p, before[name]) for name, p in projected.items())
    assert not torch.equal(model.classifier.out_proj.weight, before["classifier.out_proj.weight"])


def test_dense_inputs_are_measured_whatever_the_caller_changes():
    dense, model, batches = classifier(), classifier(), calibration().batches
    want = {name: stage.moments.gram for stage in stages(dense, batches) for name in stage.linears}
    for stage in stages(model, batches, sparse_inputs=False):
        for name, module in stage.linears.items():
            torch.testing.assert_close(stage.moments.gram, want[name])
            with torch.no_grad():
                module.weight.zero_()


def test_each_linear_is_evaluated_once_a_run(monkeypatch):
    model, batches = classifier(), calibration().batches
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: calls.append(w.shape) or linear(x, w, b))
    for _ in stages(model, batches):
        pass
    probes = 12  # one batch shows the order of the linears of a layer
    assert len(calls) == 2 * 12 * len(batches) + probes


def test_batches_have_no_padding_and_the_tokens_asked_for():
    texts = calibration(1500)
    assert all(batch["attention_mask"].all() for batch in texts.batches)
    tokens = sum(batch["input_ids"].numel() for batch in texts.batches)
    assert 1500 <= tokens < 1500 + 128
    assert not set(texts.texts.texts) & set(texts.held_out.texts) and len(texts.held_out) == 256
    assert drawn(1500).sha256 == texts.sha256 != drawn(1500, seed=1).sha256
    padded = tokenizer()(["a", "a b c"], padding=True, return_tensors="pt")
    with pytest.raises(InputError, match="no padding"):
        next(stages(classifier(), [dict(padded)]))


def kl_to_dense(model, n=200):
    tok, held_out = tokenizer(), data.load(data.get_task("mr"), "test", limit=n)
    logits = [torch.from_numpy(encoders.predict(m, tok, held_out, max_length=128)) for m in (classifier(), model)]
    p, q = (x.double().log_softmax(-1) for x in logits)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_methods_rank_as_they_should_on_a_small_model():
    kl = {}
    for method in ("magnitude", "sparsegpt", "adaptive", "knowledge"):
        model = classifier()
        prune(model, calibration(6000), PruneConfig(method=method, sparsity=0.6))
        kl[method] = kl_to_dense(model)
    assert kl["knowledge"] < kl["adaptive"] < kl["sparsegpt"] < kl["magnitude"]


@pytest.mark.parametrize("method", ["adaptive", "knowledge", "sparsegpt", "obs"])
def test_without_sparsity_the_function_stays(method):
    model = classifier()
    prune(model, calibration(6000), PruneConfig(method=method, sparsity=0.0, damping=1e-6))
    assert kl_to_dense(model) < 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "nope"}, "method must be one of knowledge, adaptive, obs, sparsegpt, wanda, magnitude"),
        ({"pattern": "nope"}, "pattern must be"),
        ({"pattern": "4:2"}, "pattern must be"),
        ({"pattern": "2:4", "sparsity": 0.875}, "pattern 2:4 implies sparsity 0.5, got 0.875"),
        ({"method": "adaptive", "tier": 1}, "--tier belongs to method knowledge"),
        ({"method": "obs", "as_published": True}, "--as-published belongs to method adaptive"),
        ({"method": "wanda", "scope": "global"}, "--scope belongs to method magnitude"),
        ({"method": "magnitude", "scope": "global", "pattern": "32x1"}, "unstructured only"),
        ({"method": "adaptive", "as_published": True, "pattern": "2:4"}, "unstructured only"),
        ({"without": "outputs", "tier": 0}, "--without must name steps of tier 0"),
        ({"without": "nope"}, "--without must name steps of tier 1"),
    ],
)
def test_what_no_method_can_do_is_refused_before_anything_is_read(config, message, tmp_path):
    with pytest.raises(InputError, match=message):
        prune_checkpoint("/nowhere", "mr", tmp_path / "out", PruneConfig(**config))


@pytest.mark.parametrize(
    ("pattern", "sparsity", "message"),
    [
        ("24x1", 0.5, "pattern 24x1 needs a multiple of 24 outputs, bert.encoder.layer.0.attention.self.query has 32"),
        ("32:48", None, "pattern 32:48 needs a multiple of 48 inputs"),
        ("8x1/24", 0.5, "pattern 8x1/24 needs a multiple of 24 inputs"),
        ("16x1/32", 0.9, r"leaves bert.encoder.layer.0.attention.self.query \[32, 32\] no weight at all"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused_before_a_weight_changes(pattern, sparsity, message):
    model, before = classifier(), classifier()
    with pytest.raises(InputError, match=message):
        prune(model, calibration(), PruneConfig(method="magnitude", pattern=pattern, sparsity=sparsity))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_too_few_calibration_tokens_name_the_layer_that_needs_more():
    with pytest.raises(InputError, match=r"as many tokens as bert.*output.dense has inputs, 64, got .*--calibration"):
        prune(classifier(), calibration(30), PruneConfig(method="sparsegpt"))


def test_activations_that_are_not_finite_name_the_linears():
    model = classifier()
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.output.LayerNorm.weight[3] = torch.nan
    with pytest.raises(InputError, match=r"calibration inputs of bert\.encoder\.layer\.1\.intermediate\.dense: "):
        prune(model, calibration(), PruneConfig(method="sparsegpt"))


def test_inputs_that_never_vary_are_pruned_first_and_break_nothing():
    model = classifier()
    with torch.no_grad():  # input 3 of every intermediate layer is 0
        for layer in model.bert.encoder.layer:
            layer.attention.output.LayerNorm.weight[3] = 0.0
            layer.attention.output.LayerNorm.bias[3] = 0.0
    for method in ("sparsegpt", "obs", "adaptive", "knowledge"):
        pruned = classifier()
        pruned.load_state_dict(model.state_dict())
        prune(pruned, calibration(), PruneConfig(method=method, sparsity=0.5))
        assert all(p.isfinite().all() for p in pruned.parameters())
        assert (pruned.bert.encoder.layer[0].intermediate.dense.weight[:, 3] == 0).all(), method


def test_a_singular_hessian_names_pivot_and_damping():
    singular = torch.diag(torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64))
    with pytest.raises(InputError, match=r"pivot 3 of 4 is not, with damping 0\.001.*--damping"):
        Quadratic(singular, 0.001).minimum(singular)


DEAD = {
    "nothing goes up": lambda model: model.bert.encoder.layer[1].intermediate.dense.weight,
    "no input of a layer varies": lambda model: model.bert.encoder.layer[0].output.LayerNorm.weight,
    "the encoder's output does not vary": lambda model: model.bert.encoder.layer[1].output.LayerNorm.weight,
    "nothing is pooled": lambda model: model.bert.pooler.dense.weight,
    "nothing is classified": lambda model: model.classifier.weight,
}
LOOKING = [{"method": "sparsegpt"}, {"method": "obs"}, {"method": "adaptive"}, {"method": "wanda"}] + [
    {"method": "knowledge", "tier": tier} for tier in (0, 1, 2)
]


@pytest.mark.parametrize("config", LOOKING, ids=lambda c: " ".join(map(str, c.values())))
@pytest.mark.parametrize("part", DEAD)
def test_a_model_with_a_part_that_is_dead_is_pruned(part, config, short_distillation):
    model = classifier()
    with torch.no_grad():
        DEAD[part](model).zero_()
    result = prune(model, calibration(), PruneConfig(sparsity=0.5, **config))
    assert result.sparsity >= 0.5 and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "config", [{"method": "adaptive"}, {"method": "knowledge", "tier": 0}], ids=lambda c: c["method"]
)
def test_what_a_linear_gives_is_kept_where_its_input_never_varies(config):
    model = classifier()
    block = model.bert.encoder.layer[0]
    with torch.no_grad():
        block.intermediate.dense.weight.zero_()
    x = block.intermediate.intermediate_act_fn(block.intermediate.dense.bias).detach()
    before, weight = block.output.dense(x).detach(), block.output.dense.weight.detach().clone()
    prune(model, calibration(), PruneConfig(sparsity=0.5, **config))
    x = block.intermediate.intermediate_act_fn(block.intermediate.dense.bias)
    torch.testing.assert_close(block.output.dense(x), before, atol=1e-5, rtol=1e-5)
    kept = block.output.dense.weight != 0
    torch.testing.assert_close(block.output.dense.weight[kept], weight[kept])


def test_without_any_variance_the_smallest_weights_go():
    q = Quadratic(torch.zeros(3, 3, dtype=torch.float64), 0.01)
    torch.testing.assert_close(q.h, 0.01 * torch.eye(3, dtype=torch.float64))
    weight = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(q.minimum(q.ridge * weight), weight)


def test_calibration_texts_that_are_all_the_same_are_refused():
    same = data.Examples("mr", "train", ["the one and only text of them"] * 400, None, None)
    for few in (same, same.take(range(5))):  # five are too few to hold any out
        with pytest.raises(InputError, match=r"texts must differ, all .* are 'the one and only text of them'"):
            draw(classifier(), tokenizer(), few, 1500, 128, 0)


def test_prune_checkpoint_is_reused_and_another_is_refused(tmp_path):
    source = saved(tmp_path / "dense")
    config = PruneConfig(calibration_tokens=800, sparsity=0.5, tier=0)
    first = prune_checkpoint(source, "mr", tmp_path / "out", config)
    assert "density" not in first.as_json() and len(first.as_json()["layers"]) == 12
    calls = []
    again = prune_checkpoint(source, "mr", tmp_path / "out", config, progress=lambda *_: calls.append(1))
    assert not calls and again == replace(first, reused=True) and not first.reused
    sha256 = checkpoint.weights_sha256(tmp_path / "out")
    changed = config.model_copy(update={"seed": 1, "sparsity": 0.6})
    with pytest.raises(
        OutputError, match=r"out was made with --seed 0, not 1; --sparsity 0\.5, not 0\.6; .*--overwrite"
    ):
        prune_checkpoint(source, "mr", tmp_path / "out", changed)
    assert checkpoint.weights_sha256(tmp_path / "out") == sha256
    prune_checkpoint(source, "mr", tmp_path / "out", config.model_copy(update={"seed": 1}), overwrite=True)
    assert checkpoint.weights_sha256(tmp_path / "out") != sha256
    settings = checkpoint.read_config(tmp_path / "out")["sparsebert"]
    assert (settings["method"], settings["pattern"], settings["sparsity"]) == ("knowledge", "unstructured", 0.5)


class Killed(Exception):
    pass


@pytest.mark.parametrize("tier", [0, 1])
def test_an_interrupted_run_goes_on_after_the_last_finished_layer(tmp_path, tier):
    source = saved(tmp_path / "dense")
    config = PruneConfig(calibration_tokens=800, sparsity=0.5, tier=tier)
    prune_checkpoint(source, "mr", tmp_path / "whole", config)

    def kill_in_the_second_layer(done, total, what=""):
        if what == "reconstruct" and done > 6:
            raise Killed

    with pytest.raises(Killed):
        prune_checkpoint(source, "mr", tmp_path / "out", config, progress=kill_in_the_second_layer)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "out.partial").glob("*.safetensors")] == ["bert.encoder.layer.0.safetensors"]
    told = []
    result = prune_checkpoint(
        source, "mr", tmp_path / "out", config, progress=lambda done, _total, what="": told.append((what, done))
    )
    assert next(done for what, done in told if what == "reconstruct") == 6  # the whole finished layer at once
    assert ("damage", 1) not in told and result.resumed
    assert checkpoint.weights_sha256(tmp_path / "out") == checkpoint.weights_sha256(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_unfinished_layers_of_other_settings_or_damaged_are_refused(tmp_path):
    source = saved(tmp_path / "dense")
    config = PruneConfig(calibration_tokens=800, sparsity=0.5, method="sparsegpt")
    prune_checkpoint(source, "mr", tmp_path / "whole", config)

    def kill_in_the_second_layer(done, total, what=""):
        if done > 6:
            raise Killed

    with pytest.raises(Killed):
        prune_checkpoint(source, "mr", tmp_path / "out", config, progress=kill_in_the_second_layer)
    with pytest.raises(OutputError, match=r"out\.partial holds an unfinished run with --method sparsegpt, not wanda"):
        prune_checkpoint(source, "mr", tmp_path / "out", config.model_copy(update={"method": "wanda"}))
    layer = tmp_path / "out.partial" / "bert.encoder.layer.0.safetensors"
    content = bytearray(layer.read_bytes())
    content[-1] ^= 4
    layer.write_bytes(content)
    with pytest.raises(OutputError, match=r"layer\.0\.safetensors is damaged"):
        prune_checkpoint(source, "mr", tmp_path / "out", config)
    prune_checkpoint(source, "mr", tmp_path / "out", config, overwrite=True)
    assert checkpoint.weights_sha256(tmp_path / "out") == checkpoint.weights_sha256(tmp_path / "whole")


def test_magnitude_asks_for_no_data(tmp_path):
    source = saved(tmp_path / "dense")
    result = prune_checkpoint(source, "fever_symm_v1", tmp_path / "out", PruneConfig(method="magnitude", sparsity=0.5))
    assert result.sparsity == 0.5
    with pytest.raises(InputError, match="no training split"):
        prune_checkpoint(source, "fever_symm_v1", tmp_path / "other", PruneConfig())


def test_a_pass_that_is_left_early_frees_its_batches():
    model = classifier()
    texts = draw(model, tokenizer(), MR, 400, 64, 0)

    def waiting() -> int:
        gc.collect()
        return sum(issubclass(type(thing), greenlet.greenlet) and bool(thing) for thing in gc.get_objects())

    before = waiting()
    walked = stages(model, texts.batches)
    next(walked)
    assert waiting() > before
    walked.close()
    assert waiting() == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_pass_gives_back_the_forwards_that_it_replaces():
    model = classifier()
    linear = next(iter(encoders.encoder_linears(model).values()))
    own = linear.forward = functools.partial(torch.nn.functional.linear, weight=linear.weight, bias=linear.bias)
    replaced = [linear.forward is not own for _ in stages(model, draw(model, tokenizer(), MR, 400, 64, 0).batches)]
    assert any(replaced) and linear.forward is own


def test_a_default_that_is_written_out_is_the_same_work(tmp_path):
    source, tokens = saved(tmp_path / "dense"), {"calibration_tokens": 200}
    prune_checkpoint(source, "mr", tmp_path / "out", PruneConfig(**tokens))
    assert prune_checkpoint(source, "mr", tmp_path / "out", PruneConfig(sparsity=0.875, tier=1, **tokens)).reused

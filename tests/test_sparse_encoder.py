"""sparse_encoder on every instruction set against its float64 reference; whole models are in test_engine.py."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import require

from sparsebert import environment
from sparsebert.errors import InputError
from sparsebert.ops import _dispatch
from sparsebert.ops.sparse_encoder import (
    EncoderLayer,
    PackedEncoder,
    clipped_inputs,
    sparse_encoder,
    sparse_encoder_ref,
)
from sparsebert.ops.sparse_matmul import (
    Linear,
    PackedInt8,
    Quantized,
    pack,
    pack_groups,
    pack_int8,
    pack_tiles,
    unpack,
)

VOCABULARY, MAX_LENGTH = 50, 520
# States are about 1 in size; two layers of sums of up to 520 float32 products.
TOLERANCE = 2e-5
# Around a vector and a panel of every instruction set, several batches of panels, and a text of several panels.
LENGTHS = ([1], [1, 1, 1], [5, 3], [7, 8, 9, 16, 17], [27, 1, 40, 9], [64, 65], [300, 20, 520, 7])
SHAPES = {
    "rows": {},
    "groups": {"form": pack_groups},
    "a projection": {"embedding": 20},
    "heads of no whole vector": {"hidden": 42, "heads": 6},
    "one head, a narrow layer": {"hidden": 64, "heads": 1, "intermediate": 17},
    "relu": {"activation": "relu"},
    "no layers": {"layers": 0},
}


def encoder(
    form=pack, hidden=48, embedding=None, heads=4, intermediate=100, layers=2, activation="gelu", types=2
) -> PackedEncoder:
    rng = np.random.default_rng(0)
    embedding = embedding or hidden
    whole = pack_tiles if form is pack_tiles else pack_groups

    def linear(n_out: int, n_in: int, form=form, activation: str = "none") -> Linear:
        weight = (rng.standard_normal((n_out, n_in)) / np.sqrt(n_in)).astype(np.float32)
        if form in (pack, pack_tiles):
            weight[rng.random(weight.shape) < 0.7] = 0.0
        return Linear(form(weight), (0.1 * rng.standard_normal(n_out)).astype(np.float32), activation)

    def norm(n: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple((shift + 0.1 * rng.standard_normal(n)).astype(np.float32) for shift in (1, 0))

    return PackedEncoder(
        words=rng.standard_normal((VOCABULARY, embedding)).astype(np.float32),
        positions=(0.2 * rng.standard_normal((types, MAX_LENGTH, embedding))).astype(np.float32),
        embedding_norm=norm(embedding),
        projection=None if embedding == hidden else linear(hidden, embedding, whole),
        layers=tuple(
            EncoderLayer(
                qkv=linear(3 * hidden, hidden),
                attention_out=linear(hidden, hidden),
                attention_norm=norm(hidden),
                up=linear(intermediate, hidden, activation=activation),
                down=linear(hidden, intermediate),
                norm=norm(hidden),
            )
            for _ in range(layers)
        ),
        heads=heads,
        eps=1e-12,
        pooler=linear(hidden, hidden, whole, "tanh"),
        classifier=linear(3, hidden, pack_groups),
    )


def sequences(lengths: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    starts = np.cumsum([0, *lengths]).astype(np.int64)
    return rng.integers(0, VOCABULARY, tokens, np.int32), rng.integers(0, 2, tokens, np.int32), starts


@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_reference(isa, name):
    packed = encoder(**SHAPES[name])
    for lengths in LENGTHS:
        inputs = sequences(lengths)
        logits, states = sparse_encoder(*inputs, packed, states=True, isa=isa)
        expected_logits, expected_states = sparse_encoder_ref(*inputs, packed)
        np.testing.assert_allclose(states, expected_states, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=TOLERANCE)
        assert np.array_equal(sparse_encoder(*inputs, packed, isa=isa), logits)


# bf16 rounds by 2^-9 of a value's size, about eight times per layer.
TILE_TOLERANCE = {"most": 0.08, "rms": 0.01}


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "groups"])
def test_tiles_match_the_reference(tile_isa, name):
    packed = encoder(**SHAPES[name] | {"form": pack_tiles})
    for lengths in LENGTHS:
        inputs = sequences(lengths)
        got = sparse_encoder(*inputs, packed, states=True, isa=tile_isa)
        for ours, expected in zip(got, sparse_encoder_ref(*inputs, packed), strict=True):
            assert np.abs(ours - expected).max() < TILE_TOLERANCE["most"]
            assert np.sqrt(np.mean((ours - expected) ** 2)) < TILE_TOLERANCE["rms"]


# Bytes of inputs of up to 8 in size round by 2^-6 / 2 at most; attention rounds by 2^-12 of a head's largest value.
INT8_TOLERANCE = {"most": 0.4, "rms": 0.05}


def as_int8(weight: np.ndarray) -> PackedInt8:
    """The weight on the nearest grid, for inputs from -8 to 8."""
    step = np.full(weight.shape[1], 2.0**-4, np.float32)
    scale = np.maximum(np.abs(weight).max(1) * step[0] / 127, 1e-6).astype(np.float32)
    values = np.rint(weight * step / scale[:, None]).astype(np.int8)
    return pack_int8(Quantized(values, scale, step, np.full(len(step), 128, np.uint8)))


def in_int8(given: PackedEncoder, names=("qkv", "attention_out", "up", "down")) -> PackedEncoder:
    """The encoder with these linears of its layers in int8."""
    layers = [
        replace(layer, **{name: replace(old, weight=as_int8(unpack(old.weight)))
                          for name in names for old in [getattr(layer, name)]})
        for layer in given.layers
    ]  # fmt: skip
    return replace(given, layers=tuple(layers))


@pytest.mark.parametrize("name", SHAPES)
def test_int8_matches_the_reference(int8_isa, name):
    packed = in_int8(encoder(**SHAPES[name]))
    for lengths in LENGTHS:
        inputs = sequences(lengths)
        got = sparse_encoder(*inputs, packed, states=True, isa=int8_isa)
        for ours, expected in zip(got, sparse_encoder_ref(*inputs, packed), strict=True):
            assert np.abs(ours - expected).max() < INT8_TOLERANCE["most"]
            assert np.sqrt(np.mean((ours - expected) ** 2)) < INT8_TOLERANCE["rms"]


@pytest.mark.parametrize("names", [("qkv",), ("attention_out",), ("up",), ("down",), ("qkv", "up")])
def test_linears_in_int8_and_in_float32_mix(int8_isa, names):
    packed = in_int8(encoder(), names)
    inputs = sequences([27, 1, 40, 9])
    got = sparse_encoder(*inputs, packed, states=True, isa=int8_isa)
    for ours, expected in zip(got, sparse_encoder_ref(*inputs, packed), strict=True):
        assert np.sqrt(np.mean((ours - expected) ** 2)) < INT8_TOLERANCE["rms"]


def assert_sequences_alone(form, isa: str, change=lambda packed: packed) -> None:
    """A sequence gives the same bits alone, in a batch, and on any number of threads."""
    packed = change(encoder(form))
    ids, types, starts = sequences([27, 1, 40, 9, 130, 8, 300, 5, 64])
    together = sparse_encoder(ids, types, starts, packed, isa=isa, threads=1)
    for threads in (2, 3, 8):
        assert np.array_equal(sparse_encoder(ids, types, starts, packed, isa=isa, threads=threads), together)
    for i, (start, stop) in enumerate(pairwise(starts)):
        own = np.array([0, stop - start])
        alone = sparse_encoder(ids[start:stop], types[start:stop], own, packed, isa=isa, threads=2)
        assert np.array_equal(alone[0], together[i])


def assert_first_tokens_suffice(form, isa: str, change=lambda packed: packed) -> None:
    """Without states, the last layer computes little but first tokens; the logits are the same bits."""
    several = ([1], [512], [1] * 40, [26] * 32, list(range(1, 130, 7)), [300, 20, 512, 7])
    for shape in ({"layers": 1}, {"embedding": 20}, {"hidden": 192, "intermediate": 300}):
        packed = change(encoder(form, **shape))
        for lengths in several:
            inputs = sequences(lengths)
            expected, _ = sparse_encoder(*inputs, packed, states=True, isa=isa, threads=1)
            for threads in (1, 2, 5):
                assert np.array_equal(sparse_encoder(*inputs, packed, isa=isa, threads=threads), expected)


@pytest.mark.parametrize("form", [pack, pack_groups])
def test_logits_are_the_same_bits_without_states(isa, form):
    assert_first_tokens_suffice(form, isa)


def test_logits_in_tiles_are_the_same_bits_without_states(tile_isa):
    assert_first_tokens_suffice(pack_tiles, tile_isa)


@pytest.mark.parametrize("names", [("qkv", "attention_out", "up", "down"), ("up", "down")])
def test_logits_in_int8_are_the_same_bits_without_states(int8_isa, names):
    assert_first_tokens_suffice(pack_groups, int8_isa, lambda packed: in_int8(packed, names))


@pytest.mark.parametrize("form", [pack, pack_groups])
def test_a_sequence_gives_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(isa, form):
    assert_sequences_alone(form, isa)


def test_tiles_give_a_sequence_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(tile_isa):
    assert_sequences_alone(pack_tiles, tile_isa)


def test_a_sequence_in_int8_gives_the_same_bits_alone_too(int8_isa):
    assert_sequences_alone(pack_groups, int8_isa, in_int8)


def test_int8_gives_the_same_bits_on_all_isas_with_fused_products():
    isas = [isa for isa in _dispatch.supported_isas() if isa in environment.INT8_ISAS and isa != "scalar"]
    packed, inputs = in_int8(encoder(pack_groups)), sequences([27, 1, 40, 9, 130])
    logits = [sparse_encoder(*inputs, packed, isa=isa) for isa in isas]
    assert all(np.array_equal(other, logits[0]) for other in logits)


def test_inputs_at_an_end_of_their_range_are_counted():
    packed, inputs = in_int8(encoder(), ("qkv", "up")), sequences([27, 1, 40, 9, 64, 65])
    assert not clipped_inputs(*inputs, packed).any()  # states are below 8
    layer = packed.layers[1]
    narrow = replace(layer.up.weight, step=np.full_like(layer.up.weight.step, 1e-9))
    packed = replace(packed, layers=(packed.layers[0], replace(layer, up=replace(layer.up, weight=narrow))))
    assert clipped_inputs(*inputs, packed).tolist() == [[0, 0, 0, 0], [0, 0, len(inputs[0]) * 48, 0]]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_int8_attention_passes_on_what_is_not_finite(int8_isa, at):
    packed = encoder(pack_groups, layers=1)
    bias = packed.layers[0].qkv.bias.copy()
    bias[48 * at + 5] = np.inf
    layer = replace(packed.layers[0], qkv=replace(packed.layers[0].qkv, bias=bias))
    packed = in_int8(replace(packed, layers=(layer,)), ("up",))
    assert np.isnan(sparse_encoder(*sequences([30, 5]), packed, isa=int8_isa)).all()


def test_avx2_and_avx512_give_the_same_bits():
    if "avx512" not in _dispatch.supported_isas():
        require("avx512", _dispatch.why_off()["avx512"])
    for lengths in LENGTHS:
        inputs = sequences(lengths)
        wide, narrow = (sparse_encoder(*inputs, encoder(), isa=isa) for isa in ("avx512", "avx2"))
        assert np.array_equal(wide, narrow)


def assert_non_finite_stays(form, isa: str) -> None:
    """A NaN in the vector of a word reaches the logits of its sequence and no others."""
    packed = encoder(form)
    words = packed.words.copy()
    words[7] = np.nan
    ids, types, starts = sequences([9, 9, 9])
    ids[ids == 7] = 8
    clean = sparse_encoder(ids, types, starts, packed, isa=isa)
    ids[13] = 7
    logits = sparse_encoder(ids, types, starts, replace(packed, words=words), isa=isa)
    assert np.isnan(logits[1]).all()
    assert np.array_equal(logits[[0, 2]], clean[[0, 2]])


def test_a_non_finite_word_stays_with_its_sequence(isa):
    assert_non_finite_stays(pack, isa)


def test_tiles_keep_a_non_finite_word_with_its_sequence(tile_isa):
    assert_non_finite_stays(pack_tiles, tile_isa)


def test_large_scores_attend_to_one_token(isa):
    packed = encoder()
    qkv = packed.layers[0].qkv
    sharp = replace(packed.layers[0], qkv=replace(qkv, bias=qkv.bias * 3000))
    packed = replace(packed, layers=(sharp,))
    inputs = sequences([33, 5])
    logits = sparse_encoder(*inputs, packed, isa=isa)
    expected, _ = sparse_encoder_ref(*inputs, packed)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)  # scores of 1e5 are accurate to 1e-2


def test_no_sequences_are_no_logits():
    nothing = np.empty(0, np.int32)
    assert sparse_encoder(nothing, nothing, np.zeros(1, np.int64), encoder()).shape == (0, 3)


IDS, TYPES, STARTS = sequences([4, 3])
BAD_CALLS = {
    "ids must be 1-d int32, got int64 [7]": {"ids": IDS.astype(np.int64)},
    "types must be 1-d int32, got list": {"types": [0] * 7},
    "types must have one type per token, got 6 for 7": {"types": TYPES[1:]},
    "starts must rise from 0 to the 7 tokens, got [0, 4, 4, 7]": {"starts": np.array([0, 4, 4, 7])},
    "starts must rise from 0 to the 7 tokens, got [0, 4]": {"starts": np.array([0, 4])},
    "starts must rise from 0 to the 7 tokens, got []": {"starts": np.empty(0, np.int64)},
    "ids must be at least 0 and below 50, got 50": {"ids": np.where(IDS == IDS[2], np.int32(50), IDS)},
    "ids must be at least 0 and below 50, got -1": {"ids": np.where(IDS == IDS[2], np.int32(-1), IDS)},
    "types must be at least 0 and below 2, got 2": {"types": TYPES + np.int32(2 - TYPES.max())},
    "threads must be an integer of at least 1, got 0": {"threads": 0},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    with pytest.raises(InputError) as error:
        sparse_encoder(**({"ids": IDS, "types": TYPES, "starts": STARTS, "encoder": encoder()} | BAD_CALLS[message]))
    assert message in str(error.value)


def test_a_sequence_longer_than_the_positions_is_refused():
    inputs = sequences([MAX_LENGTH + 1])
    with pytest.raises(InputError, match="at most 520 tokens, got 521"):
        sparse_encoder(*inputs, encoder())


def test_the_binding_refuses_what_would_leave_its_memory():
    packed = encoder()
    wide = Linear(pack(np.ones((48, 49), np.float32)))
    for broken, message in (
        (replace(packed, heads=5), "heads must divide hidden"),
        (replace(packed, classifier=wide), "linears must fit each other"),
        (replace(packed, layers=(replace(packed.layers[0], down=wide),)), "linears must fit each other"),
        (replace(packed, embedding_norm=(np.ones(48, np.float32), np.ones(47, np.float32))), "norms must have"),
        (replace(packed, pooler=encoder(pack_tiles).pooler), "in tiles, or none"),
        (replace(packed, classifier=Linear(pack_tiles(np.ones((3, 48), np.float32)))), "classifier must not be"),
        (replace(packed, positions=packed.positions[:, :, 1:].copy()), "positions must be"),
    ):
        with pytest.raises(ValueError, match=message):
            _ = broken.core
    core = packed.core
    for ids, types, starts in ((IDS + 50, TYPES, STARTS), (IDS, TYPES + 2, STARTS), (IDS, TYPES, STARTS + 1)):
        with pytest.raises(ValueError, match="must"):
            core.run(ids, types, starts, False, False, "scalar", 1)


CHANGED = """
import sys, threading
import numpy as np
from test_sparse_encoder import encoder, sequences
from sparsebert.ops.sparse_encoder import sparse_encoder

sys.setswitchinterval(1e-6)
ids, types, starts = sequences([512] * 4)
packed = encoder()

def flip():
    while True:
        ids[-1] = 2**30
        ids[-1] = 0

threading.Thread(target=flip, daemon=True).start()
for _ in range(50):
    try:
        sparse_encoder(ids, types, starts, packed, threads=1)
    except (ValueError, sys.modules["sparsebert.errors"].InputError):
        pass
"""


def test_ids_that_another_thread_changes_meanwhile_leave_no_memory():
    folder = os.path.dirname(__file__)
    path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", CHANGED], env=os.environ | {"PYTHONPATH": path}, cwd=folder + "/..")
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["attention_out", "down"])
def test_a_linear_that_is_added_to_the_states_has_no_activation(name):
    layer = encoder().layers[0]
    linear = replace(getattr(layer, name), activation="relu")
    with pytest.raises(InputError, match=f"{name} is added to the states and must have no activation, has relu"):
        replace(layer, **{name: linear})
    norms = (layer.attention_norm, layer.norm)
    linears = {part: getattr(layer, part).core for part in ("qkv", "attention_out", "up", "down")} | {name: linear.core}
    whole = encoder()
    with pytest.raises(ValueError, match="must have no activation"):
        _dispatch.core().Encoder(
            whole.words, whole.positions, whole.embedding_norm, None, [(*linears.values(), *norms)], whole.heads,
            whole.eps, whole.pooler.core, whole.classifier.core,
        )  # fmt: skip

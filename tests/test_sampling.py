"""Sampling: filters against a plain numpy model, draws against their exact distribution, and whose noise is whose."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from small_model import log_softmax, unchecked_types

from kogpt_jax.errors import InputError
from kogpt_jax.sampling import RowSampling, SamplingParams, keep_threshold, sample
from kogpt_jax.vocabulary import Vocabulary


@jax.jit
def draw(logits, rows, positions):
    return sample(logits, rows, positions, Vocabulary(logits.shape[-1]))


threshold = jax.jit(keep_threshold)

VOCAB = 40


def expected_kept(logits: np.ndarray, params: SamplingParams) -> set[int]:
    """The tokens that the filters keep of one row, one filter after the other, as the documentation says it, in f64."""
    scaled = logits.astype(np.float64) / params.temperature
    in_order = sorted(scaled, reverse=True)  # ties are no problem: values are cut, not tokens
    if params.top_k:
        in_order = in_order[: params.top_k]
    if params.top_p < 1:
        probs = np.exp(np.array(in_order) - in_order[0])
        reached = np.cumsum(probs / probs.sum())
        in_order = in_order[: 1 + int(np.sum(reached[:-1] < params.top_p))]
    if params.min_p:
        in_order = [value for value in in_order if value >= in_order[0] + math.log(params.min_p)]
    return {int(token) for token in np.flatnonzero(scaled >= in_order[-1])}


def kept(logits: np.ndarray, rows: list[SamplingParams]) -> list[set[int]]:
    temperatures = np.array([[row.temperature] for row in rows], np.float32)
    scaled = logits / temperatures
    limits = np.asarray(threshold(scaled, RowSampling.from_params(rows)))
    return [{int(token) for token in np.flatnonzero(row >= limit)} for row, limit in zip(scaled, limits, strict=True)]


def exact_probs(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    is_kept = np.isin(np.arange(len(logits)), list(expected_kept(logits, params)))
    return np.exp(log_softmax(np.where(is_kept, logits.astype(np.float64) / params.temperature, -np.inf)))


@functools.cache
def distributions() -> dict[str, np.ndarray]:
    """Rows of logits of every temper, f32."""
    rng = np.random.default_rng(0)
    flat = rng.normal(size=VOCAB)
    tied = np.repeat(rng.normal(size=VOCAB // 4), 4)
    peaked = flat.copy()
    peaked[7] += 30
    two_peaks = flat.copy()
    two_peaks[[3, 30]] += 12
    banned = flat.copy()
    banned[::3] = -np.inf
    rows = {
        "flat": flat,
        "wide": 4 * rng.normal(size=VOCAB),
        "peaked": peaked,
        "two peaks": two_peaks,
        "tied": rng.permutation(tied),
        "all tied": np.zeros(VOCAB),
        "banned": banned,
        "far from zero": flat - 1000,
    }
    return {name: logits.astype(np.float32) for name, logits in rows.items()}


FILTERS = [
    SamplingParams(temperature=1.0),
    *(SamplingParams(temperature=1.0, top_k=k) for k in (1, 2, 5, VOCAB - 1, VOCAB, VOCAB + 1, 2**31 - 1, 2**40)),
    *(SamplingParams(temperature=1.0, top_p=p) for p in (1e-30, 1e-6, 0.1, 0.5, 0.9, 0.999)),
    *(SamplingParams(temperature=1.0, min_p=p) for p in (1e-6, 0.05, 0.3, 0.9, 1.0)),
    *(SamplingParams(temperature=t, top_p=0.8) for t in (0.05, 0.7, 3.0)),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.95),
    SamplingParams(temperature=1.5, top_k=6, min_p=0.2),
    SamplingParams(temperature=1.2, top_p=0.9, min_p=0.1),
    SamplingParams(temperature=0.9, top_k=10, top_p=0.8, min_p=0.05),
]


@pytest.mark.parametrize("name", distributions())
def test_filters_keep_what_a_plain_model_keeps(name):
    logits = np.tile(distributions()[name], (len(FILTERS), 1))
    for params, actual in zip(FILTERS, kept(logits, FILTERS), strict=True):
        assert actual == expected_kept(logits[0], params), f"{name}: {params}"


def test_filters_apply_in_their_order():
    """Top-p after top-k: of 0.4 0.3 0.2 0.1 top-k 2 leaves 4/7 and 3/7, so that top-p 0.5 is reached by one token."""
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
    assert kept(logits, [SamplingParams(temperature=1.0, top_p=0.5)]) == [{1, 3}]
    assert kept(logits, [SamplingParams(temperature=1.0, top_k=2, top_p=0.5)]) == [{1}]
    assert kept(logits, [SamplingParams(temperature=1.0, min_p=0.5)]) == [{1, 2, 3}]
    assert kept(logits, [SamplingParams(temperature=0.5, min_p=0.5)]) == [{1, 3}]  # 16 : 9 : 4 : 1
    assert kept(logits, [SamplingParams(temperature=1.0, top_p=0.75, min_p=0.6)]) == [{1, 3}]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_draws_are_of_the_kept_tokens(params):
    """No token that a filter drops, in any distribution."""
    for name, row in distributions().items():
        rows = [dataclasses.replace(params, seed=seed) for seed in range(64)]
        tokens, _ = draw(np.tile(row, (64, 1)), RowSampling.from_params(rows), jnp.arange(64, dtype=jnp.int32))
        assert set(np.asarray(tokens).tolist()) <= expected_kept(row, params), name


def test_greedy_is_argmax_and_takes_the_first_of_a_tie():
    logits = np.stack(list(distributions().values()))
    # The filters and the seed play no part.
    rows = [SamplingParams(top_k=3, top_p=0.2, min_p=0.5, seed=seed) for seed in range(len(logits))]
    tokens, _ = draw(logits, RowSampling.from_params(rows), jnp.full(len(rows), 9, jnp.int32))
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=5.0, top_k=1, top_p=0.9),
        SamplingParams(temperature=1.0, top_p=1e-6),
        SamplingParams(temperature=1.0, top_p=1e-300),
        SamplingParams(temperature=1.0, min_p=1.0),
        *(SamplingParams(temperature=temperature) for temperature in (1e-3, 1e-20, 1e-37, 1e-38, 1e-40, 1e-45, 1e-300)),
    ],
    ids=str,
)
def test_what_leaves_one_token_is_greedy(params):
    """Temperatures so small that a quotient overflows included."""
    logits = np.stack([row for name, row in distributions().items() if "tied" not in name])
    tokens, _ = draw(logits, RowSampling.from_params([params] * len(logits)), jnp.arange(len(logits), dtype=jnp.int32))
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


def test_logprobs_are_the_models_own():
    """Before temperature and filters, for drawn and greedy rows."""
    logits = np.stack([row for name, row in distributions().items() if name != "banned"])
    for params in (SamplingParams(), SamplingParams(temperature=2.0), SamplingParams(temperature=0.3, top_k=4)):
        rows = RowSampling.from_params([dataclasses.replace(params, seed=3)] * len(logits))
        tokens, logprobs = draw(logits, rows, jnp.zeros(len(logits), jnp.int32))
        expected = np.take_along_axis(log_softmax(logits), np.asarray(tokens)[:, None], axis=-1)
        # The row of a log-probability is its row of logits: that is what it is the difference of.
        scale = np.maximum(np.abs(logits).max(axis=-1, keepdims=True), 1)
        error = np.abs(np.asarray(logprobs)[:, None] - expected) / scale
        assert error.max() <= tolerances.SCORE_VS_LOGITS.relative


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, seed=1)], ids=["greedy", "drawn"])
def test_logits_that_are_not_finite_give_a_logprob_that_is_not(bad, params):
    logits = np.stack([distributions()["flat"]] * 3)
    logits[1, 5] = bad
    rows = RowSampling.from_params([params] * 3)
    tokens, logprobs = draw(logits, rows, jnp.zeros(3, jnp.int32))
    assert np.isfinite(np.asarray(logprobs)).tolist() == [True, False, True]
    assert np.all((np.asarray(tokens) >= 0) & (np.asarray(tokens) < VOCAB))


def assert_fits(counts: np.ndarray, probs: np.ndarray) -> None:
    """Pearson's chi-square of counts against probabilities; the bound is five of its standard deviations."""
    total = counts.sum()
    is_possible = probs > 0
    assert counts[~is_possible].sum() == 0
    counts, probs = counts[is_possible], probs[is_possible]
    is_rare = probs * total < 5  # together in one class, where the approximation would not hold
    counts = np.append(counts[~is_rare], counts[is_rare].sum())
    probs = np.append(probs[~is_rare], probs[is_rare].sum())
    counts, probs = counts[probs > 0], probs[probs > 0]
    freedom = len(probs) - 1
    chi_square = np.sum((counts - total * probs) ** 2 / (total * probs))
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom), f"chi-square {chi_square:.1f} of {freedom} degrees"


NUM_DRAWS = 32768
STATISTICS = [
    ("flat", SamplingParams(temperature=1.0)),
    ("wide", SamplingParams(temperature=2.0)),
    ("flat", SamplingParams(temperature=0.4, top_k=12)),
    ("tied", SamplingParams(temperature=1.0, top_p=0.7)),
    ("two peaks", SamplingParams(temperature=3.0, min_p=0.02)),
]


def draw_many(name: str, params: SamplingParams, seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    rows = dataclasses.replace(
        RowSampling.from_params([dataclasses.replace(params, seed=0)] * len(seeds)), seed=jnp.asarray(seeds, jnp.uint32)
    )
    logits = np.tile(distributions()[name], (len(seeds), 1))
    return np.asarray(draw(logits, rows, jnp.asarray(positions, jnp.int32))[0])


@pytest.mark.parametrize(("name", "params"), STATISTICS, ids=str)
def test_draws_over_seeds_have_the_exact_distribution(name, params):
    tokens = draw_many(name, params, np.arange(NUM_DRAWS), np.full(NUM_DRAWS, 17))
    assert_fits(np.bincount(tokens, minlength=VOCAB), exact_probs(distributions()[name], params))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_draws_over_positions_have_the_exact_distribution(seed):
    params = SamplingParams(temperature=1.0)
    tokens = draw_many("flat", params, np.full(NUM_DRAWS, seed), np.arange(NUM_DRAWS))
    assert_fits(np.bincount(tokens, minlength=VOCAB), exact_probs(distributions()["flat"], params))


@pytest.mark.parametrize(("seed_step", "position_step"), [(1, 0), (0, 1), (1, -1), (-1, -1)])
def test_neighbouring_seeds_and_positions_are_independent(seed_step, position_step):
    """Pairs of draws: their joint distribution is the product of the two."""
    params = SamplingParams(temperature=1.0, top_k=8)
    seeds = np.arange(NUM_DRAWS) % 256 + 1000
    positions = np.arange(NUM_DRAWS) // 256 * 2 + 1
    seeds = 2 * seeds if seed_step else seeds  # so that no draw is in two pairs
    first = draw_many("flat", params, seeds, positions)
    second = draw_many("flat", params, seeds + seed_step, positions + position_step)
    probs = exact_probs(distributions()["flat"], params)
    counts = np.bincount(first * VOCAB + second, minlength=VOCAB**2)
    assert_fits(counts, np.outer(probs, probs).ravel())


def test_the_statistics_can_fail():
    params = SamplingParams(temperature=1.0)
    tokens = draw_many("flat", params, np.arange(NUM_DRAWS), np.full(NUM_DRAWS, 17))
    counts = np.bincount(tokens, minlength=VOCAB)
    with pytest.raises(AssertionError, match="chi-square"):
        assert_fits(counts, exact_probs(distributions()["flat"], SamplingParams(temperature=1.1)))
    with pytest.raises(AssertionError):
        assert_fits(counts, exact_probs(distributions()["flat"], SamplingParams(temperature=1.0, top_k=VOCAB - 1)))


def mixed_rows() -> tuple[np.ndarray, list[SamplingParams], np.ndarray]:
    """Rows of all distributions and filters, greedy ones among them, with seeds and positions."""
    params = [dataclasses.replace(row, seed=7 * index) for index, row in enumerate([*FILTERS, SamplingParams()])]
    logits = list(distributions().values())
    rows = np.stack([logits[index % len(logits)] for index in range(len(params))])
    return rows, params, np.arange(100, 100 + len(params), dtype=np.int32)


def test_a_row_depends_on_its_own_parameters_alone():
    logits, params, positions = mixed_rows()
    together, logprobs = map(np.asarray, draw(logits, RowSampling.from_params(params), positions))
    for index in range(len(params)):
        one = slice(index, index + 1)
        token, logprob = draw(logits[one], RowSampling.from_params(params[one]), positions[one])
        assert (int(token[0]), float(logprob[0])) == (int(together[index]), float(logprobs[index])), params[index]


def test_the_slot_makes_no_difference():
    logits, params, positions = mixed_rows()
    together, logprobs = map(np.asarray, draw(logits, RowSampling.from_params(params), positions))
    order = np.random.default_rng(1).permutation(len(params))
    moved = RowSampling.from_params([params[index] for index in order])
    tokens, moved_logprobs = draw(logits[order], moved, positions[order])
    np.testing.assert_array_equal(tokens, together[order])
    np.testing.assert_array_equal(moved_logprobs, logprobs[order])


def test_noise_differs_by_position_and_by_seed():
    params = SamplingParams(temperature=1.0)
    tokens = draw_many("all tied", params, np.repeat(np.arange(16), 16), np.tile(np.arange(16), 16)).reshape(16, 16)
    assert len({tuple(row) for row in tokens}) == 16
    assert len({tuple(column) for column in tokens.T}) == 16
    assert min(len(set(row)) for row in tokens) >= 8  # of 16 draws out of 40


def test_a_row_without_a_seed_gets_one_of_its_own():
    rows = RowSampling.from_params([SamplingParams()] * 64)
    assert len(set(np.asarray(rows.seed).tolist())) == 64
    assert np.any(np.asarray(RowSampling.from_params([SamplingParams()] * 64).seed) != np.asarray(rows.seed))


def test_rows_hold_what_the_parameters_say():
    rows = RowSampling.from_params(
        [SamplingParams(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, seed=2**32 - 1), SamplingParams(seed=0)]
    )
    arrays = {field.name: np.asarray(getattr(rows, field.name)) for field in dataclasses.fields(rows)}
    assert not arrays.pop("is_greedy")
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "temperature": [0.5, 0.0],
        "top_k": [3, 0],
        "top_p": [0.25, 1.0],
        "min_p": [0.125, 0.0],
        "seed": [2**32 - 1, 0],
    }
    assert [array.dtype.name for array in arrays.values()] == ["float32", "int32", "float32", "float32", "uint32"]


@pytest.mark.parametrize(("temperature", "is_greedy"), [(0.0, True), (0.7, False)])
def test_only_a_batch_that_draws_is_sorted(temperature, is_greedy):
    """And neither asks on the device, where the host would wait for the answer."""
    rows = RowSampling.from_params([SamplingParams(), SamplingParams(temperature=temperature)])
    assert rows.is_greedy == is_greedy
    operations = draw.lower(jnp.zeros((2, VOCAB)), rows, jnp.zeros(2, jnp.int32)).as_text()
    assert ("stablehlo.sort" in operations) == (not is_greedy)
    assert "stablehlo.case" not in operations
    assert "stablehlo.if" not in operations


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "3"),
        ("max_new_tokens", None),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 1.0),
        ("top_k", None),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.0001),
        ("top_p", math.nan),
        ("top_p", "0.9"),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("min_p", None),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 1.5),
        ("seed", "1"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_name(name, value):
    with unchecked_types(), pytest.raises(InputError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must be ")
    assert message.endswith(f", got {value!r}")
    assert len(message.splitlines()) == 1


def test_values_at_the_borders_and_numpys_are_taken():
    SamplingParams(max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
    SamplingParams(max_new_tokens=10**9, temperature=1e30, top_k=2**40, top_p=1e-300, min_p=1.0, seed=2**32 - 1)
    with unchecked_types():
        numpys: dict[str, Any] = {"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "top_k": np.int32(4)}
        params = SamplingParams(**numpys, top_p=1)
        assert np.asarray(RowSampling.from_params([params]).temperature).tolist() == [0.5]


def test_parameters_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 1.0  # type: ignore[misc]

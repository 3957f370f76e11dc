"""Every tolerance of the test suite, each with its reason, and the one comparison that uses them.

An error is relative to the row: max |actual - expected| / max |expected| over the last axis. Element by element it
would be meaningless where an expected value happens to be near zero. Kernels have no entry: their rule is twice the
error of the reference in the same precision plus a rounding floor.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from custom_ops.tolerance import allowed_error
from kogpt_jax.config import NUMPY_DTYPES


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest allowed error of a row relative to its largest magnitude, and why it is this large."""

    relative: float
    reason: str

    def __post_init__(self) -> None:
        if not (0 <= self.relative < 1 and self.reason):
            raise ValueError(f"a tolerance needs a bound in [0, 1) and a reason, got {self}")


LOGITS_VS_HF = Tolerance(
    1e-5,
    "f32 against Hugging Face's f32: the same operations summed in another order, so an error of about sqrt(D) * 2^-24 "
    "a product, which grows with the layers.",
)
LOGPROBS_VS_HF = Tolerance(
    1e-5,
    "a log-probability is a logit less a logsumexp, so it errs by at most twice what its logits do; its row is the "
    "completion, whose largest magnitude is of the size of the largest logit.",
)
SCORE_VS_LOGITS = Tolerance(
    1e-6, "the same logits, once through log_softmax on the device in f32 and once on the host in f64."
)
LOGITS_VS_MESH = Tolerance(
    1e-5,
    "f32 on a mesh against one device: products over a shard's part of K, then summed over the shards, which is "
    "another order of summation in each layer.",
)
LOGPROBS_VS_MESH = Tolerance(
    1e-5, "a logit less a logsumexp over shards; its row is the completion, as for LOGPROBS_VS_HF."
)
LOGPROBS_OF_KERNELS_VS_MESH = Tolerance(
    2e-2,
    "fp16 kernels: another order of summation rounds an output to the next fp16 value, 5e-4 of it, a few times a "
    "layer.",
)
INT8_VS_MESH = Tolerance(
    2e-2,
    "w8a8: a tensor shard rounds its part of w_out's input with a scale of its own, finer than one for a whole token: "
    "other roundings of up to 1/254 of the largest activation in each layer. INT8 cache: a key or value in the middle "
    "of two integers goes either way, after another order of summation. 0.014 and 0.009 were seen.",
)
ROW_ALONE_VS_BATCH = {
    "fp32": Tolerance(
        1e-5, "another batch size or padding changes the tiles of a product, hence its order of summation."
    ),
    "bf16": Tolerance(
        3e-2, "8 bits of mantissa: one ulp is 2^-8, and a tile's other order may flip a rounding in each layer."
    ),
    "fp16": Tolerance(
        4e-3, "11 bits of mantissa: one ulp is 2^-11, and a tile's other order may flip a rounding in each layer."
    ),
}
RESCALED = Tolerance(
    1e-5,
    "f32 against the same function, channels rescaled by what is no power of two: each factor and what it scales is "
    "rounded, some 2^-24 a product, which adds up over the layers.",
)
STEP_OF_KERNELS = {
    "fp32": Tolerance(1e-5, "f32 kernels against XLA over three layers: other orders of summation."),
    "fp16": Tolerance(1e-2, "a few layers, each of whose outputs may round to the next of 11 bits."),
    "bf16": Tolerance(6e-2, "likewise of 8 bits."),
}
STEP_OF_INT8_KERNELS = Tolerance(
    5e-2,
    "kernels for sm_90a that round the inputs of the products to 8 bits, by up to 1/254 of the largest in a row or in "
    "256 of its columns, against what does not: that rounding in jax.numpy changed what is behind three layers by "
    "0.012 to 0.025, on five sets of weights.",
)
LOGPROBS_OF_STEPS = Tolerance(
    1e-5, "the same logits in f32, their exponentials summed in another order; its row is what the steps have emitted."
)
CACHED_VS_WHOLE = {
    "fp32": Tolerance(
        1e-5, "one query over cached keys against all queries at once: the same products, summed in another order."
    ),
    "bf16": Tolerance(3e-2, "8 bits of mantissa: attention's weights are rounded once on one way only, in each layer."),
    "fp16": Tolerance(
        4e-3, "11 bits of mantissa: attention's weights are rounded once on one way only, in each layer."
    ),
}
CACHED_VS_WHOLE_INT8 = Tolerance(
    2e-3,
    "an INT8 cache in f32: another order of summation now and then rounds a key or value the other way, by one step, "
    "1/127 of its head's largest value. It is one value of one head of one token; the demo model has shown 5e-4.",
)
MODULE = {
    "fp32": Tolerance(2e-6, "one module in f32: some dozens of roundings of 2^-24."),
    "bf16": Tolerance(
        2e-2, "inputs, weights and outputs are rounded to 8 bits (half an ulp is 2^-9), five roundings a module."
    ),
    "fp16": Tolerance(
        2.5e-3, "inputs, weights and outputs are rounded to 11 bits (half an ulp is 2^-12), five roundings a module."
    ),
}
LAST_LAYER_W8A8 = Tolerance(
    0.02,
    "the last layer of a prefill multiplies the rows' last tokens as a decode step does, which on a CPU does not round "
    "them to INT8: half a step of 1/127 of the largest value a product, over sums of many",
)
ATTENTION_FP32_ON_GPU = Tolerance(
    4e-6,
    "attention by XLA in f32 on a GPU: an H100 has shown 2.6e-6. Presumably exp(x), there a power of two whose "
    "exponent has been rounded, so that its error grows with x.",
)
LOGITS_VS_FP32 = {
    "bf16": Tolerance(
        6e-2, "activations rounded to 8 bits twice a layer; errors add as a random walk over the layers."
    ),
    "fp16": Tolerance(
        8e-3, "activations rounded to 11 bits twice a layer; errors add as a random walk over the layers."
    ),
}

# Two tokens tie where their logits differ by at most this share of the row's largest magnitude: within it f32 decides
# nothing, so a greedy text may take either, and goes its own way from there.
TIE = 1e-5

# What a perturbed config must change at least, relative to the row: far above f32's noise, far below any real effect.
VISIBLE_CHANGE = 1e-4


def twice_the_oracles_error(oracle_error: float, dtype: str) -> Tolerance:
    """The rule for 16 bits where the oracle runs in them too: at most twice its own error against f32, plus one ulp."""
    ulp = {"fp16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    return Tolerance(
        2 * oracle_error + ulp, f"twice the oracle's own error in {dtype}, {oracle_error:.3g}, plus one ulp."
    )


def twice_the_references_error(reference_error: float, dtype: str, *, tensor_core_k: int = 0) -> Tolerance:
    """The rule for a kernel, which the autotuner has too: `custom_ops.tolerance.allowed_error`, with the reasons."""
    allowed = allowed_error(reference_error, NUMPY_DTYPES[dtype], tensor_core_k=tensor_core_k)
    floor = allowed - 2 * reference_error
    return Tolerance(allowed, f"twice the reference's own error, {reference_error:.3g}, plus {floor:.3g}.")


def relative_error(actual: ArrayLike, expected: ArrayLike) -> float:
    """The worst row's max |actual - expected| / max |expected|, rows along the last axis; NaN where anything is NaN.

    A row of zeros must be met exactly (0), else its error is infinite.
    """
    actual64, expected64 = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual64.shape != expected64.shape:
        raise AssertionError(f"shape {actual64.shape} instead of {expected64.shape}")
    if actual64.size == 0:
        raise AssertionError(f"nothing to compare: shape {actual64.shape}")
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.abs(actual64 - expected64).max(axis=-1)
        scale = np.abs(expected64).max(axis=-1)
        error = np.where((difference == 0) & (scale == 0), 0.0, difference / scale)
    return float(error.max())


def assert_close(actual: ArrayLike, expected: ArrayLike, tolerance: Tolerance, what: str = "value") -> None:
    """Fails unless every row is within the tolerance. NaN and infinity fail: they are never `<=`."""
    error = relative_error(actual, expected)
    if not (error <= tolerance.relative):
        raise AssertionError(
            f"{what}: relative error {error:.3g}, allowed {tolerance.relative:.3g}: {tolerance.reason}"
        )


def assert_same_greedy(
    actual: ArrayLike, expected: ArrayLike, gaps: ArrayLike, what: str = "row", *, allow_ties: bool = True
) -> None:
    """Fails unless two greedy texts are token-exact, or part at a tie.

    Args:
        actual: our tokens.
        expected: the oracle's tokens.
        gaps: the oracle's top-1 minus top-2 logit at each step over the row's largest magnitude.
        what: names the row in the error.
        allow_ties: without, a tie is no excuse.
    """
    actual_ids, expected_ids, gaps = np.asarray(actual), np.asarray(expected), np.asarray(gaps)
    length = min(len(actual_ids), len(expected_ids))
    differs = np.flatnonzero(actual_ids[:length] != expected_ids[:length])
    if differs.size:
        step = int(differs[0])
        if allow_ties and gaps[step] <= TIE:
            return
        raise AssertionError(
            f"{what}: step {step} is token {actual_ids[step]} instead of {expected_ids[step]}, "
            f"the top two {gaps[step]:.3g} apart"
        )
    if len(actual_ids) != len(expected_ids):
        raise AssertionError(f"{what}: {len(actual_ids)} tokens instead of {len(expected_ids)}")

"""The comparisons themselves: what must fail does fail."""

import numpy as np
import pytest
import tolerances
from tolerances import Tolerance

LOOSE = Tolerance(0.5, "only NaN and wrong shapes may fail")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_a_number_fails_on_either_side(bad: float) -> None:
    with pytest.raises(AssertionError):
        tolerances.assert_close([1.0, bad], [1.0, 2.0], LOOSE)
    with pytest.raises(AssertionError):
        tolerances.assert_close([1.0, 2.0], [1.0, bad], LOOSE)
    with pytest.raises(AssertionError):
        tolerances.assert_close([1.0, bad], [1.0, bad], LOOSE)


def test_one_bad_row_among_good_ones_fails() -> None:
    expected = np.ones((3, 4))
    actual = expected.copy()
    actual[1, 2] += 1e-4
    tolerances.assert_close(actual, expected, Tolerance(2e-4, "above the error"))
    with pytest.raises(AssertionError, match="relative error 0.0001"):
        tolerances.assert_close(actual, expected, Tolerance(5e-5, "below the error"))


def test_zero_rows_must_be_met_exactly() -> None:
    tolerances.assert_close(np.zeros(3), np.zeros(3), LOOSE)
    with pytest.raises(AssertionError):
        tolerances.assert_close([0.0, 1e-30], np.zeros(2), LOOSE)


def test_shapes_must_agree_and_hold_something() -> None:
    with pytest.raises(AssertionError, match="shape"):
        tolerances.assert_close(np.ones((2, 1)), np.ones(2), LOOSE)
    with pytest.raises(AssertionError, match="nothing"):
        tolerances.assert_close(np.ones((0, 3)), np.ones((0, 3)), LOOSE)


def test_greedy_texts_may_part_at_a_tie_only() -> None:
    tolerances.assert_same_greedy([1, 2, 3], [1, 2, 3], [0.1, 0.1, 0.1])
    tolerances.assert_same_greedy([1, 5, 6], [1, 2, 3], [0.1, 1e-6, 0.1])
    with pytest.raises(AssertionError, match="step 1 is token 5 instead of 2"):
        tolerances.assert_same_greedy([1, 5, 3], [1, 2, 3], [1e-6, 0.1, 0.1])
    with pytest.raises(AssertionError, match="2 tokens instead of 3"):
        tolerances.assert_same_greedy([1, 2], [1, 2, 3], [0.1, 0.1, 0.1])
    with pytest.raises(AssertionError, match="step 1"):
        tolerances.assert_same_greedy([1, 5], [1, 2], [0.1, np.nan])


def test_a_kernel_may_err_twice_as_much_as_its_reference_and_round_once() -> None:
    for dtype, half_ulp in (("fp32", 2.0**-24), ("fp16", 2.0**-11), ("bf16", 2.0**-8)):
        rule = tolerances.twice_the_references_error(1e-3, dtype)
        assert rule.relative == 2e-3 + (half_ulp + 2.0**-20)
        on_tensor_cores = tolerances.twice_the_references_error(1e-3, dtype, tensor_core_k=4096)
        assert on_tensor_cores.relative == 2e-3 + (half_ulp + 2.0**-20 + 2.0**-16)

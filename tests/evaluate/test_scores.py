import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.evaluate.scores import harmonic_mean, recovered_fraction

share = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)


def test_recovered_fraction_of_the_ends_and_beyond():
    assert recovered_fraction(0.6, alone=0.6, teacher=0.8) == 0
    assert recovered_fraction(0.8, alone=0.6, teacher=0.8) == 1
    assert recovered_fraction(0.65, alone=0.6, teacher=0.8) == pytest.approx(0.25)
    assert recovered_fraction(0.5, alone=0.6, teacher=0.8) == pytest.approx(-0.5)
    assert recovered_fraction(0.3, alone=0.5, teacher=0.1) == pytest.approx(0.5)  # a loss: lower is better
    assert recovered_fraction(0.7, alone=0.6, teacher=0.6) is None


@given(share, share)
def test_the_harmonic_mean_lies_between_the_smaller_and_the_mean(base, new):
    assert min(base, new) <= harmonic_mean(base, new) * (1 + 1e-9)
    assert harmonic_mean(base, new) <= (base + new) / 2 * (1 + 1e-9)
    assert harmonic_mean(base, new) == harmonic_mean(new, base)
    assert harmonic_mean(base, 0) == 0


def test_the_harmonic_mean_by_hand():
    assert harmonic_mean(0.8, 0.4) == pytest.approx(0.64 / 1.2)

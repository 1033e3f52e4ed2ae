"""Inferred adapters: the teacher's shape from the student's, linear, and no larger than needed."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.errors import BadInput
from limbeck.modules.projectors import ConvReg, infer_adapter

vectors = st.tuples(st.integers(1, 9))
tokens = st.tuples(st.sampled_from([1, 4, 9, 16, 17, 26, 50]), st.integers(1, 9))
maps = st.tuples(st.integers(1, 9), st.integers(2, 8), st.integers(2, 8))


@settings(deadline=None, max_examples=200)
@given(st.one_of(maps, tokens.filter(lambda shape: shape[0] > 2)), st.one_of(vectors, tokens, maps))
def test_every_grid_reaches_every_layout(student, teacher):
    adapter = infer_adapter((3, *student), (3, *teacher))
    features = torch.randn(3, *student, requires_grad=True)
    adapted = adapter(features)
    assert adapted.shape == (3, *teacher)
    adapted.square().sum().backward()
    assert torch.isfinite(features.grad).all()
    assert features.grad.any()
    a, b = torch.randn(2, 3, *student)
    zero = adapter(torch.zeros_like(a))
    torch.testing.assert_close(adapter(a + b) - zero, adapter(a) + adapter(b) - 2 * zero, rtol=1e-4, atol=1e-4)
    assert "\n" not in repr(adapter)


@pytest.mark.parametrize("shape", [(2, 5), (2, 7, 5), (2, 5, 4, 4), (2, 3, 4, 5, 6)])
def test_equal_shapes_need_nothing(shape):
    assert isinstance(infer_adapter(shape, shape), nn.Identity)


@pytest.mark.parametrize(
    ("student", "teacher", "line"),
    [
        ((2, 5), (2, 7), "Linear(in_features=5, out_features=7, bias=True)"),
        ((2, 50, 5), (2, 50, 7), "Linear(in_features=5, out_features=7, bias=True)"),
        ((2, 5, 4, 4), (2, 7, 4, 4), "Conv2d(5, 7, kernel_size=(1, 1), stride=(1, 1))"),
        ((2, 5, 8, 8), (2, 7, 4, 4), "FeatureAdapter(8x8 map of 5 -> 4x4 map of 7)"),
        ((2, 5, 7, 7), (2, 197, 8), "FeatureAdapter(7x7 map of 5 -> class token + 14x14 tokens of 8)"),
        ((2, 17, 5), (2, 9, 5), "FeatureAdapter(class token + 4x4 tokens of 5 -> 3x3 tokens of 5)"),
        ((2, 20, 5), (2, 12, 6), "FeatureAdapter(20 tokens of 5 -> 12 tokens of 6)"),
        ((2, 5, 1, 1), (2, 6), "FeatureAdapter(1x1 map of 5 -> vector of 6)"),
    ],
)
def test_one_readable_line(student, teacher, line):
    assert repr(infer_adapter(student, teacher)) == line


def test_a_smaller_grid_is_an_average_and_a_larger_one_an_interpolation():
    grid = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(infer_adapter((1, 1, 4, 4), (1, 1, 2, 2))(grid), F.avg_pool2d(grid, 2))
    larger = infer_adapter((1, 1, 4, 4), (1, 1, 8, 8))(grid)
    torch.testing.assert_close(larger, F.interpolate(grid, (8, 8), mode="bilinear"))
    assert not list(infer_adapter((1, 1, 4, 4), (1, 1, 8, 8)).parameters())


def test_class_tokens_meet_are_dropped_or_are_the_mean():
    features = torch.arange(17.0).view(1, 17, 1)
    shrunk = infer_adapter((1, 17, 1), (1, 5, 1))(features)
    assert shrunk[0, 0] == 0  # the student's class token
    torch.testing.assert_close(shrunk[0, 1:, 0], F.avg_pool2d(features[:, 1:].view(1, 1, 4, 4), 2).flatten())
    assert infer_adapter((1, 17, 1), (1, 4, 1))(features)[0, 0] == shrunk[0, 1]
    from_map = infer_adapter((1, 1, 4, 4), (1, 5, 1))(torch.arange(16.0).view(1, 1, 4, 4))
    assert from_map[0, 0, 0] == 7.5


@pytest.mark.parametrize(
    ("student", "teacher", "reason"),
    [
        ((2, 5), (2, 5, 4, 4), "one vector has no positions"),
        ((2, 5, 1, 1), (2, 9, 5), "one vector has no positions"),
        ((2, 20, 5), (2, 5, 4, 4), "a square"),
        ((2, 5, 4, 4), (2, 20, 5), "a square"),
        ((2, 5), (3, 6), "batch sizes differ"),
        ((2, 5, 4), (2, 5, 4, 4, 4), "tap features of shape"),
    ],
)
def test_the_impossible_names_both_shapes(student, teacher, reason):
    with pytest.raises(BadInput, match=reason) as refusal:
        infer_adapter(student, teacher)
    assert str(list(student)) in str(refusal.value)
    assert str(list(teacher)) in str(refusal.value)


@pytest.mark.parametrize("teacher", [(2, 5, 3, 4), (2, 5, 6, 8), (2, 5, 12, 16), (2, 5, 4, 7)])
def test_conv_reg_reaches_the_teacher_size(teacher):
    assert ConvReg((2, 3, 6, 8), teacher)(torch.randn(2, 3, 6, 8)).shape == teacher


def test_conv_reg_refuses_a_student_map_that_is_too_small():
    with pytest.raises(BadInput, match=r"\[2, 3, 4, 4\].*\[2, 5, 6, 6\]"):
        ConvReg((2, 3, 4, 4), (2, 5, 6, 6))

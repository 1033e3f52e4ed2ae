"""The trained parts of losses on maps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.errors import BadInput
from limbeck.losses.maps import hcl, masked_generation, ofd, pool_to_smaller, variational
from limbeck.modules.regressors import ABF, Generation, OFDConnector, ReviewFusion, SimKDProjector, VIDRegressor


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def fall(parameters, loss, steps=60, lr=0.03):
    """How far a loss falls, as a part of where it began, when only these parameters are trained."""
    optimiser = torch.optim.Adam(parameters, lr)
    first = loss().item()
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    return 1 - loss().item() / first


# ---- VID


def test_the_variance_starts_at_five_and_is_trained():
    regressor = VIDRegressor((2, 3, 4, 4), (2, 6, 4, 4))
    torch.testing.assert_close(F.softplus(regressor.log_scale) + 1e-5, torch.full((6,), 5.0))
    assert [tuple(parameter.shape) for parameter in regressor.parameters()] == [(6,), (6, 3, 1, 1), (6, 6, 1, 1), (6, 6, 1, 1)]
    student, teacher = draw(2, 3, 4, 4), draw(2, 6, 4, 4, seed=1)
    assert fall(regressor.parameters(), lambda: variational(regressor(student), teacher, regressor.log_scale), steps=300) > 0.5
    error = (regressor(student) - teacher).square().mean((0, 2, 3))
    torch.testing.assert_close(F.softplus(regressor.log_scale), error, rtol=0.1, atol=0)  # the likeliest variance


@pytest.mark.parametrize(("size", "expected"), [((8, 8), (4, 6)), ((2, 3), (2, 3)), ((2, 12), (2, 6))])
def test_a_larger_student_is_averaged_before_vid_and_simkd(size, expected):
    student, teacher = draw(2, 3, *size), draw(2, 5, 4, 6, seed=1)
    for module in (VIDRegressor(student.shape, teacher.shape), SimKDProjector(student.shape, teacher.shape)):
        first, target = pool_to_smaller(student, teacher)
        predicted, reference = module(student), module(first)
        assert predicted.shape == target.shape == (2, 5, *expected)
        torch.testing.assert_close(predicted, reference)


# ---- ReviewKD

STUDENT = [(2, 4, 8, 8), (2, 6, 4, 4), (2, 10, 1, 1)]
TEACHER = [(2, 5, 16, 12), (2, 7, 2, 2), (2, 9, 1, 1)]


def test_review_fusion_reaches_each_teacher_and_deeper_layers_reach_shallower_ones():
    fusion = ReviewFusion(STUDENT, TEACHER)
    features = [draw(*shape).requires_grad_() for shape in STUDENT]
    fused = fusion(features)
    assert [tuple(layer.shape) for layer in fused] == TEACHER
    for depth, layer in enumerate(fused):
        gradients = torch.autograd.grad(layer.pow(3).sum(), features, retain_graph=True, allow_unused=True)
        assert [gradient is not None and bool(gradient.any()) for gradient in gradients] == [other >= depth for other in range(3)]


def test_review_fusion_learns():
    fusion = ReviewFusion(STUDENT, TEACHER)
    features = [draw(*shape) for shape in STUDENT]
    targets = [draw(*shape, seed=1) for shape in TEACHER]

    def loss():
        return sum(hcl(ours, target) for ours, target in zip(fusion(features), targets, strict=True))

    assert fall(fusion.parameters(), loss) > 0.5


def test_the_maps_that_are_fused_are_as_wide_as_the_deepest_and_at_most_512():
    assert ReviewFusion(STUDENT, TEACHER).deepest(draw(*STUDENT[-1]))[1].shape == (2, 10, 1, 1)
    wide = ReviewFusion([(2, 4, 2, 2), (2, 600, 1, 1)], [(2, 3, 2, 2), (2, 3, 1, 1)])
    assert wide.shallow[0].gate.weight.shape == (2, 2 * 512, 1, 1)


def test_abf_mixes_its_features_and_the_nearest_residual_by_its_gates():
    block = ABF((2, 3, 4, 6), (2, 5, 4, 6), channels=2, fuse=True).eval()
    nn.init.zeros_(block.gate.weight)
    block.gate.bias.data = torch.tensor([0.0, 100.0])  # half of the features, all of the residual
    features, residual = draw(2, 3, 4, 6), draw(2, 2, 2, 3, seed=1)
    _, fused = block(features, residual)
    expected = block.squeeze(features) / 2 + residual.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(fused, expected)


# ---- OFD


def test_the_connector_is_linear_and_normalises():
    connector = OFDConnector((8, 4, 5, 5), (8, 6, 5, 5))
    student, teacher = draw(8, 4, 5, 5), draw(8, 6, 5, 5, seed=1)
    projected = connector(student)
    torch.testing.assert_close(projected.mean((0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(projected.var((0, 2, 3), correction=0), torch.ones(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(connector(-3 * student), -projected, atol=1e-4, rtol=0)  # linear but for the scale: no ReLU
    assert sum(parameter.numel() for parameter in connector.parameters()) == 4 * 6 + 2 * 6
    margin = torch.full((6,), -0.5)
    assert fall(connector.parameters(), lambda: ofd(connector(student), teacher, margin)) > 0.5


# ---- MGD


def test_without_a_mask_the_loss_is_the_squared_error_of_the_generation():
    student, teacher = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=1)
    generation = Generation(student.shape, teacher.shape, mask="channel", drop=0.15)
    assert isinstance(generation.align, nn.Identity)
    ones = torch.ones(3, 4, 1, 1, dtype=torch.bool)
    expected = (generation.generate(student) - teacher).square().sum() / 3
    torch.testing.assert_close(masked_generation(generation(student, ones), teacher, alpha=1), expected)


@pytest.mark.parametrize(("kind", "drop"), [("pixel", 0.65), ("pixel", 0.75), ("channel", 0.15)])
def test_the_mask_drops_what_it_is_told_as_often_as_it_is_told(kind, drop):
    generation = Generation((50, 30, 20, 20), (50, 30, 20, 20), mask=kind, drop=drop)
    mask = generation.draw_mask(draw(50, 30, 20, 20))
    assert mask.dtype == torch.bool
    assert mask.shape == ((50, 1, 20, 20) if kind == "pixel" else (50, 30, 1, 1))
    assert (~mask).float().mean().item() == pytest.approx(drop, abs=0.05)


def test_what_is_dropped_does_not_matter_and_what_is_kept_is_not_rescaled():
    generation = Generation((2, 3, 4, 4), (2, 5, 4, 4), drop=0.5)
    seen = []
    generation.generate.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    student = draw(2, 3, 4, 4).requires_grad_()
    mask = generation.draw_mask(student, generator=torch.Generator().manual_seed(0))
    restored = generation(student, mask)
    torch.testing.assert_close(seen[0], torch.where(mask, generation.align(student), 0))
    (gradient,) = torch.autograd.grad(restored.square().sum(), student)
    assert torch.equal(gradient.any(1, keepdim=True), mask)


def test_masks_come_from_a_generator_or_from_the_global_one():
    generation = Generation((8, 3, 6, 6), (8, 3, 6, 6))
    student = draw(8, 3, 6, 6)
    ours = [generation.draw_mask(student, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(ours[0], ours[1]) and not torch.equal(ours[0], ours[2])
    torch.manual_seed(3)
    first, second = generation(student), generation(student)
    torch.manual_seed(3)
    assert torch.equal(generation(student), first) and not torch.equal(first, second)


def test_generation_learns_what_is_masked_from_what_is_not():
    smooth = F.interpolate(draw(16, 4, 2, 2), (8, 8), mode="bilinear")
    generation = Generation(smooth.shape, smooth.shape, drop=0.3)
    assert fall(generation.parameters(), lambda: masked_generation(generation(smooth), smooth)) > 0.5


# ---- SimKD


def test_the_projector_is_a_bottleneck_that_ends_in_a_relu():
    projector = SimKDProjector((2, 3, 4, 4), (2, 12, 4, 4), factor=4)
    shapes = [tuple(module.weight.shape) for module in projector.modules() if isinstance(module, nn.Conv2d)]
    assert shapes == [(3, 3, 1, 1), (3, 3, 3, 3), (12, 3, 1, 1)]
    assert all(module.bias is None for module in projector.modules() if isinstance(module, nn.Conv2d))
    assert projector(draw(2, 3, 4, 4)).min().item() == 0
    default = SimKDProjector((2, 3, 4, 4), (2, 12, 4, 4))
    assert default.project[0].out_channels == 6


# ---- refusals


@pytest.mark.parametrize("module", [VIDRegressor, OFDConnector, Generation, SimKDProjector])
def test_maps_are_expected(module):
    with pytest.raises(
        BadInput, match=rf"{module.__name__} cannot map the student's \[2, 5, 8\] .*\[2, 6, 4, 4\].*\[B, C, H, W\]"
    ):
        module((2, 5, 8), (2, 6, 4, 4))


@pytest.mark.parametrize("module", [OFDConnector, Generation])
def test_one_size_is_expected(module):
    with pytest.raises(
        BadInput, match=rf"{module.__name__} cannot map the student's \[2, 5, 8, 8\] .*\[2, 6, 4, 4\].*resolution"
    ):
        module((2, 5, 8, 8), (2, 6, 4, 4))


def test_other_refusals():
    shape = (2, 5, 4, 4)
    with pytest.raises(BadInput, match=r"factor is 6.*5 channels"):
        SimKDProjector(shape, shape, factor=6)
    with pytest.raises(BadInput, match="mask is 'patch'"):
        Generation(shape, shape, mask="patch")
    with pytest.raises(BadInput, match=r"drop is 1.0"):
        Generation(shape, shape, drop=1.0)
    with pytest.raises(BadInput, match="2 maps of the student and 1 of the teacher"):
        ReviewFusion([shape, shape], [shape])
    with pytest.raises(BadInput, match="0 maps"):
        ReviewFusion([], [])
    with pytest.raises(BadInput, match=r"ReviewFusion cannot map the student's \[2, 5\].*tap maps"):
        ReviewFusion([shape, (2, 5)], [shape, shape])

"""Directions of an embedding: what they are orthogonal to, how they share variance, and the probabilities that they split."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import losses
from limbeck.errors import BadInput
from limbeck.modules.heads import SumSubclasses
from limbeck.modules.subclasses import (
    ClassMoments,
    SubclassDirections,
    null_space,
    principal_directions,
    random_directions,
    random_rotation,
    subclass_targets,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def cloud(samples=60, width=6, classes=3, seed=0):
    """Embeddings with unequal variances, and their classes."""
    labels = torch.arange(samples) % classes
    return draw(samples, width, seed=seed) * torch.arange(1, width + 1) + 10 * labels[:, None], labels


def fitted(embeddings, labels, basis=None, *, classes=3, subclasses=2, seed=0, **options):
    moments = ClassMoments(classes, embeddings.shape[1])
    for rows, own in zip(embeddings.split(7), labels.split(7), strict=True):
        moments.add(rows, own)
    split = SubclassDirections(classes, embeddings.shape[1], subclasses)
    basis = torch.eye(embeddings.shape[1], dtype=torch.float64) if basis is None else basis
    split.fit(moments, basis, generator=generator(seed), **options)
    return split


def test_moments_gathered_by_batches_are_those_of_the_whole():
    embeddings, labels = cloud()
    moments = ClassMoments(3, 6)
    for rows, own in zip(embeddings.float().split(7), labels.split(7), strict=True):
        moments.add(rows, own)
    means, covariances = moments.statistics()
    for label in range(3):
        own = embeddings[labels == label]
        torch.testing.assert_close(means[label], own.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(covariances[label], own.T.cov(correction=0), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(2, 8), st.integers(0, 1000))
def test_the_null_space_is_orthonormal_and_read_by_no_row(classes, width, seed):
    weight = draw(classes, width, seed=seed)
    weight[-1] = weight[0]  # rank is less than the number of rows
    rank = torch.linalg.matrix_rank(weight).item()
    basis = null_space(weight.float())
    assert basis.shape == (width, width - rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(width - rank, dtype=torch.float64))
    assert (weight.float().double() @ basis).abs().max().item() < 1e-5 if width > rank else True


def test_principal_directions_are_those_of_most_variance_within_the_subspace():
    samples = draw(200, 5) * torch.tensor([5.0, 4, 3, 2, 1])
    basis = null_space(torch.eye(5)[:1])  # leaves the first axis, the widest, out
    directions, variances = principal_directions(samples.T.cov(correction=0), basis, 2)
    values, vectors = torch.linalg.eigh(samples[:, 1:].T.cov(correction=0))
    torch.testing.assert_close(variances, values.flip(0)[:2])
    assert not directions[0].abs().gt(1e-9).any()
    torch.testing.assert_close((directions[1:] * vectors.flip(1)[:, :2]).sum(0).abs(), torch.ones(2, dtype=torch.float64))
    assert (directions.gather(0, directions.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_rotation_makes_variances_equal_in_expectation():
    """The mean over many rotations of each direction's variance is trace / S; without one it is that of PCA."""
    variances = torch.tensor([9.0, 3.0, 1.0, 0.2], dtype=torch.float64)
    draws = generator()
    seen = []
    for _ in range(3000):
        rotation = random_rotation(4, draws)
        seen.append((rotation.square() * variances[:, None]).sum(0))
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(torch.stack(seen).mean(0), variances.mean().expand(4), rtol=0.05, atol=0)


@pytest.mark.parametrize("directions", ["pca", "random"])
@pytest.mark.parametrize("rotation", ["per-class", "shared", "none"])
def test_directions_are_orthonormal_unread_and_of_unit_mean_variance(directions, rotation):
    embeddings, labels = cloud()
    weight = draw(3, 6, seed=5).float()
    split = fitted(embeddings, labels, null_space(weight), directions=directions, rotation=rotation)
    for own in split.directions:
        torch.testing.assert_close(own.T @ own, torch.eye(2), rtol=0, atol=1e-6)
        assert (weight @ own).abs().max() < 1e-5
    moved = embeddings.float() + 3 * weight[1]
    torch.testing.assert_close(split(moved), split(embeddings.float()), rtol=1e-4, atol=1e-4)
    for label in range(3):
        own = split(embeddings.float())[labels == label, label]
        torch.testing.assert_close(own.mean(0), torch.zeros(2), rtol=0, atol=1e-4)
        torch.testing.assert_close(own.var(0, correction=0).mean(), torch.ones(()), rtol=1e-4, atol=0)


def test_rotations_are_shared_or_not_and_follow_the_seed():
    embeddings, labels = cloud()
    plain = fitted(embeddings, labels, rotation="none")
    turns = {
        rotation: torch.stack([p.T @ u for p, u in zip(plain.directions, split.directions, strict=True)])
        for rotation in ("shared", "per-class")
        for split in [fitted(embeddings, labels, rotation=rotation)]
    }
    torch.testing.assert_close(turns["shared"][0], turns["shared"][2], rtol=0, atol=1e-5)
    assert (turns["per-class"][0] - turns["per-class"][2]).abs().max() > 0.05
    for directions in ("pca", "random"):
        same, other = (fitted(embeddings, labels, seed=seed, directions=directions).directions for seed in (0, 1))
        assert torch.equal(same, fitted(embeddings, labels, directions=directions).directions)
        assert (same - other).abs().max() > 0.05


def test_without_unit_variance_coordinates_are_projections():
    embeddings, labels = cloud()
    split = fitted(embeddings, labels, unit_variance=False)
    expected = (embeddings.float() - split.means[1]) @ split.directions[1]
    torch.testing.assert_close(split(embeddings.float())[:, 1], expected, rtol=1e-4, atol=1e-3)


def test_random_directions_lie_in_the_subspace():
    basis = null_space(draw(2, 6))
    directions = random_directions(basis, 3, generator())
    torch.testing.assert_close(basis @ basis.T @ directions, directions)
    torch.testing.assert_close(directions.T @ directions, torch.eye(3, dtype=torch.float64))


def test_more_subclasses_than_directions_of_variance_warn_and_stay_orthonormal():
    embeddings, labels = cloud(width=4)
    embeddings[labels == 2, 1:] = 0  # class 2 varies along one axis
    with pytest.warns(UserWarning, match="class 2 varies in 1 directions only"):
        split = fitted(embeddings, labels, subclasses=3)
    for own in split.directions:
        torch.testing.assert_close(own.T @ own, torch.eye(3), rtol=0, atol=1e-6)
    assert torch.isfinite(split(embeddings.float())).all()
    embeddings[labels == 2] = 7  # and now not at all
    with pytest.warns(UserWarning, match="varies in 0 directions"):
        split = fitted(embeddings, labels, subclasses=3)
    assert split.scale[2] == 1


def test_a_class_of_fewer_than_two_samples_takes_the_directions_of_all():
    embeddings, labels = cloud(classes=2)
    labels[0] = 2
    with pytest.warns(UserWarning, match="fewer than 2 samples of class 2, 3"):
        split = fitted(embeddings, labels, classes=4, rotation="none")
    torch.testing.assert_close(split.means[2], embeddings[0].float())
    torch.testing.assert_close(split.means[3], embeddings.mean(0).float())
    everything, _ = principal_directions(embeddings.T.cov(correction=0), torch.eye(6, dtype=torch.float64), 2)
    torch.testing.assert_close(split.directions[2], everything.float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(BadInput, match="1 samples"):
        fitted(embeddings[:1], labels[:1], classes=4)


def test_before_the_fit_nothing_passes_for_a_number():
    assert SubclassDirections(2, 4, 3)(torch.zeros(1, 4)).isnan().all()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 6), st.floats(0.5, 5), st.floats(0.05, 20), st.integers(0, 1000))
def test_targets_are_the_teachers_probabilities_split(classes, subclasses, tau, beta, seed):
    logits, coordinates = 3 * draw(4, classes, seed=seed), 3 * draw(4, classes, subclasses, seed=seed + 1)
    targets = subclass_targets(logits, coordinates, tau=tau, beta=beta).exp()
    assert (targets >= 0).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(targets.unflatten(1, (classes, subclasses)).sum(2), (logits / tau).softmax(1))
    student = draw(4, classes * subclasses, seed=seed + 2)
    torch.testing.assert_close(
        SumSubclasses(subclasses)(student).softmax(1), student.softmax(1).unflatten(1, (classes, -1)).sum(2)
    )


def test_the_ends_of_the_subclass_temperature():
    logits, coordinates = draw(4, 2), draw(4, 2, 3)
    classes = logits.softmax(1)[..., None]
    uniform = subclass_targets(logits, coordinates, beta=1e9).exp().unflatten(1, (2, 3))
    torch.testing.assert_close(uniform, (classes / 3).expand(4, 2, 3))
    hard = subclass_targets(logits, coordinates, beta=1e-6)
    one_hot = torch.nn.functional.one_hot(coordinates.argmax(2), 3) * classes
    torch.testing.assert_close(hard.exp().unflatten(1, (2, 3)), one_hot)
    student = torch.zeros(4, 6, requires_grad=True)
    loss = losses.kl_divergence(student, hard)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_the_chain_rule_of_the_loss():
    """KL(t || q) is the KL of the classes plus each class's share of the KL within it."""
    logits, coordinates, student = draw(5, 3), draw(5, 3, 4, seed=1), draw(5, 12, seed=2)
    whole = losses.kl_divergence(student, subclass_targets(logits, coordinates, beta=0.5), reduction="none")
    classes = losses.kl_divergence(SumSubclasses(4)(student), logits, reduction="none")
    within = losses.kl_divergence(student.unflatten(1, (3, 4)), coordinates / 0.5, reduction="none")
    torch.testing.assert_close(whole, classes + (logits.softmax(1) * within).sum(1))


def test_a_student_uniform_within_classes_pays_what_it_does_not_know():
    logits, coordinates = draw(5, 3), draw(5, 3, 4, seed=1)
    student = logits[..., None].expand(5, 3, 4).flatten(1)
    within = coordinates.softmax(2)
    entropy = -(within * within.log()).sum(2)
    expected = (logits.softmax(1) * (torch.tensor(4.0).log() - entropy)).sum(1)
    torch.testing.assert_close(losses.kl_divergence(student, subclass_targets(logits, coordinates), reduction="none"), expected)


def test_summed_probabilities_choose_another_class_than_the_largest():
    logits = torch.tensor([[0.45, 0.05, 0.26, 0.24]]).log()
    assert logits.argmax(1).item() // 2 == 0
    assert SumSubclasses(2)(logits).softmax(1).allclose(torch.tensor([[0.5, 0.5]]))
    logits = torch.tensor([[0.4, 0.05, 0.3, 0.25]]).log()
    assert logits.argmax(1).item() // 2 == 0
    assert SumSubclasses(2)(logits).argmax(1).item() == 1


def test_half_precision_is_split_in_float32():
    embeddings, labels = cloud()
    split = fitted(embeddings, labels)
    half = embeddings.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(split(half), split(half.float()))
        targets = subclass_targets(draw(60, 3).bfloat16(), split(half))
    assert targets.dtype == torch.float32
    assert copy.deepcopy(split).state_dict().keys() == {"means", "directions", "scale"}

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.evaluate.features import STRENGTHS, fit_linear_probe, nearest_neighbours


def test_the_probe_is_the_logistic_regression_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(90, 5, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0]) + 2
    labels = torch.randint(3, (90,), generator=generator)
    ours = fit_linear_probe(features, labels, strengths=(0.1,))
    standard = (features.double() - features.double().mean(0)) / features.double().std(0, correction=0)
    theirs = linear_model.LogisticRegression(C=1 / (0.1 * 90), tol=1e-8, max_iter=1000).fit(standard.numpy(), labels.numpy())
    assert torch.allclose(ours.weight, torch.from_numpy(theirs.coef_), atol=1e-3)
    assert torch.allclose(ours(features).softmax(-1), torch.from_numpy(theirs.predict_proba(standard.numpy())), atol=1e-3)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_the_probe_does_not_depend_on_the_scale_of_a_feature(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    features, labels = torch.randn(30, 3, generator=generator), torch.arange(30) % 3
    scaled = features * torch.tensor([1.0, scale, 1.0])
    ours, theirs = fit_linear_probe(features, labels, (0.1,))(features), fit_linear_probe(scaled, labels, (0.1,))(scaled)
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_the_strength_is_chosen_on_held_out_samples():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    noise = torch.randn(60, 40, generator=generator)  # enough to fit every label, and worth nothing
    assert fit_linear_probe(noise, labels).strength > STRENGTHS[-1]
    signal = torch.cat([noise, 3.0 * labels[:, None] + noise[:, :1]], dim=1)
    probe = fit_linear_probe(signal, labels)
    assert (probe(signal).argmax(-1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("labels", [[0], [1, 0], [0, 0, 0, 0]])
def test_a_probe_of_next_to_nothing_still_answers(labels):
    features = torch.arange(2.0 * len(labels)).view(-1, 2)
    features[:, 1] = 1  # a constant feature
    logits = fit_linear_probe(features, torch.tensor(labels))(features)
    assert logits.isfinite().all()
    assert logits.argmax(-1).tolist() == labels or len(labels) == 1


def test_the_vote_by_hand():
    reference = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    asked = torch.tensor([[2.0, 1.0]])  # cosines 0.894, 0.447, 0.447
    assert nearest_neighbours(asked, reference, labels, k=1).tolist() == [0]
    assert nearest_neighbours(asked, reference, labels).tolist() == [0]  # e^(0.894 / 0.07) > 2 e^(0.447 / 0.07)
    assert nearest_neighbours(asked, reference, labels, temperature=10.0).tolist() == [1]  # now heads are counted
    assert nearest_neighbours(7 * asked, reference, labels, temperature=10.0).tolist() == [1]


def test_one_neighbour_of_the_reference_itself_is_itself():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 8, generator=generator), torch.randint(5, (40,), generator=generator)
    assert torch.equal(nearest_neighbours(features, features, labels, k=1), labels)

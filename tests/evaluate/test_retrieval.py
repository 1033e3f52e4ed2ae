import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import BadInput
from limbeck.evaluate import retrieval
from limbeck.evaluate.retrieval import image_text_retrieval, recall_at_k, same_class_retrieval


def scores(seed, images, captions=1):
    return torch.randn(images, images * captions, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 3))
def test_recall_grows_with_k_and_ends_at_100(seed, images, captions):
    similarity = scores(seed, images, captions)
    found = [recall_at_k(similarity, k, captions) for k in range(1, images * captions + 1)]
    for direction in zip(*found, strict=True):
        assert list(direction) == sorted(direction)
        assert direction[-1] == 100


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 8))
def test_transposing_swaps_the_directions(seed, images, k):
    similarity = scores(seed, images)
    assert recall_at_k(similarity.T, k) == recall_at_k(similarity, k)[::-1]


def test_any_caption_is_a_hit_and_each_caption_asks():
    # Image 0 finds its second caption first; its first caption prefers image 1.
    similarity = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.5, 0.0, 0.8, 0.7]])
    assert recall_at_k(similarity, 1, captions_per_image=2) == (100, 75)
    found = image_text_retrieval(similarity, 2)
    assert found["rsum"] == pytest.approx(100 * 3 + 75 + 100 * 2)
    assert found["text_to_image_r1"] == 75


def test_equal_scores_find_nothing():
    assert recall_at_k(torch.ones(4, 4), 1) == (0, 0)
    assert recall_at_k(torch.ones(4, 4), 4) == (100, 100)
    assert recall_at_k(torch.eye(4), 1) == (100, 100)


@pytest.mark.parametrize(
    ("similarity", "k", "says"),
    [
        (torch.ones(2, 3), 1, "expected \\[images, images \\* captions_per_image\\] with 1"),
        (torch.ones(2, 2), 0, "expected at least 1"),
        (torch.full((2, 2), torch.nan), 1, "NaN"),
    ],
)
def test_what_cannot_be_ranked_is_refused(similarity, k, says):
    with pytest.raises(BadInput, match=says):
        recall_at_k(similarity, k)


def test_same_class_retrieval_by_hand():
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 30.0, 35.0]))
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = same_class_retrieval(features, torch.tensor([0, 1, 0, 1]))
    # Ranks of the one relevant picture: 2nd of 0 (after 10), 3rd of 10 (after 0, 30), 3rd of 30 (after 35, 10), 2nd of 35 (after 30).
    assert found == pytest.approx({"r1": 0, "r5": 1, "map": (1 / 2 + 1 / 3 + 1 / 3 + 1 / 2) / 4})


def test_average_precision_is_that_of_scikit_learn_whatever_the_number_of_rows(monkeypatch):
    average_precision = pytest.importorskip("sklearn.metrics").average_precision_score
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(20, 4, generator=generator), torch.randint(3, (20,), generator=generator)
    unit = torch.nn.functional.normalize(features, dim=-1)
    expected = []
    for query in range(20):
        others = torch.arange(20) != query
        expected.append(average_precision(labels[others] == labels[query], (unit @ unit[query])[others]))
    found = same_class_retrieval(features, labels)
    assert found["map"] == pytest.approx(sum(expected) / 20, abs=1e-6)
    monkeypatch.setattr(retrieval, "ROWS", 7)
    assert same_class_retrieval(3 * features, labels) == pytest.approx(found)


def test_a_picture_alone_in_its_class_does_not_ask():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    assert same_class_retrieval(features, torch.tensor([0, 0, 1])) == {"r1": 1, "r5": 1, "map": 1}
    assert same_class_retrieval(features, torch.tensor([0, 1, 2])) == {"r1": 0, "r5": 0, "map": 0}

import pytest
import torch
import torch.nn.functional as F

from limbeck.errors import BadInput
from limbeck.models.prompts import class_weights

TEMPLATES = ["a photo of a {}.", "a drawing of a {}.", "the {}"]


def encode(texts):
    """An embedding a text, the same each time."""
    return torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(sum(text.encode()))) for text in texts])


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts():
    weights = class_weights(encode, ["cat", "dog"], TEMPLATES)
    assert weights.shape == (6, 2)
    expected = sum(F.normalize(encode([text]), dim=-1)[0] for text in ("a photo of a dog.", "a drawing of a dog.", "the dog"))
    assert torch.allclose(weights[:, 1], expected / expected.norm())
    assert torch.allclose(weights.norm(dim=0), torch.ones(2))


def test_an_ensemble_of_one_template_is_that_template():
    one = class_weights(encode, ["cat", "dog"], TEMPLATES[:1])
    assert torch.allclose(one.T, F.normalize(encode(["a photo of a cat.", "a photo of a dog."]), dim=-1))
    assert torch.allclose(one, class_weights(encode, ["cat", "dog"], TEMPLATES[:1] * 3))


def test_neither_the_scale_of_texts_nor_of_pictures_changes_the_answer():
    def louder(texts):
        return encode(texts) * torch.tensor([1.0 + len(text) for text in texts])[:, None]

    names = ["cat", "dog", "bird", "fish"]
    weights = class_weights(encode, names, TEMPLATES)
    assert torch.allclose(weights, class_weights(louder, names, TEMPLATES), atol=1e-6)
    pictures = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    scaled = pictures * torch.rand(50, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    assert torch.equal((scaled @ weights).argmax(-1), (pictures @ weights).argmax(-1))


def test_braces_in_a_name_are_part_of_it():
    seen = []
    class_weights(lambda texts: seen.extend(texts) or torch.ones(len(texts), 2), ["{0}"], ["a {} {here}"])
    assert seen == ["a {0} {here}"]


@pytest.mark.parametrize(
    ("names", "templates", "says"),
    [
        ([], TEMPLATES, "0 names and 3 templates"),
        (["cat"], [], "1 names and 0 templates"),
        (["cat"], ["a photo"], "'a photo' has no place for the class name"),
    ],
)
def test_what_makes_no_classifier_is_refused(names, templates, says):
    with pytest.raises(BadInput, match=says):
        class_weights(encode, names, templates)

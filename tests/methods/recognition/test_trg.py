"""TRG: which patches are compared, where each term's gradient goes, and how the temperature falls."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.errors import BadInput
from limbeck.methods.recognition.trg import TRG, TRGConfig, draw_positions, falling, patch_map, take, tokens_on
from limbeck.methods.registry import configure
from limbeck.models.classifier import Classifier
from limbeck.models.tiny.classifiers import build

CLASSES = 4


def pictures(count: int = 6, seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.rand(count, 1, 16, 16, generator=draw),
        "labels": torch.randint(CLASSES, (count,), generator=draw),
        "ids": [str(index) for index in range(count)],
    }


def cnn(*widths: int, seed: int = 0) -> Classifier:
    return build("cnn", CLASSES, seed, widths=widths)


def vit(width: int, seed: int = 0, **options) -> Classifier:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=16, patch_size=2, in_chans=1, num_classes=CLASSES, embed_dim=width, depth=2, num_heads=2, **options
    )
    return Classifier(model, channels=1)


PAIRS = {
    "cnn-cnn": (lambda: cnn(3, 5), lambda: cnn(8, 12, seed=1), (8, 8)),
    "cnn of fewer patches": (lambda: cnn(3, 5, 6), lambda: cnn(8, 12, seed=1), (4, 4)),
    "cnn to vit": (lambda: vit(8), lambda: cnn(8, 12, seed=1), (8, 8)),
    "vit to cnn": (lambda: cnn(3, 5, 6), lambda: vit(16), (4, 4)),
    "vit with registers": (lambda: cnn(3, 5), lambda: vit(16, reg_tokens=3), (8, 8)),
    "vit-vit": (lambda: vit(8), lambda: vit(16, seed=1), (8, 8)),
}


def method(student: nn.Module | None = None, teacher: nn.Module | None = None, **hyper) -> TRG:
    torch.manual_seed(0)
    made = TRG(student or cnn(3, 5), teacher or cnn(8, 12, seed=1), **hyper)
    with torch.no_grad():
        made.eval().prepare(pictures())
    return made.train()


def gradients(term: Tensor, module: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(term, list(module.parameters()), retain_graph=True, allow_unused=True)
    return [gradient for gradient in found if gradient is not None and gradient.any()]


@pytest.mark.parametrize("pair", PAIRS)
def test_any_two_networks_meet_on_a_common_grid_and_every_term_teaches_the_student(pair):
    student, teacher, grid = PAIRS[pair]
    made = method(student(), teacher())
    assert made.grid == grid
    terms = made(pictures())
    assert terms.keys() == {"ce", "kd", "inner", "local", "contrast"}
    for name, term in terms.items():
        assert torch.isfinite(term) and term > 0
        assert gradients(term, made.student), name
        assert bool(gradients(term, made.project_student)) == (name == "contrast")
    assert all(not parameter.requires_grad for parameter in made.teacher.module.parameters())
    assert made.deployable() is made.student


def test_a_student_that_is_the_teacher_has_only_the_contrast_left():
    teacher = cnn(8, 12, seed=1).eval()
    made = method(cnn(8, 12, seed=1), teacher).eval()
    made.project_student = nn.Identity()
    terms = made(pictures())
    assert terms["inner"] == 0
    assert terms["local"].abs() < 1e-6
    assert terms["contrast"] > 0


def test_projection_of_both_sides_is_trained_by_the_contrast_alone():
    made = method(projection=7)
    assert made.project_student.out_features == made.project_teacher.out_features == 7
    for name, term in made(pictures()).items():
        assert bool(gradients(term, made.project_teacher)) == (name == "contrast")


def test_terms_of_weight_zero_do_not_run():
    made = method(inner=0.0, local=0.0, contrast=0.0)
    assert made(pictures()).keys() == {"ce", "kd"}
    assert isinstance(made.project_student, nn.Identity)


def test_class_tokens_are_left_out_and_patches_stay_in_order():
    grid = torch.arange(2 * 3 * 16.0).view(2, 3, 4, 4)
    tokens = grid.flatten(2).mT
    for prefix in (0, 1, 2, 5):
        assert torch.equal(patch_map(torch.cat([torch.full((2, prefix, 3), -1.0), tokens], 1)), grid)
    assert torch.equal(tokens_on((4, 4), grid), tokens)
    assert torch.equal(tokens_on((2, 2), tokens), F.avg_pool2d(grid, 2).flatten(2).mT)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.integers(0, 100))
def test_positions_are_different_and_follow_the_generator(batch, patches, count, seed):
    tokens = torch.randn(batch, patches, 2)
    positions, same = (draw_positions(tokens, count, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(positions, same)
    assert all(len(set(row)) == min(count, patches) for row in positions.tolist())
    taken = take(tokens, positions).view(batch, -1, 2)
    for index, row in enumerate(positions.tolist()):
        assert torch.equal(taken[index], tokens[index, row])


def test_every_patch_is_as_likely():
    drawn = draw_positions(torch.zeros(4000, 5, 1), 2, generator=torch.Generator().manual_seed(0))
    assert (drawn.flatten().bincount() / 4000 - 2 / 5).abs().max() < 0.03


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 1), st.floats(0, 1), st.sampled_from(["cosine", "linear"]))
def test_the_temperature_falls_from_end_to_end(end, gap, schedule):
    values = [falling(end + gap, end, step / 10, schedule) for step in range(11)]
    assert values[0] == end + gap
    assert values[-1] == end
    assert all(after <= before + 1e-12 for before, after in pairwise(values))


def test_the_temperature_follows_the_steps_of_the_run():
    made = method(tau_start=0.5, tau_end=0.1, schedule="linear")
    assert made.tau() == 0.1  # nobody said how many steps there are
    made.total_steps = 5
    seen = []
    for made.steps_done in range(6):
        seen.append(made.tau())
    assert seen == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    made.steps_done = 0
    torch.manual_seed(1)
    early = made(pictures())["contrast"]
    made.steps_done = 4
    torch.manual_seed(1)
    assert made(pictures())["contrast"] != early


def test_a_prepared_method_restores_another():
    first, second = method(), method(cnn(3, 5, seed=7))
    with torch.no_grad():
        second.prepare(pictures(4, seed=3))
    second.load_state_dict(first.state_dict())
    torch.manual_seed(2)
    expected = first.eval()(pictures())
    torch.manual_seed(2)
    assert second.eval()(pictures()).total == expected.total


def test_unlabelled_pictures_still_teach():
    batch = pictures()
    batch["labels"][:] = -100
    terms = method()(batch)
    assert terms["ce"] == 0
    assert terms["kd"] > 0 and terms["inner"] > 0


def test_refusals():
    with pytest.raises(BadInput, match="no patches"):
        method(build("mlp", CLASSES, 0, pixels=256))
    with pytest.raises(BadInput, match=r"grid is 16.*student's last map is 8 x 8"):
        method(grid=16)
    with pytest.raises(BadInput, match="90 tokens are no square grid"):
        patch_map(torch.zeros(2, 90, 3))
    for key, value in (("tokens", 0), ("k", 0), ("temperature", 0.0), ("sigma", -1.0), ("tau_end", 0.9), ("schedule", "step")):
        with pytest.raises(BadInput, match=key if key != "tau_end" else "tau falls"):
            configure(TRG, {key: value})
    assert configure(TRG, {"sigma": 2.0}) == TRGConfig(sigma=2.0)

"""Facts about ProC-KD: what is read of the teacher, which branch learns from what, and what is shipped."""

import copy

import pytest
import torch
from torch import nn

from limbeck.errors import BadInput
from limbeck.methods.recognition.prockd import AugmentedStudent, ProCKD, ProCKDConfig
from limbeck.methods.registry import configure
from limbeck.models.loading import ensure_torchvision
from limbeck.models.tiny.classifiers import build

CLASSES = 3


def vit(classes: int, width: int = 8, size: int = 8, **options) -> nn.Module:
    ensure_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=size, patch_size=2, in_chans=1, num_classes=classes, embed_dim=width, depth=4, num_heads=2, **options
    )


def picture_batch() -> dict:
    draw = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.rand(4, 1, 8, 8, generator=draw),
        "labels": torch.tensor([0, 1, 2, -100]),
        "ids": ["a", "b", "c", "d"],
    }


def method(student: nn.Module | None = None, teacher: nn.Module | None = None, **hyper) -> ProCKD:
    torch.manual_seed(0)
    made = ProCKD(
        student or build("cnn", CLASSES, 1, widths=(4, 6)),
        teacher or build("cnn", 7, 2, widths=(4, 8, 16)),
        **{"prototypes": 5, **hyper},
    )
    with torch.no_grad():
        made.eval().prepare(picture_batch())
    return made.train()


def gradient(term: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(term, [parameter], retain_graph=True, allow_unused=True)
    return torch.zeros_like(parameter) if found is None else found


MODELS = {
    "cnn from cnn": lambda: (build("cnn", CLASSES, 1, widths=(4, 6)), build("cnn", 7, 2, widths=(4, 8, 16))),
    "vit from cnn": lambda: (vit(CLASSES), build("cnn", 7, 2, widths=(4, 8))),
    "cnn from vit": lambda: (build("cnn", CLASSES, 1, widths=(4, 6)), vit(7, 12)),
    "vit from vit": lambda: (vit(CLASSES), vit(7, 12)),
    "averaging vit from vit": lambda: (vit(CLASSES, class_token=False, global_pool="avg", fc_norm=False), vit(7, 12)),
}


@pytest.mark.parametrize("models", MODELS)
def test_any_pair_learns_across_tasks(models):
    student, teacher = MODELS[models]()
    made, batch = method(student, teacher, hint=0.5), picture_batch()
    terms = made(batch)
    assert set(terms) == {"ce", "aug", "kd", "hint"}
    assert terms.total.isfinite()
    terms.total.backward()
    assert made.student.head.weight.shape[0] == CLASSES
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.branch.parameters())
    assert all(p.grad is not None for p in made.learning.parameters())
    assert all(p.grad is None for p in made.teacher.module.parameters())


def test_the_plain_branch_is_the_student():
    for student in (build("cnn", CLASSES, 1, widths=(4, 6)), vit(CLASSES)):
        made, batch = method(student).eval(), picture_batch()
        features, logits = made.branch.read(made.student, batch["pixel_values"])
        assert torch.equal(logits, made.student(batch["pixel_values"]))
        own = made.student.read(batch["pixel_values"]).features
        assert torch.equal(made.student.model.norm(features) if made.branch.own_norm else features, own)
        again = made.branch.answer(made.student, features) if made.branch.own_norm else logits
        torch.testing.assert_close(again, logits)  # the class token through the student's LayerNorm and head, as the student does
    assert made.branch.own_norm and made.branch.class_token


def test_a_cnns_augmented_tokens_are_normalised_averaged_and_read_by_its_head():
    made, tokens = method(), torch.rand(2, 9, 6)
    assert not made.branch.own_norm and not made.branch.class_token
    pooled = torch.nn.functional.layer_norm(tokens, (6,)).mean(1)
    torch.testing.assert_close(made.branch.answer(made.student, tokens), made.student.head(pooled))


def test_losses_are_what_the_docs_say():
    made, batch = method(hint=0.5, aug=2.0, kd=3.0, label_smoothing=0.2), picture_batch()
    made.eval()
    pictures, labels, attention = batch["pixel_values"], batch["labels"], made.branch.attention
    terms, seen = made(batch), made.student.read(pictures)
    x = seen.features.flatten(2).mT
    blocks = made.taught_features(pictures)
    assert [one.shape[1] for one in blocks] == [4, 8, 16]
    grids = torch.cat([nn.functional.adaptive_avg_pool2d(one, 2) for one in blocks], 1)
    tokens = torch.cat([torch.cat([one.mean((2, 3)) for one in blocks], 1)[:, None], grids.flatten(2).mT], 1)
    y = attention(made.learning(tokens, attention.prototypes))
    answers = [made.branch.answer(made.student, branch) for branch in (y, attention(x))]
    smooth = {"ignore_index": -100, "label_smoothing": 0.2}
    torch.testing.assert_close(terms["ce"], nn.functional.cross_entropy(seen.logits, labels, **smooth))
    aug = sum(nn.functional.cross_entropy(answer, labels, **smooth) for answer in answers) / 2
    torch.testing.assert_close(terms["aug"], 2 * aug)
    p = [answer.softmax(-1) for answer in answers]
    kl = sum((one * (one.log() - seen.logits.log_softmax(-1))).sum(-1).mean() for one in p) / 2
    torch.testing.assert_close(terms["kd"], 3 * kl)
    small = nn.functional.adaptive_avg_pool2d(seen.features, 2).flatten(2).mT
    torch.testing.assert_close(terms["hint"], 0.5 * (small - y[:, 1:]).square().mean())


def test_the_guide_is_not_guided():
    made, batch = method(), picture_batch()
    terms = made(batch)
    assert gradient(terms["kd"], made.branch.attention.prototypes).abs().max() == 0
    assert gradient(terms["kd"], made.student.head.weight).abs().max() > 0
    assert gradient(terms["ce"], made.branch.attention.prototypes).abs().max() == 0
    assert gradient(terms["aug"], made.branch.attention.prototypes).abs().max() > 0


def test_branches_decide_whose_tokens_are_augmented():
    batch = picture_batch()
    teacher, student = method(branches=("teacher",)), method(branches=("student",), hint=1.0)
    block = teacher.student.model.stages[0][0].weight
    assert gradient(teacher(batch)["aug"], block).abs().max() == 0  # only the head is the student's
    assert gradient(teacher(batch)["aug"], teacher.learning.merge.weight).abs().max() > 0
    block = student.student.model.stages[0][0].weight
    assert gradient(student(batch)["aug"], block).abs().max() > 0
    assert gradient(student(batch)["aug"], student.learning.merge.weight).abs().max() == 0
    assert gradient(student(batch)["hint"], block).abs().max() > 0


def test_a_weight_of_zero_runs_no_route():
    made, batch = method(branches=("student",), hint=1.0), picture_batch()
    made.weights["hint"] = 0.0
    made.taught_features = None  # calling it would fail
    assert set(made(batch)) == {"ce", "aug", "kd"}
    assert set(method(kd=0.0)(batch)) == {"ce", "aug"}


def test_layers_may_be_named_and_a_backbone_needs_no_head():
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3, stride=2), nn.Conv2d(4, 8, 1)

        def forward(self, pixel_values: torch.Tensor) -> dict:
            return {"maps": self.second(self.first(pixel_values))}

    made = method(teacher=Backbone(), layers=("first", "second"))
    assert made.learning.merge.in_features == 4 + 8
    assert made(picture_batch()).total.isfinite()
    with pytest.raises(BadInput, match="no submodule 'third'"):
        method(teacher=Backbone(), layers=("third",))
    with pytest.raises(BadInput, match="gives"):
        method(layers=("head",))
    with pytest.raises(BadInput):
        method(teacher=Backbone())


def test_what_is_shipped_needs_no_teacher():
    batch, plain, augmented = picture_batch(), method(), method(augmented=True)
    assert plain.deployable() is plain.student
    shipped = augmented.eval().deployable()
    assert isinstance(shipped, AugmentedStudent)
    names = {name.partition(".")[0] for name in shipped.state_dict()}
    assert names == {"student", "branch"}
    augmented.teacher = None
    logits = shipped(batch["pixel_values"])
    assert logits.shape == (4, CLASSES) and logits.isfinite().all()
    assert (logits - augmented.student(batch["pixel_values"])).abs().max() > 1e-4
    moved = copy.deepcopy(shipped)
    with torch.no_grad():
        moved.branch.attention.prototypes.mul_(-3)
    assert (moved(batch["pixel_values"]) - logits).abs().max() > 1e-5


def test_a_rebuilt_run_is_restored():
    batch, made = picture_batch(), method()
    adam = torch.optim.AdamW(made.parameters(), lr=1e-2)
    made(batch).total.backward()
    adam.step()
    again = method()
    again.load_state_dict(made.state_dict())
    for one, other in zip(made.eval()(batch).values(), again.eval()(batch).values(), strict=True):
        assert torch.equal(one, other)


def test_unlabelled_pictures_are_guided():
    made, batch = method(), picture_batch()
    batch["labels"] = torch.full((4,), -100)
    terms = made(batch)
    assert terms["ce"] == terms["aug"] == 0
    assert terms["kd"] > 0


def test_usage_of_prototypes():
    made, batch = method(), picture_batch()
    assert 0 <= made.usage(batch) <= 1
    with torch.no_grad():
        made.learning.vlad.assign.weight.zero_()
    assert made.usage(batch) == pytest.approx(1)
    with torch.no_grad():
        made.learning.vlad.assign.weight[0] = 1e4
    made.learning.merge.bias.data.fill_(10)  # tokens that are not zero
    assert made.usage(batch) < 0.01


def test_bfloat16_teacher_and_autocast():
    made = method(teacher=build("cnn", 7, 2, widths=(4, 8, 16)).bfloat16(), hint=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        terms = made(picture_batch())
    assert terms.total.isfinite()


def test_bad_input():
    with pytest.raises(BadInput, match="needs a teacher"):
        ProCKD(build("cnn", CLASSES))
    for values, message in (
        ({"prototypes": 0}, "prototypes is 0"),
        ({"layers": ()}, "layers is empty"),
        ({"kd": -1}, "kd is -1"),
        ({"label_smoothing": 2}, "label_smoothing is 2"),
        ({"branches": ()}, "branches is"),
        ({"branches": ("student",)}, "would teach nothing"),
    ):
        with pytest.raises(BadInput, match=message):
            ProCKDConfig(**values)
    assert configure(ProCKD, {"branches": ["teacher"], "layers": ["a"]}).branches == ("teacher",)
    with pytest.raises(BadInput, match="the student has 2 classes, and a label is 2"):
        method(build("cnn", 2))


def test_a_head_that_reads_something_else_than_the_tokens_is_refused():
    class Narrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.narrow, self.head = nn.Conv2d(1, 6, 3), nn.Linear(6, 4), nn.Linear(4, CLASSES)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.head(self.narrow(self.map(pixel_values).mean((2, 3))).relu())

    with pytest.raises(BadInput, match="they are 6 wide, and the head reads 4"):
        method(Narrowing())

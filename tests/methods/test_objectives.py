"""Every objective as a term of `compose`: on CNN and ViT pairs, by name, finite in bf16, with gradient where it belongs."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from limbeck.errors import BadInput
from limbeck.methods.compose import compose
from limbeck.methods.objectives import (
    AT,
    CE,
    CRD,
    DKD,
    DML,
    MGD,
    OFD,
    ONE,
    Hint,
    Objective,
    ReviewKD,
    SimKD,
    drawn_anew,
    objective,
)
from limbeck.models.classifier import Classifier
from limbeck.models.loading import ensure_torchvision
from limbeck.models.tiny.classifiers import build

CNN_ONLY = {"ofd", "fsp"}  # margins come from BatchNorm, and Gram matrices are of one size


def cnn(widths, seed=0):
    model = build("cnn", 5, seed, widths=widths, channels=1)
    model.model.stages[-1][2] = nn.Softplus()  # smooth: no unit is dead by chance
    return model


def vit(width, seed=0):
    timm = pytest.importorskip("timm")
    torch.manual_seed(seed)
    return Classifier(
        timm.models.vision_transformer.VisionTransformer(
            img_size=16, patch_size=4, in_chans=1, num_classes=5, embed_dim=width, depth=4, num_heads=2
        )
    )


def swin(seed=0):
    """Maps [B, H, W, C] all the way."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(seed)
    return Classifier(
        timm.models.swin_transformer.SwinTransformer(
            img_size=32,
            patch_size=2,
            in_chans=1,
            num_classes=5,
            embed_dim=8,
            depths=(1, 1, 1),
            num_heads=(1, 1, 2),
            window_size=4,
        )
    )


def torchvision_swin(seed=0):
    """Maps [B, H, W, C] up to its stages, and [B, C, H, W] behind them."""
    ensure_torchvision()
    from torchvision.models import SwinTransformer

    torch.manual_seed(seed)
    return SwinTransformer([2, 2], 8, [1, 1, 1], [1, 1, 2], [4, 4], num_classes=5)


def resnet(inplace, seed=0):
    ensure_torchvision()
    from torchvision.models import resnet18

    torch.manual_seed(seed)
    model = resnet18(num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = inplace
    return model


class Pooled(nn.Module):
    """Two convolutions, a mean, and what stands behind it."""

    def __init__(self, width, tail):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, width, 3, 2, 1), nn.ReLU())
        self.tail = tail

    def forward(self, pixel_values):
        return self.tail(self.body(pixel_values).mean((2, 3)))


def with_a_hidden_layer(width, seed=0):
    torch.manual_seed(seed)
    return Pooled(width, nn.Sequential(nn.Linear(width, 7), nn.ReLU(), nn.Linear(7, 5)))


def a_batch(size=6, seed=0, channels=1, side=16):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.rand(size, channels, side, side, generator=generator),
        "labels": torch.randint(5, (size,), generator=generator),
        "ids": [str(index) for index in range(size)],
    }


def prepared(term, student, teacher, batch):
    method = compose(teacher, student, [term])
    method.train_size, method.train_labels = 12, torch.arange(12) % 5
    method.prepare(batch)
    return method.train()


PAIRS = {
    "cnn-cnn": (lambda: cnn((4, 6, 8), 1), lambda: cnn((5, 7, 9), 2)),
    "vit-cnn": (lambda: cnn((4, 6, 8), 1), lambda: vit(12, 2)),
    "cnn-vit": (lambda: vit(8, 1), lambda: cnn((5, 7, 9), 2)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", sorted(Objective.known))
def test_every_objective_trains_the_student_and_no_teacher(name, pair):
    if name in CNN_ONLY and pair != "cnn-cnn":
        pytest.skip("made for CNNs; refused elsewhere")
    student, teacher = (make() for make in PAIRS[pair])
    if name == "fsp":
        teacher = cnn((4, 6, 8), 2)
    term = objective({name: {"warmup_epochs": 0}} if name in ("dkd", "reviewkd") else name)
    refused = {("one", "cnn-vit"): "more than average pooling", ("simkd", "vit-cnn"): "no linear head that reads this mean"}
    if (name, pair) in refused:
        with pytest.raises(BadInput, match=refused[name, pair]):
            prepared(term, student, teacher, a_batch())
        return
    batch = a_batch()
    method = prepared(term, student, teacher, batch)
    buffers = {key: value.clone() for key, value in teacher.state_dict().items()}
    losses = method(batch)
    assert list(losses) == [name]
    assert math.isfinite(losses.total.item())
    losses.total.backward()
    gradient = sum(p.grad.abs().sum().item() for p in student.parameters() if p.grad is not None)
    assert gradient > 0 and math.isfinite(gradient)
    assert all(p.grad is None for p in teacher.parameters())
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, buffers[key]), f"the teacher's {key} moved"
    for part in method.adapters.parameters():
        assert part.grad is None or part.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(Objective.known))
def test_every_objective_is_finite_under_bf16(name):
    student, teacher, batch = cnn((4, 6, 8), 1), cnn((4, 6, 8), 2), a_batch()
    method = prepared(name, student, teacher, batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(batch)
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("name", ["hint", "at", "nst", "reviewkd", "rkd", "sp", "cwd", "cc", "pkt"])
def test_feature_terms_lower_their_own_loss_by_half(name):
    student, teacher, batch = cnn((4, 6, 8), 1), cnn((5, 7, 9), 2), a_batch(size=16)
    term = objective({name: {"warmup_epochs": 0}} if name == "reviewkd" else name)
    method = prepared(term, student, teacher, batch)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    first = method(batch).total.item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = method(batch).total
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 2


def test_usual_points_are_found_and_shown_in_the_plan():
    method = prepared("at", cnn((4, 6, 8), 1), cnn((5, 7, 9, 11), 2), a_batch())
    rows = method.plan()
    assert [row.student_shape[0] for row in rows] == [4, 6, 8]
    assert [row.teacher_shape[0] for row in rows] == [7, 9, 11], "as many of the deepest as both have"


def test_layers_named_by_hand_must_pair():
    with pytest.raises(BadInput, match="2 layers of the student and 1 of the teacher"):
        prepared(
            objective({"at": {"student": ["stages.0", "stages.1"], "teacher": ["stages.1"]}}),
            cnn((4, 6)), cnn((4, 6), 1), a_batch(),
        )  # fmt: skip


@pytest.mark.parametrize("size", [1, 5])
def test_warm_up_grows_with_the_epoch(size):
    batch = a_batch()
    method = prepared(DKD(warmup_epochs=4), cnn((4, 6)), cnn((4, 6), 1), batch)
    method.steps_per_epoch = size
    values = []
    for epoch in (0, 1, 3, 9):
        method.steps_done = epoch * size
        values.append(method(batch).total.item())
    assert values == pytest.approx([values[-1] * share for share in (0.25, 0.5, 1, 1)])


@pytest.mark.parametrize("name", ["dkd", "reviewkd", "one"])
def test_warm_up_is_through_where_the_length_of_an_epoch_is_not_known(name):
    batch = a_batch()
    method = prepared(name, cnn((4, 6)), cnn((4, 6), 1), batch).eval()
    unknown = method(batch).total
    method.steps_per_epoch, method.steps_done = 1, 1000
    torch.testing.assert_close(method(batch).total, unknown)
    method.steps_done = 0
    assert method(batch).total < unknown


@pytest.mark.parametrize("term", [CE(), DKD(), DML()])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 4, 11]), "has 5 classes, and a label is 11"),
        (torch.zeros(6, dtype=torch.int32), r"labels are torch.int32 \[6\].*expected torch.int64 \[6\]"),
        (torch.zeros(6), "labels are torch.float32"),
    ],
)
def test_labels_that_are_no_classes_are_refused_before_training(term, labels, message):
    with pytest.raises(BadInput, match=message):
        prepared(term, cnn((4, 6)), cnn((4, 6), 1), {**a_batch(), "labels": labels})


def test_dkd_leaves_out_unlabelled_samples():
    batch = a_batch()
    method = prepared(DKD(warmup_epochs=0), cnn((4, 6)).eval(), cnn((4, 6), 1), batch).eval()
    some = {**batch, "labels": batch["labels"].clone()}
    some["labels"][2:] = -100
    known = {key: value[:2] for key, value in batch.items()}
    torch.testing.assert_close(method(some).total, method(known).total)


def test_crd_remembers_in_training_only_and_needs_to_know_the_data():
    batch, method = a_batch(), prepared(CRD(negatives=4), cnn((4, 6)), cnn((5, 7), 1), a_batch())
    bank = method.adapters["crd"].memory.student_bank.clone()
    method.eval()(batch)
    assert torch.equal(method.adapters["crd"].memory.student_bank, bank)
    method.train()(batch)
    moved = (method.adapters["crd"].memory.student_bank != bank).any(1)
    assert moved.tolist() == [True] * 6 + [False] * 6
    assert any(name.endswith("student_bank") for name in method._ddp_params_and_buffers_to_ignore)
    alone = compose(cnn((5, 7), 1), cnn((4, 6)), [CRD()])
    with pytest.raises(BadInput, match="must know how many"):
        alone.prepare(batch)


def test_crd_refuses_what_is_no_vector_before_training():
    class Pointwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(1, 4, 3, 2), nn.Conv2d(4, 5, 1)

        def forward(self, pixel_values):
            return self.head(self.body(pixel_values)).mean((2, 3))

    with pytest.raises(BadInput, match=r"crd \(head -> head\): 'crd' embeds vectors \[B, D\]: .*\[6, 4, 7, 7\]"):
        prepared(CRD(), Pointwise(), Pointwise(), a_batch())


@pytest.mark.parametrize(("student", "teacher"), [("vit", "cnn"), ("cnn", "vit"), ("vit", "vit"), ("pooled", "pooled")])
def test_fitnets_regressor_takes_maps_alone(student, teacher):
    make = {"vit": lambda: vit(8), "cnn": lambda: cnn((4, 6)), "pooled": lambda: cnn((4, 6))}
    layers = {"student": "@pooled", "teacher": "@pooled"} if student == "pooled" else {}
    with pytest.raises(BadInput, match=r"hint \(.*\): ConvReg cannot map .*; tap maps of shape \[B, C, H, W\]$"):
        prepared(Hint(regressor="fitnet", **layers), make[student](), make[teacher](), a_batch())


def test_the_peer_of_dml_starts_elsewhere_and_is_dropped():
    batch, student = a_batch(), cnn((4, 6), 1)
    method = prepared(DML(), student, None, batch)
    peer = method.adapters["dml"]
    assert not torch.equal(peer.model.head.weight, student.model.head.weight)
    assert method.deployable() is student
    method(batch).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in peer.parameters())


@pytest.mark.parametrize("term", [DML(), ONE(stage="body")])
def test_peers_are_other_networks_than_the_seed_of_the_student_gives(term):
    torch.manual_seed(5)
    student = Pooled(6, nn.Linear(6, 5))
    torch.manual_seed(5)  # as the engine does before it prepares a method
    method = compose(None, student, [CE(), term])
    method.prepare(a_batch())
    (part,) = method.adapters.values()
    assert all(module.training for module in part.modules()), "made in the student's eval mode"
    peers = [part.tail] if term.name == "dml" else [*part.heads]
    weights = [student.tail.weight, *(peer.weight for peer in peers)]
    assert len(weights) == (2 if term.name == "dml" else 3)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))


def test_drawing_anew_leaves_no_attention_as_it_was_nor_the_random_numbers_behind():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    nn.init.constant_(layer.self_attn.in_proj_weight, 3.0)
    nn.init.constant_(layer.self_attn.out_proj.bias, 3.0)
    torch.manual_seed(0)
    fresh = drawn_anew(layer)
    bound = math.sqrt(6 / (4 * 8))  # MultiheadAttention's own initialisation
    assert 0 < fresh.self_attn.in_proj_weight.abs().max() <= bound
    assert not fresh.self_attn.out_proj.bias.any()
    after = torch.rand(4)
    torch.manual_seed(0)
    torch.randint(2**62, ())
    assert torch.equal(after, torch.rand(4))


def test_one_equals_its_formula_and_ships_its_first_branch():
    from limbeck.losses import cross_entropy, ensemble, one_kd, ramp_up

    batch, student = a_batch(), cnn((4, 6), 1)
    method = prepared(ONE(stage="stages.1"), student, None, batch).eval()
    method.steps_per_epoch = 1
    part = method.adapters["one"]
    shared = student.model.stages[0](batch["pixel_values"])
    others, gate = part(shared)
    torch.testing.assert_close(gate.sum(1), torch.ones(6))
    own = student(batch["pixel_values"])
    together = ensemble(torch.stack([own, *others], 1), gate)
    expected = cross_entropy(together, batch["labels"]) + sum(cross_entropy(z, batch["labels"]) for z in others)
    expected = expected + ramp_up(0, 80) * one_kd(torch.stack([own, *others], 1), together)
    torch.testing.assert_close(method(batch)["one"], expected)
    assert method.deployable() is student


@pytest.mark.parametrize("make", [lambda: with_a_hidden_layer(6), lambda: swin()], ids=["hidden-layer", "channels-last"])
def test_one_refuses_what_stands_between_the_stage_and_the_head(make):
    side = 32 if isinstance(make(), Classifier) else 16
    with pytest.raises(BadInput, match="what follows is more than average pooling and a linear head"):
        prepared(ONE(), make(), None, a_batch(side=side))


@pytest.mark.parametrize("make", [lambda: with_a_hidden_layer(6), lambda: vit(8, 2)], ids=["hidden-layer", "class-token"])
def test_simkd_ships_only_a_head_that_reads_what_is_projected(make):
    batch, student, teacher = a_batch(), cnn((4, 6), 1), make()
    with pytest.raises(BadInput, match=r"behind the mean of '\w+', and \w+ has no linear head that reads this mean"):
        prepared(SimKD(), student, teacher, batch)
    method = prepared(SimKD(teacher="@pooled"), student, teacher, batch).eval()
    part = method.adapters["simkd"]
    with torch.no_grad():
        pooled = Classifier.of(teacher).read(batch["pixel_values"])
        torch.testing.assert_close(part.head(pooled.pooled), pooled.logits)
        assert method.deployable()(batch["pixel_values"]).shape == (6, 5)


def test_simkd_cannot_ship_a_student_up_to_an_input():
    with pytest.raises(BadInput, match="name one by its output, not '@pooled'"):
        prepared(SimKD(student="@pooled"), cnn((4, 6), 1), cnn((5, 7), 2), a_batch())


def test_simkd_ships_the_teachers_head_behind_the_projector():
    batch, student, teacher = a_batch(), cnn((4, 6), 1), cnn((5, 7), 2)
    method = prepared(SimKD(), student, teacher, batch).eval()
    shipped = method.deployable()
    features = student.read(batch["pixel_values"]).features
    expected = teacher.head(method.adapters["simkd"].projector(features).mean((2, 3)))
    torch.testing.assert_close(shipped(batch["pixel_values"]), expected)
    copy_of_head = shipped.model.head.head
    assert copy_of_head is not teacher.head and torch.equal(copy_of_head.weight, teacher.head.weight)


def test_ofd_reads_margins_from_the_teachers_batch_norm():
    batch, student, teacher = a_batch(), cnn((4, 6), 1), cnn((5, 7), 2)
    method = prepared(OFD(), student, teacher, batch)
    assert [row.teacher for row in method.plan()] == ["stages.0.1", "stages.1.1"]
    with pytest.raises(BadInput, match="name BatchNorm layers"):
        prepared(OFD(student=("stages.0.0",), teacher=("stages.0.0",)), student, teacher, batch)


def test_ofd_leaves_out_the_stem_and_reads_what_no_activation_wrote_over():
    batch = a_batch(channels=3, side=64)
    with pytest.raises(
        BadInput, match=r"the student's 'layer1\.1\.relu' writes over what 'layer1\.1\.bn2' gives.*`inplace` to False"
    ):
        prepared(OFD(), resnet(True, 1), resnet(False, 2), batch)
    with pytest.raises(BadInput, match=r"the teacher's 'layer1\.1\.relu' writes over"):
        prepared(OFD(), resnet(False, 1), resnet(True, 2), batch)
    teacher = resnet(False, 2)
    method = prepared(OFD(), resnet(False, 1), teacher, batch)
    assert [row.teacher for row in method.plan()] == [f"layer{stage}.1.bn2" for stage in (1, 2, 3, 4)]
    _, told = method._observe(batch, method.objectives)[0]["ofd"]
    assert all(layer.min() < 0 for layer in told), "before the ReLU"
    with pytest.raises(BadInput, match="no stage of VisionTransformer holds a BatchNorm"):
        prepared(OFD(), vit(8), vit(8, 1), a_batch())


def test_maps_whose_channels_stand_last_are_turned():
    batch, student, teacher = a_batch(side=32), swin(1), swin(2)
    method = prepared(Hint(), student, teacher, batch).eval()
    seen = teacher.read(batch["pixel_values"]).features
    assert seen.shape == (6, 32, 4, 4)
    ours, theirs = method._observe(batch, method.objectives)[0]["hint"]
    assert torch.equal(theirs, seen)
    assert torch.equal(ours, student.read(batch["pixel_values"]).features)
    with torch.no_grad():
        assert torch.equal(method.record(batch, 5)["hint"].values, seen)
    wide = a_batch(channels=3, side=32)
    rows = prepared(AT(), resnet(False), torchvision_swin(), wide).plan()
    assert [row.teacher_shape for row in rows] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    (row,) = prepared(Hint(), torchvision_swin(1), torchvision_swin(2), wide).plan()
    assert (row.teacher, row.teacher_shape) == ("permute", (32, 4, 4))


def test_simkd_ships_a_student_whose_channels_stand_last():
    batch, student, teacher = a_batch(side=32), swin(1), swin(2)
    method = prepared(SimKD(), student, teacher, batch).eval()
    features = student.read(batch["pixel_values"]).features
    expected = teacher.head(method.adapters["simkd"].projector(features).mean((2, 3)))
    torch.testing.assert_close(method.deployable()(batch["pixel_values"]), expected)


def test_mgd_presets_mask_what_the_authors_mask():
    batch = a_batch()
    drops = {}
    for task in MGD.tasks:
        part = prepared(MGD(task=task), cnn((4, 6)), cnn((5, 7), 1), batch).adapters["mgd"]
        drops[task] = (part.mask, part.drop)
    assert drops == {"classification": ("channel", 0.15), "detection": ("pixel", 0.65), "segmentation": ("pixel", 0.75)}


def test_reviewkd_without_gradient_noise_is_zero_weight_free():
    """A term of weight 0 is not computed at all, its part untouched."""
    batch, student = a_batch(), cnn((4, 6), 1)
    method = compose(cnn((5, 7), 2), student, [CE(), ReviewKD(weight=0.0)])
    method.prepare(batch)
    before = copy.deepcopy(method.adapters.state_dict())
    assert list(method.train()(batch)) == ["ce"]
    assert all(torch.equal(value, before[key]) for key, value in method.adapters.state_dict().items())

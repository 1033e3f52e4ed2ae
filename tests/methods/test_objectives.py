"""Every objective as a term of `compose`: on CNN and ViT pairs, by name, finite in bf16, with gradient where it belongs."""

import copy
import math

import pytest
import torch
from torch import nn

from limbeck.errors import BadInput
from limbeck.methods.compose import compose
from limbeck.methods.objectives import CE, CRD, DKD, DML, MGD, OFD, ONE, Objective, ReviewKD, SimKD, objective
from limbeck.models.classifier import Classifier
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


def a_batch(size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.rand(size, 1, 16, 16, generator=generator),
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
    if name == "one" and pair == "cnn-vit":
        with pytest.raises(BadInput, match="more than average pooling"):
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


def test_the_peer_of_dml_starts_elsewhere_and_is_dropped():
    batch, student = a_batch(), cnn((4, 6), 1)
    method = prepared(DML(), student, None, batch)
    peer = method.adapters["dml"]
    assert not torch.equal(peer.model.head.weight, student.model.head.weight)
    assert method.deployable() is student
    method(batch).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in peer.parameters())


def test_one_equals_its_formula_and_ships_its_first_branch():
    from limbeck.losses import cross_entropy, ensemble, one_kd, ramp_up

    batch, student = a_batch(), cnn((4, 6), 1)
    method = prepared(ONE(stage="stages.1"), student, None, batch).eval()
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

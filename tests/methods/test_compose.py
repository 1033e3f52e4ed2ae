"""Composing objectives on any two modules."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.errors import BadInput, LimbeckError
from limbeck.methods.compose import ComposeConfig, compose
from limbeck.methods.objectives import CE, KD, Cosine, Hint, Objective, objective


class CNN(nn.Module):
    """Two stages and a head; with BatchNorm and dropout, so that modes and random numbers matter."""

    def __init__(self, width: int, classes: int = 10, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, pixel_values):
        return self.head(self.drop(self.pool(self.body(self.stem(pixel_values))).flatten(1)))


class ViT(nn.Module):
    """4x4 patches of an 8x8 image behind a class token, and an output object instead of a tensor."""

    def __init__(self, width: int = 12, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 24, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, pixel_values):
        tokens = self.patch(pixel_values).flatten(2).transpose(1, 2)
        tokens = self.block(torch.cat([self.token.expand(len(tokens), -1, -1), tokens], dim=1))
        return SimpleNamespace(logits=self.head(tokens[:, 0]))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(6, 1, 8, 8, generator=generator),
        "labels": torch.tensor([0, 1, 2, 3, 4, -100]),
        "ids": list("abcdef"),
    }


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return CNN(8)


@pytest.fixture
def student():
    torch.manual_seed(2)
    return CNN(4, stride=2)


def prepared(teacher, student, objectives, batch):
    method = compose(teacher, student, objectives)
    method.prepare(batch)
    return method


# -- what it computes ---------------------------------------------------------------------------------------------------------


def test_the_terms_are_those_of_a_hand_written_loop(teacher, student, batch):
    objectives = [CE(weight=0.1), KD(temperature=4, weight=0.9), Hint("body", "body", weight=0.5), Cosine("body.0", "stem")]
    method = prepared(teacher, student, objectives, batch)
    method.eval()  # no dropout
    losses = method(batch)

    x, y = batch["pixel_values"], batch["labels"]
    with torch.no_grad():
        teacher_stem = teacher.stem(x)
        teacher_body = teacher.body(teacher_stem)
        teacher_logits = teacher.head(teacher.pool(teacher_body).flatten(1))
    stem = student.stem(x)
    body, early = student.body(stem), student.body[0](stem)
    logits = student.head(student.pool(body).flatten(1))
    ce = F.cross_entropy(logits, y)
    kd = 16 * F.kl_div((logits / 4).log_softmax(1), (teacher_logits / 4).softmax(1), reduction="batchmean")
    hint = F.mse_loss(method.adapters["hint"](body), teacher_body)
    cosine = 1 - F.cosine_similarity(method.adapters["cosine"](early), teacher_stem, dim=1).mean()
    torch.testing.assert_close(dict(losses), {"ce": 0.1 * ce, "kd": 0.9 * kd, "hint": 0.5 * hint, "cosine": cosine})
    torch.testing.assert_close(losses.total, 0.1 * ce + 0.9 * kd + 0.5 * hint + cosine)


def test_student_and_adapters_get_gradient_and_the_teacher_stays_as_it_was(teacher, student, batch):
    before = copy.deepcopy(teacher.state_dict())
    method = prepared(teacher, student, [CE(), KD(), Hint("body", "body")], batch)
    method.train()
    method(batch).total.backward()
    assert all(p.grad is not None for p in method.parameters())
    assert {id(p) for p in method.adapters.parameters()} < {id(p) for p in method.parameters()}
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert not any(key.startswith("teacher") for key in method.state_dict())


def test_training_lowers_every_term(teacher, student, batch):
    torch.manual_seed(0)
    method = prepared(teacher, student, [KD(), Hint("body", "body"), Cosine("stem", "body")], batch)
    method.eval()
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    first = method(batch)
    for _ in range(100):
        optimizer.zero_grad()
        method(batch).total.backward()
        optimizer.step()
    last = method(batch)
    assert all(last[name] < 0.5 * first[name] for name in first)


def test_unlabelled_samples_still_learn_from_the_teacher(teacher, student, batch):
    method = prepared(teacher, student, [CE(), KD()], batch)
    unlabelled = {**batch, "labels": torch.full((6,), -100)}
    losses = method(unlabelled)
    assert losses["ce"].item() == 0
    assert losses["kd"].item() > 0


def test_pictures_beside_the_labelled_ones_count_where_only_the_teacher_speaks(teacher, student, batch):
    beside = {**batch, "unlabelled": torch.randn(4, 1, 8, 8)}
    terms = [CE(), KD(), Hint("body", "body"), {"dkd": {"warmup_epochs": 0}}]
    method = prepared(teacher, student, terms, beside).eval()
    losses = method(beside)
    everything = torch.cat([batch["pixel_values"], beside["unlabelled"]])
    whole = method({"pixel_values": everything, "labels": torch.full((10,), -100), "ids": list(range(10))})
    labelled = method(batch)
    for name in ("kd", "hint"):
        torch.testing.assert_close(losses[name], whole[name])
        assert not torch.isclose(losses[name], labelled[name])
    for name in ("ce", "dkd"):
        torch.testing.assert_close(losses[name], labelled[name])

    seen = []
    student.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    method(beside)
    prepared(None, student, [CE()], beside)(beside)
    assert seen == [10, 6, 6], "labels alone have no use for the others"
    with pytest.raises(BadInput, match=r"\[1, 8, 8\] and unlabelled \[1, 4, 4\] differ"):
        prepared(teacher, student, [CE(), KD()], {**batch, "unlabelled": torch.randn(4, 1, 4, 4)})


@pytest.mark.parametrize("pair", ["tuple", "list"])
def test_a_batch_may_be_a_pair(teacher, student, batch, pair):
    method = prepared(teacher, student, [CE(), KD()], batch)
    method.eval()
    given = {"tuple": tuple, "list": list}[pair]((batch["pixel_values"], batch["labels"]))
    torch.testing.assert_close(dict(method(given)), dict(method(batch)))


def test_labels_are_not_needed_where_no_objective_reads_them(teacher, student, batch):
    only_images = {"pixel_values": batch["pixel_values"]}
    assert prepared(teacher, student, [KD()], only_images)(only_images).keys() == {"kd"}


def test_labels_alone_need_no_teacher(student, batch):
    method = prepared(None, student, [CE()], batch)
    assert method(batch).keys() == {"ce"}
    assert list(method.teachers()) == []


def test_a_term_of_weight_zero_is_not_computed_and_its_teacher_not_run(teacher, student, batch):
    method = prepared(teacher, student, [CE(), KD(weight=0.0)], batch)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    assert method(batch).keys() == {"ce"}
    assert not calls
    method.weights["kd"] = 1.0  # as a stage may do
    assert method(batch).keys() == {"ce", "kd"}
    assert len(calls) == 1


def test_the_deployable_student_is_bare(teacher, student, batch):
    method = prepared(teacher, student, [Hint("body", "body"), Cosine("stem", "stem")], batch)
    method(batch)
    assert method.deployable() is student
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (*student.modules(), *teacher.modules()))


def test_a_layer_replaced_between_steps_is_read_in_its_new_place(teacher, student, batch):
    method = prepared(teacher, student, [Hint("body", "body")], batch)
    method.eval()
    method(batch)
    student.body = copy.deepcopy(student.body)
    student.body[0].weight.data.zero_()
    teacher.body = copy.deepcopy(teacher.body)
    losses = method(batch)
    ours, theirs = student.body(student.stem(batch["pixel_values"])), teacher.body(teacher.stem(batch["pixel_values"]))
    torch.testing.assert_close(losses["hint"], F.mse_loss(method.adapters["hint"](ours), theirs))
    method.student = CNN(4, stride=2).eval()
    ours = method.student.body(method.student.stem(batch["pixel_values"]))
    torch.testing.assert_close(method(batch)["hint"], F.mse_loss(method.adapters["hint"](ours), theirs))


def test_a_copied_method_taps_its_own_models(teacher, student, batch):
    method = prepared(teacher, student, [KD(), Hint("body", "body")], batch)
    method(batch)
    other = copy.deepcopy(method)
    other(batch).total.backward()
    assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in method.parameters())


def test_a_half_precision_teacher_is_given_its_own_dtype(teacher, student, batch):
    method = prepared(teacher.bfloat16(), student, [KD(), Hint("body", "body"), Hint()], batch)
    losses = method(batch)
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())


def test_autocast(teacher, student, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        method = prepared(teacher, student, [CE(), KD(), Hint("body", "body"), Cosine("stem", "stem")], batch)
        losses = method(batch)
    losses.total.backward()
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    assert all(value.dtype == torch.float32 for value in losses.values())


# -- the dry forward ----------------------------------------------------------------------------------------------------------


def test_prepare_leaves_models_modes_and_random_numbers_as_they_were(teacher, student, batch):
    student.train()
    student.stem[1].eval()  # a frozen BatchNorm
    modes = [module.training for module in student.modules()]
    state = copy.deepcopy(student.state_dict())
    random_state = torch.get_rng_state()
    prepared(teacher, student, [CE(), KD()], batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in student.modules()] == modes
    torch.testing.assert_close(student.state_dict(), state, rtol=0, atol=0)


def test_the_plan_names_taps_shapes_and_adapters(teacher, student, batch):
    features = [Hint("body", "body", weight=0.5), Hint("pool", "pool"), Cosine("head", "head")]
    method = compose(teacher, student, [CE(), KD(weight=0.9), *features])
    with pytest.raises(LimbeckError, match="prepare"):
        method.plan()
    with pytest.raises(LimbeckError, match="prepare"):
        method(batch)
    method.prepare(batch)
    rows = {row.term: row for row in method.plan()}
    assert list(rows) == ["ce", "kd", "hint", "hint_2", "cosine"]
    assert (rows["ce"].student, rows["ce"].student_shape, rows["ce"].teacher) == ("logits", (10,), None)
    assert (rows["kd"].weight, rows["kd"].teacher, rows["kd"].teacher_shape) == (0.9, "logits", (10,))
    assert (rows["hint"].student_shape, rows["hint"].teacher_shape) == ((8, 2, 2), (16, 4, 4))
    assert rows["hint"].adapter == "FeatureAdapter(2x2 map of 8 -> 4x4 map of 16)"
    assert rows["hint"].parameters == 8 * 16 + 16
    assert rows["cosine"].adapter == "Identity()"
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in method.adapters.parameters())


def test_a_cnn_learns_from_a_vit_and_back(student, batch):
    vit = ViT()
    for source, target, taps in ((vit, student, ("body", "block")), (CNN(8), vit, ("block", "stem"))):
        method = prepared(source, target, [CE(), KD(), Hint(*taps)], batch)
        method(batch).total.backward()
        assert all(p.grad is not None for p in method.adapters.parameters())


# -- recipes ------------------------------------------------------------------------------------------------------------------


def test_a_recipe_writes_the_same_objectives():
    assert objective("ce") == CE()
    assert objective({"kd": None}) == KD()
    assert objective({"kd": {"temperature": 2, "kind": "jsd", "beta": 0.1}}) == KD(2.0, kind="jsd", beta=0.1)
    assert objective({"hint": {"student": "a", "teacher": "b", "weight": 0.5}}) == Hint("a", "b", weight=0.5)
    assert objective(Cosine("a", "b")) == Cosine("a", "b")


def test_a_new_objective_is_known_by_its_name(teacher, student, batch, monkeypatch):
    monkeypatch.setattr(Objective, "known", dict(Objective.known))

    @dataclass(frozen=True)
    class L1(Objective):
        name = "l1"
        weight: float = 1.0

        def loss(self, student, teacher, labels):
            return (student - teacher.detach()).abs().mean()

    method = prepared(teacher, student, ["ce", {"l1": {"weight": 2.0}}], batch)
    assert method(batch).keys() == {"ce", "l1"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kdd", "unknown objective 'kdd'; did you mean 'kd'"),
        ({"kd": {"temprature": 4}}, "objective 'kd' has no 'temprature'; did you mean 'temperature'"),
        ({"kd": {"temperature": "hot"}}, "objective kd.temperature: Input should be a valid number"),
        ({"kd": {"temperature": 0}}, "temperature is 0.0"),
        ({"kd": {"kind": "symmetric"}}, "kd.kind"),
        ({"kd": {"beta": 2}}, "beta is 2.0"),
        ({"kd": 4}, "takes {key: value}, not 4"),
        ({"hint": {"regressor": "mlp"}}, "hint.regressor"),
        ({"ce": {"weight": -1}}, "weight is -1.0"),
        ({"ce": {"label_smoothing": 2}}, "label_smoothing is 2.0"),
        ({"ce": {}, "kd": {}}, "is no objective"),
        (3, "3 is no objective"),
    ],
)
def test_a_wrong_objective_says_what_would_be_right(spec, message):
    with pytest.raises(BadInput, match=message):
        ComposeConfig([spec])


@pytest.mark.parametrize("objectives", [[], "ce", {"ce": {}}, CE()])
def test_objectives_are_a_list(student, objectives):
    with pytest.raises(BadInput, match="expected a list"):
        compose(None, student, objectives)


# -- what does not fit --------------------------------------------------------------------------------------------------------


def test_class_counts_must_agree_for_kd_only(student, batch):
    with pytest.raises(BadInput, match="the student has 10, the teacher 100"):
        prepared(CNN(8, classes=100), student, [CE(), KD()], batch)
    prepared(CNN(8, classes=100), student, [CE(), Hint("body", "body")], batch)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixture_has_both_labels_by_their_shares(student, batch, smoothing):
    share = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.1, 0.9])
    labels, others = torch.tensor([0, 1, 2, 3, 4, 9]), torch.tensor([5, 6, 2, 7, 8, 0])
    mixed = {**batch, "labels": labels, "mixed_labels": others, "mixed_share": share}
    method = prepared(None, student, [CE(label_smoothing=smoothing)], mixed).eval()  # no dropout
    hot = torch.nn.functional.one_hot
    target = (1 - share)[:, None] * hot(labels, 10) + share[:, None] * hot(others, 10)
    target = (1 - smoothing) * target + smoothing / 10
    wanted = -(target * student(batch["pixel_values"]).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(method(mixed).total, wanted.mean())
    unknown = torch.tensor([False, True, False, False, True, False])
    few = {key: mixed[key].masked_fill(unknown, -100) for key in ("labels", "mixed_labels")}
    torch.testing.assert_close(method({**mixed, **few}).total, wanted[~unknown].mean())
    assert method({**mixed, "labels": few["labels"].fill_(-100), "mixed_labels": few["labels"]}).total == 0


def test_terms_that_need_one_picture_refuse_mixtures(teacher, student, batch):
    mixed = {**batch, "mixed_labels": batch["labels"], "mixed_share": torch.zeros(len(batch["labels"]))}
    refusing = []
    for name in Objective.known:
        try:
            prepared(teacher, student, ["ce", name] if name != "ce" else ["ce"], mixed)
        except BadInput as error:
            if f"mixes two pictures, and {name} needs one" in str(error):
                refusing.append(name)
    assert sorted(refusing) == ["crd", "dkd", "dml", "one"]
    assert prepared(teacher, student, ["ce", "kd", "at"], mixed)(mixed).keys() == {"ce", "kd", "at"}


def test_labels_must_be_classes_of_the_student(teacher, student, batch):
    with pytest.raises(BadInput, match=r"has 10 classes, and a label is 12"):
        prepared(teacher, student, [CE()], {**batch, "labels": torch.tensor([0, 12, 2, 3, 4, 5])})
    with pytest.raises(BadInput, match=r"labels are torch.float32 \[6\]"):
        prepared(teacher, student, [CE()], {**batch, "labels": torch.zeros(6)})
    with pytest.raises(BadInput, match="the batch has no labels, and ce needs them"):
        prepared(teacher, student, [CE()], {"pixel_values": batch["pixel_values"]})


def test_a_teacher_must_exist_and_be_another_model(student):
    with pytest.raises(BadInput, match="no teacher is given, and kd needs one"):
        compose(None, student, [CE(), KD()])
    with pytest.raises(BadInput, match="share parameters"):
        compose(student, student, [KD()])
    assert all(p.requires_grad for p in student.parameters())


def test_layers_must_exist_fit_and_return_tensors(teacher, student, batch):
    with pytest.raises(BadInput, match="no submodule 'bodi'"):
        prepared(teacher, student, [Hint("bodi", "body")], batch)
    with pytest.raises(BadInput, match=r"hint \(pool -> body\): .*\[6, 8, 1, 1\].*\[6, 16, 4, 4\]"):
        prepared(teacher, student, [Hint("pool", "body")], batch)

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.model = Pair(), CNN(4)

        def forward(self, x):
            return self.model(self.pair(x)[0])

    with pytest.raises(BadInput, match="the student's 'pair' returns a tuple"):
        prepared(teacher, Wrapped(), [Hint("pair", "body")], batch)


def test_models_must_return_logits(teacher, batch):
    class Silent(CNN):
        def forward(self, pixel_values):
            return {"features": super().forward(pixel_values)}

    with pytest.raises(BadInput, match="returned dict without logits"):
        prepared(teacher, Silent(4), [KD()], batch)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"images": 1}, "no 'pixel_values'; it has images"), ((1, 2, 3), "the batch has 3 entries")],
)
def test_a_batch_must_hold_pixel_values(teacher, student, wrong, message):
    with pytest.raises(BadInput, match=message):
        compose(teacher, student, [KD()]).prepare(wrong)

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.errors import BadInput
from limbeck.evaluate import measure, protocols
from limbeck.evaluate.recognition import accuracies, expected_calibration_error
from limbeck.models.classifier import Classifier
from limbeck.models.tiny import classifiers


class Trained:
    """As much of a method as a protocol asks for."""

    name = "trained"

    def __init__(self, student):
        self.student = student

    def deployable(self):
        return self.student


class Speaks(nn.Module):
    """The picture itself is its logits: [B, 1, 1, K] -> [B, K]."""

    def forward(self, pixel_values):
        return pixel_values.flatten(1)


def shown(logits, labels, size=4):
    """Batches whose pictures are these logits."""
    pictures, labels = torch.as_tensor(logits)[:, None, None], torch.as_tensor(labels)
    ids = [str(index) for index in range(len(labels))]
    return [
        {"pixel_values": pictures[i : i + size], "labels": labels[i : i + size], "ids": ids[i : i + size]}
        for i in range(0, len(labels), size)
    ]


def measured(name, logits, labels, model=None, **given):
    return protocols.evaluate([name], shown(logits, labels), Trained(model or Speaks()), **given)


def peaked(classes, predicted, confidence):
    """Logits whose largest probability is ``confidence``, at ``predicted``."""
    height = math.log(confidence * (classes - 1) / (1 - confidence))
    return height * nn.functional.one_hot(torch.tensor(predicted), classes).float()


def test_balanced_accuracy_differs_from_accuracy_on_imbalanced_classes_alone():
    imbalanced = measured("classification", peaked(3, [0, 0, 0, 0, 0, 1], 0.9), [0, 0, 0, 1, 0, 1])
    assert imbalanced["accuracy"] == pytest.approx(5 / 6)
    assert imbalanced["accuracy/0"] == 1 and imbalanced["accuracy/1"] == 0.5
    assert imbalanced["balanced_accuracy"] == pytest.approx(0.75)  # class 2 is absent and does not count
    assert "accuracy/2" not in imbalanced
    balanced = measured("classification", peaked(3, [0, 0, 0, 0, 2, 1], 0.9), [0, 0, 1, 1, 2, 2])
    assert balanced["accuracy"] == pytest.approx(balanced["balanced_accuracy"]) == pytest.approx(0.5)


def test_a_class_that_is_only_predicted_does_not_count():
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted, labels = torch.tensor([2, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    assert accuracies(predicted, labels)["balanced_accuracy"] == sklearn.balanced_accuracy_score(labels, predicted) == 0.75


def test_top_5_counts_from_six_classes_on():
    logits = -torch.arange(6.0).repeat(3, 1)
    found = measured("classification", logits, [0, 4, 5])
    assert found["top5_accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert "top5_accuracy" not in measured("classification", logits[:, :5], [0, 4, 3])


def test_area_under_roc_counts_ranked_pairs():
    generator = torch.Generator().manual_seed(0)
    margin = torch.randn(60, generator=generator).mul(40).round()  # beyond where a sigmoid ends, and with ties
    labels = torch.randint(2, (60,), generator=generator)
    first, second = margin[labels == 0], margin[labels == 1]
    wins = (second[:, None] > first).double() + 0.5 * (second[:, None] == first).double()
    found = measured("classification", torch.stack([-margin / 2, margin / 2], dim=1), labels.tolist())
    assert found["auroc"] == pytest.approx(wins.mean().item(), abs=1e-6)
    assert "auroc" not in measured("classification", torch.randn(2, 2), [1, 1])
    assert "auroc" not in measured("classification", torch.randn(2, 3), [0, 1])


def test_ece_and_nll_by_hand():
    # Bin (0.6, 0.667]: confidence 0.65, one of two right; bin (0.933, 1]: confidence 0.95, none right.
    logits = torch.cat([peaked(2, [0, 0], 0.65), peaked(2, [1], 0.95)])
    found = measured("classification", logits, [0, 1, 0])
    assert found["ece"] == pytest.approx((2 * abs(0.5 - 0.65) + 1 * 0.95) / 3, abs=1e-5)
    assert found["nll"] == pytest.approx(-(math.log(0.65) + math.log(0.35) + math.log(0.05)) / 3, abs=1e-5)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 200))
def test_ece_and_accuracy_are_those_of_torchmetrics(seed, classes, samples):
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    probabilities = logits.softmax(-1)
    confidence, predicted = probabilities.max(-1)
    theirs = multiclass_calibration_error(probabilities, labels, num_classes=classes, n_bins=15)
    assert expected_calibration_error(confidence, predicted == labels) == pytest.approx(theirs.item(), abs=1e-5)
    theirs = multiclass_accuracy(predicted, labels, num_classes=classes, average="micro")
    assert accuracies(predicted, labels)["accuracy"] == pytest.approx(theirs.item())


def test_unlabelled_samples_are_left_out():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, -100, 2, 3, -100, 1])
    for name in ("classification", "retrieval"):
        model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 4))) if name == "retrieval" else None
        with_them = measured(name, logits, labels, model)
        assert with_them == measured(name, logits[labels != -100], labels[labels != -100], model)
    with pytest.raises(BadInput, match="no labelled sample"):
        measured("classification", logits, torch.full((6,), -100))


def test_a_label_beyond_the_students_classes_is_refused():
    with pytest.raises(BadInput, match="the student has 4 classes, and a held-out label is 4"):
        measured("classification", torch.zeros(2, 4), [3, 4])


def test_classes_have_the_names_that_the_student_knows():
    student = Classifier(Speaks(), classes=("cat", "dog"))
    found = measured("classification", peaked(2, [0, 1], 0.9), [0, 0], student)
    assert found["accuracy/cat"] == 0.5


def test_agreement_with_a_teacher_that_is_the_student_and_with_another():
    logits, labels = peaked(3, [0, 1, 2, 0], 0.8), torch.tensor([0, 1, 1, -100])
    same = measured("agreement", logits, labels, teacher=Speaks())
    assert same["teacher_agreement"] == 1 and same["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert same["teacher_accuracy"] == pytest.approx(2 / 3)
    assert same["teacher_balanced_accuracy"] == pytest.approx(0.75)

    class Uniform(nn.Module):
        def forward(self, pixel_values):
            return 0 * pixel_values.flatten(1)

    other = measured("agreement", logits, labels, teacher=Uniform())
    assert other["teacher_agreement"] == 0.5  # argmax of equal logits is class 0
    assert other["teacher_kl"] == pytest.approx(-math.log(3) - (math.log(0.8) + 2 * math.log(0.1)) / 3, abs=1e-5)


def test_agreement_says_what_it_cannot_compare():
    with pytest.raises(BadInput, match="agreement needs a teacher"):
        measured("agreement", peaked(3, [0], 0.8), [0])
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3, 5))
    with pytest.raises(BadInput, match="the student has 3, the teacher 5"):
        measured("agreement", peaked(3, [0], 0.8), [0], teacher=teacher)


@pytest.fixture
def blobs():
    """An untrained CNN, and noisy pictures of two classes, flat and chequered, that its features separate: (student, train, held out)."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(60) % 2
    chequered = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    pictures = 0.1 * torch.rand(60, 1, 8, 8, generator=generator) + 0.8 * torch.where(labels.view(-1, 1, 1, 1) == 1, chequered, 1)
    batches = [
        {"pixel_values": pictures[i : i + 20], "labels": labels[i : i + 20], "ids": list(map(str, range(i, i + 20)))}
        for i in range(0, 60, 20)
    ]
    return classifiers.build("cnn", 2, seed=1, widths=(4, 8)).eval(), batches[:2], batches[2:]


@pytest.mark.parametrize("name", ["linear-probe", "knn"])
def test_separable_features_are_told_apart_and_the_weights_stay(blobs, name):
    student, train, held_out = blobs
    before = copy.deepcopy(student.state_dict())
    found = protocols.evaluate([name], held_out, Trained(student), reference=lambda: train)
    assert found == {f"{name.replace('-', '_')}_accuracy": 1.0}
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert not any(parameter.grad is not None for parameter in student.parameters())


def test_a_methods_own_embedding_is_what_is_probed(blobs):
    student, train, held_out = blobs
    blind = Trained(student)
    blind.embed = lambda pixel_values: torch.zeros(len(pixel_values), 3)
    names = ["linear-probe", "retrieval"]
    found = protocols.evaluate(names, held_out, blind, reference=lambda: train)
    assert found["linear_probe_accuracy"] == 0.5
    assert protocols.evaluate(names, held_out, Trained(student), reference=lambda: train)["retrieval_map"] == 1.0
    assert found["retrieval_map"] < 1.0


def test_protocols_that_learn_ask_for_training_data(blobs):
    student, train, held_out = blobs
    assert protocols.needs_reference("knn") and not protocols.needs_reference("retrieval")
    with pytest.raises(BadInput, match="knn learns from training data"):
        protocols.evaluate(["classification", "knn"], held_out, Trained(student))
    unlabelled = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in train]
    with pytest.raises(BadInput, match="linear-probe learns from labelled"):
        protocols.evaluate(["linear-probe"], held_out, Trained(student), reference=lambda: unlabelled)


def test_a_batch_of_something_else_is_refused():
    with pytest.raises(BadInput, match="need pixel_values and labels; this data has input_ids"):
        protocols.evaluate(["classification"], [{"input_ids": torch.zeros(1, 2)}], Trained(Speaks()))


def test_corruptions_are_measured_one_by_one_and_repeatable(blobs):
    student, _, held_out = blobs
    found = protocols.evaluate(["corruptions"], held_out, Trained(student))
    assert found == protocols.evaluate(["corruptions"], held_out, Trained(student))
    parts = [value for name, value in found.items() if name.startswith("accuracy/")]
    assert len(parts) == 15
    assert found["corruption_accuracy"] == pytest.approx(sum(parts) / 15)


def test_columns_of_several_processes_are_joined_also_with_one_that_saw_nothing(monkeypatch):
    columns = measure.Columns()
    other = {"labels": torch.tensor([3, 4])}
    monkeypatch.setattr(measure, "distributed", lambda: True)
    monkeypatch.setattr(measure, "gathered", lambda mine: [mine, other])
    assert columns.compute()["labels"].tolist() == [3, 4]
    columns.add(labels=torch.tensor([1]))
    columns.add(labels=torch.tensor([2]))
    assert columns.compute()["labels"].tolist() == [1, 2, 3, 4]

"""Protocols for image classifiers: their answers, their features, and both under corruption.

Batches are {"pixel_values": [B, C, H, W], "labels": [B]}; a sample with label -100 is not asked for its class. What the features of a
frozen student are worth is measured by classifiers on top of them (`linear-probe`, `knn`) and by what lies next to what (`retrieval`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.batch import Batch
from limbeck.errors import BadInput
from limbeck.evaluate.corruptions import LEVELS, corrupt
from limbeck.evaluate.features import fit_linear_probe, nearest_neighbours
from limbeck.evaluate.measure import Columns, Means, required
from limbeck.evaluate.retrieval import same_class_retrieval
from limbeck.losses.logits import kl_divergence
from limbeck.models.classifier import Classifier, logits_of
from limbeck.models.libraries import ensure_torchvision

BINS = 15  # of confidence, as Guo et al.
TOP = 5


class Classification:
    """``accuracy`` (top-1), ``balanced_accuracy``, ``accuracy/<class>``, ``top5_accuracy`` (of six classes or more), ``auroc`` (of two),
    ``ece`` and ``nll`` of the student's logits. Classes have names where the student knows them, else their index."""

    def __init__(self, method: Any, teacher: Any) -> None:
        self.student, self.samples = method.deployable(), Columns()

    def update(self, batch: Batch) -> None:
        logits, labels = labelled(answers(self.student, batch), batch["labels"])
        classes = logits.shape[1]
        if len(labels) and labels.max() >= classes:
            raise BadInput(
                f"the student has {classes} classes, and a held-out label is {labels.max()}; expected 0 to {classes - 1}"
            )
        confidence, predicted = logits.softmax(-1).max(-1)
        nll = F.cross_entropy(logits, labels, reduction="none")
        self.samples.add(labels=labels, predicted=predicted, confidence=confidence, nll=nll)
        if classes == 2:
            self.samples.add(margin=logits[:, 1] - logits[:, 0])
        if classes > TOP:
            self.samples.add(top5=(logits.topk(TOP).indices == labels[:, None]).any(-1))

    def compute(self) -> dict[str, float]:
        samples = self.samples.compute()
        if not samples or not len(samples["labels"]):
            raise BadInput("evaluate: classification found no labelled sample: every label is -100")
        right = samples["predicted"] == samples["labels"]
        found = accuracies(samples["predicted"], samples["labels"], getattr(self.student, "classes", ()))
        if "top5" in samples:
            found["top5_accuracy"] = samples["top5"].float().mean().item()
        if "margin" in samples and len(samples["labels"].unique()) == 2:
            found["auroc"] = area_under_roc(samples["margin"], samples["labels"])
        return {
            **found,
            "ece": expected_calibration_error(samples["confidence"], right),
            "nll": samples["nll"].mean().item(),
        }


class Agreement:
    """``teacher_agreement``: share of pictures that student and teacher put into one class; ``teacher_kl``: mean KL(teacher || student)
    in nats; ``teacher_accuracy``, ``teacher_balanced_accuracy``: of the teacher itself, on labelled pictures."""

    needs_teacher = True

    def __init__(self, method: Any, teacher: Any) -> None:
        self.student, self.teacher = method.deployable(), required(teacher, "agreement")
        self.means, self.samples = Means(), Columns()

    def update(self, batch: Batch) -> None:
        student, teacher = answers(self.student, batch), answers(self.teacher, batch)
        if student.shape != teacher.shape:
            raise BadInput(
                f"evaluate: agreement compares classes one by one: the student has {student.shape[1]}, the teacher {teacher.shape[1]}; "
                "leave it out"
            )
        self.means.add("teacher_agreement", student.argmax(-1) == teacher.argmax(-1))
        self.means.add("teacher_kl", kl_divergence(student, teacher, reduction="none"))
        logits, labels = labelled(teacher, batch["labels"])
        self.samples.add(labels=labels, predicted=logits.argmax(-1))

    def compute(self) -> dict[str, float]:
        found, samples = self.means.compute(), self.samples.compute()
        if samples and len(samples["labels"]):
            measured = accuracies(samples["predicted"], samples["labels"])
            found |= {f"teacher_{name}": measured[name] for name in ("accuracy", "balanced_accuracy")}
        return found


class LinearProbe:
    """``linear_probe_accuracy``: of logistic regression on the frozen student's pooled features, fitted to training data."""

    needs_reference = True

    def __init__(self, method: Any, teacher: Any) -> None:
        self.embed, self.means = embedder(method), Means()

    def refer(self, batches: Iterable[Batch]) -> None:
        self.probe = fit_linear_probe(*reference_features(self.embed, batches, "linear-probe"))

    def update(self, batch: Batch) -> None:
        features, labels = labelled(embedded(self.embed, batch), batch["labels"])
        self.means.add("linear_probe_accuracy", self.probe(features).argmax(-1) == labels)

    def compute(self) -> dict[str, float]:
        return self.means.compute()


class KNN:
    """``knn_accuracy``: of the vote of the 20 training pictures whose pooled features are nearest."""

    needs_reference = True

    def __init__(self, method: Any, teacher: Any) -> None:
        self.embed, self.means = embedder(method), Means()

    def refer(self, batches: Iterable[Batch]) -> None:
        self.reference = reference_features(self.embed, batches, "knn")

    def update(self, batch: Batch) -> None:
        features, labels = labelled(embedded(self.embed, batch), batch["labels"])
        self.means.add("knn_accuracy", nearest_neighbours(features, *self.reference) == labels)

    def compute(self) -> dict[str, float]:
        return self.means.compute()


class Retrieval:
    """``retrieval_r1``, ``retrieval_r5``, ``retrieval_map``: whether pictures of a class lie next to each other, each held-out picture
    asking for the others by the cosine of pooled features."""

    def __init__(self, method: Any, teacher: Any) -> None:
        self.embed, self.samples = embedder(method), Columns()

    def update(self, batch: Batch) -> None:
        features, labels = labelled(embedded(self.embed, batch), batch["labels"])
        self.samples.add(features=features, labels=labels)

    def compute(self) -> dict[str, float]:
        return {f"retrieval_{name}": value for name, value in same_class_retrieval(**self.samples.compute()).items()}


class Corruptions:
    """``accuracy/<corruption>-<strength>`` of the student on corrupted pictures, and their mean ``corruption_accuracy``."""

    def __init__(self, method: Any, teacher: Any) -> None:
        self.student, self.means = method.deployable(), Means()

    def update(self, batch: Batch) -> None:
        pictures, ids = pictures_of(batch), [str(item) for item in batch["ids"]]
        for name in LEVELS:
            for strength in range(1, len(LEVELS[name]) + 1):
                shown = {**batch, "pixel_values": corrupt(pictures, name, strength, ids)}
                logits, labels = labelled(answers(self.student, shown), batch["labels"])
                self.means.add(f"accuracy/{name}-{strength}", logits.argmax(-1) == labels)

    def compute(self) -> dict[str, float]:
        found = self.means.compute()
        return {**found, "corruption_accuracy": statistics.fmean(found.values())}


def pictures_of(batch: Batch) -> Tensor:
    """The pictures of a batch [B, C, H, W]; `BadInput` for a batch of something else."""
    if "pixel_values" not in batch or "labels" not in batch:
        raise BadInput(
            f"evaluate: protocols for classifiers need pixel_values and labels; this data has {', '.join(batch)}: choose one for its kind"
        )
    return batch["pixel_values"]


def answers(model: Any, batch: Batch) -> Tensor:
    """A model's logits [B, K] for a batch, in float32."""
    return logits_of(model(pictures_of(batch))).float()


def labelled(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of [B, ...] whose labels are known, and those labels."""
    known = labels != -100
    return values[known], labels[known]


def embedder(method: Any) -> Callable[[Tensor], Tensor]:
    """Pictures -> features [B, D]: a method's own ``embed``, else what the student's head reads."""
    own: Callable[[Tensor], Tensor] | None = getattr(method, "embed", None)
    if own is not None:
        return own
    student = Classifier.of(method.deployable())
    return lambda pixel_values: student.read(pixel_values).pooled


def embedded(embed: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """The features [B, D] of a batch, in float32."""
    return embed(pictures_of(batch)).float().flatten(1)


def reference_features(embed: Callable[[Tensor], Tensor], batches: Iterable[Batch], protocol: str) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels [N] of the labelled training pictures; `BadInput` where there are none."""
    features, labels = [], []
    for batch in batches:
        of_batch, known = labelled(embedded(embed, batch), batch["labels"])
        features.append(of_batch)
        labels.append(known)
    if not sum(map(len, labels)):
        raise BadInput(f"evaluate: {protocol} learns from labelled training pictures, and there are none: leave it out")
    return torch.cat(features), torch.cat(labels)


def accuracies(predicted: Tensor, labels: Tensor, classes: Sequence[str] = ()) -> dict[str, float]:
    """``accuracy``, ``balanced_accuracy`` (the mean recall of the classes that are present) and ``accuracy/<class>``, their recalls.

    predicted, labels: [N], labels none of them -100. torchmetrics' macro average counts a class that is only predicted as one of recall
    0; here, as in scikit-learn, it does not count.
    """
    seen = torch.bincount(labels)
    right = torch.bincount(labels[predicted == labels], minlength=len(seen))
    recalls = {index: right[index].item() / count for index, count in enumerate(seen.tolist()) if count}
    named = {classes[index] if index < len(classes) else str(index): recall for index, recall in recalls.items()}
    return {
        "accuracy": (right.sum() / seen.sum()).item(),
        "balanced_accuracy": statistics.fmean(recalls.values()),
        **{f"accuracy/{name}": recall for name, recall in named.items()},
    }


def area_under_roc(margin: Tensor, labels: Tensor) -> float:
    """How often a sample of class 1 has a larger margin than one of class 0; ties count half. margin: [N], any finite number; labels: [N],
    both classes among them."""
    ensure_torchvision()  # torchmetrics imports it
    from torchmetrics.functional.classification import binary_auroc

    # Numbers beyond [0, 1] are taken for logits, and sigmoids of large ones tie: ranks do not.
    _, ranks = margin.unique(return_inverse=True)
    return binary_auroc(ranks.double() / len(ranks), labels).item()


def expected_calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """The mean over samples of |accuracy - confidence| of their bin; bins of equal width (Guo et al., arXiv 1706.04599, eq. 3).

    confidence: [N] probability of the predicted class. right: [N] bool.
    """
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, device=confidence.device).index_add(0, bin_of, right.float() - confidence)
    return (gaps.abs().sum() / len(confidence)).item()

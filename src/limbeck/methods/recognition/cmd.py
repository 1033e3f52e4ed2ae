"""CMD: a network distils itself between crops of unlabelled pictures, as a whole and as a bag of its parts.

Cross-level Multi-instance Distillation for Self-supervised Fine-grained Visual Categorization, 2024, arXiv 2401.08860 (IEEE TIP
2025). What the teacher, the student's own moving average, says of a picture's large crops moves into the student's view of all
crops (DINO): of the crop as a whole, and of each region of it (EsViT). Beside that, the regions of a crop are a bag, and what the
bag says together must agree with what the crop says, so that regions that decide a fine class are felt.

Differences: the released loss between the levels is not offered. It calls PyTorch's ``kl_div`` with inputs that are no
log-probabilities and targets that are raw logits, whose logarithm is NaN where they are negative; the value has no lower bound,
and one of its two terms is constant. The four comparisons are those of the abstract and the figure: crops (``view``), regions
(``region``), and bag against crop in the student (``inter``); bag against crop in the teacher moves nothing, for the teacher has
no gradient, and is left out. The bag is the mean of its regions' distributions where the code sums them, and the distance a KL.
The text was not available to us: ``aggregation``, ``inter_target`` and the weights are choices of ours. The scripts' optimiser
(weight decay 0.04 to 0.4) is a matter of ``train``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.batch import Batch
from limbeck.errors import BadInput
from limbeck.losses import self_distillation as distance
from limbeck.losses._common import upcast
from limbeck.methods.base import Losses
from limbeck.methods.recognition.base import Recognition
from limbeck.models.classifier import Classifier
from limbeck.modules.dino import Centre, DINOHead
from limbeck.modules.projectors import as_map
from limbeck.teachers.ema import EMATeacher
from limbeck.teachers.frozen import FrozenTeacher


@dataclass(frozen=True)
class CMDConfig:
    """view, region, inter, bag: weights, >= 0, of crops, of regions, of bag against crop, and of the student's bag against the
    teacher's.

    aggregation: of regions into a bag, all alike or by how much each says what the crop says. inter_target: whose crop the
    student's bag follows: its own, or the teacher's other crops. global_count: crops that the teacher sees, the first of them
    all, >= 1. outputs: K >= 2 of the heads; hidden, bottleneck, layers: of their MLPs. student_temperature > 0;
    teacher_temperature: from, to > 0, over warmup_epochs. center_momentum, momentum: in [0, 1], of the centres and of the
    teacher's weights; the latter rises to 1 along a cosine. freeze_epochs: epochs for which the heads' last layer does not move.
    teacher_mode: "train" normalises the teacher's crops by their own batch where it has BatchNorm, as DINO does and as the
    student's are; "eval" by running statistics, and without dropout.
    """

    view: float = 0.5
    region: float = 0.5
    inter: float = 1.0
    bag: float = 0.0
    aggregation: distance.Aggregation = "mean"
    inter_target: Literal["student", "teacher"] = "student"
    global_count: int = 2
    outputs: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    warmup_epochs: int = 30
    center_momentum: float = 0.9
    momentum: float = 0.996
    freeze_epochs: int = 1
    teacher_mode: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        for name in ("view", "region", "inter", "bag", "warmup_epochs", "freeze_epochs"):
            if not getattr(self, name) >= 0:
                raise BadInput(f"{name} is {getattr(self, name)}; expected a number >= 0")
        if not any((self.view, self.region, self.inter, self.bag)):
            raise BadInput("view, region, inter and bag are all 0: nothing would be learned; set one above 0")
        for name, least in (("global_count", 1), ("outputs", 2), ("hidden", 1), ("bottleneck", 1), ("layers", 1)):
            if getattr(self, name) < least:
                raise BadInput(f"{name} is {getattr(self, name)}; expected at least {least}")
        if not (self.student_temperature > 0 and min(self.teacher_temperature) > 0):
            raise BadInput(f"temperatures are {self.student_temperature} and {self.teacher_temperature}; expected numbers > 0")
        for name in ("center_momentum", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name} is {getattr(self, name)}; expected a number from 0 to 1")


class Crop(NamedTuple):
    """What a network makes of one crop of every picture.

    scores: [B, K]; regions: [B, N, K], of no region where no term reads them; features: [B, N, D], of the regions before the
    head.
    """

    scores: Tensor
    regions: Tensor
    features: Tensor


class CMD(Recognition):
    """L = view * L_I + region * L_R + inter * L_S + bag * L_bag; means over pairs of a teacher's and another student's crop.

    Batches hold ``views``, a list of crops [B, C, h, w] with the large ones first, and no label is read. No teacher is given: it
    is the moving average of the student.
    """

    name = "cmd"
    Config = CMDConfig
    needs_teacher = False

    def __init__(self, student: nn.Module, teacher: nn.Module | FrozenTeacher | None = None, **hyper: Any) -> None:
        super().__init__(student, teacher)
        self.config = config = CMDConfig(**hyper)
        self.weights = {name: getattr(config, name) for name in ("view", "region", "inter", "bag")}
        self.center = Centre(config.outputs, config.center_momentum)
        self.region_center = Centre(config.outputs, config.center_momentum)
        self.heads: nn.ModuleDict | None = None
        self.average: EMATeacher | None = None
        self.average_heads: EMATeacher | None = None

    def prepare(self, batch: Batch) -> None:
        """Put heads on the student, and take the first copy of it as teacher. Raises `BadInput` where there are too few crops.

        The student's own head, which nothing trains, becomes zero: what is deployed favours no class.
        """
        crops = self.crops(batch)
        config, seen = self.config, self.student.read(crops[0][:2])
        like = next(self.student.parameters())
        for parameter in self.student.head.parameters():
            nn.init.zeros_(parameter)
        sizes = {"image": seen.pooled.shape[1], "region": as_map(seen.features).shape[1]}
        self.heads = nn.ModuleDict(
            {
                name: DINOHead(width, config.outputs, hidden=config.hidden, bottleneck=config.bottleneck, layers=config.layers)
                for name, width in sizes.items()
            }
        ).to(like)
        self.average, self.average_heads = (
            EMATeacher(part, momentum=config.momentum, total=self.total_steps, mode=config.teacher_mode, buffers="average")
            for part in (self.student, self.heads)
        )

    def crops(self, batch: Batch) -> list[Tensor]:
        """The crops of a batch, the large ones first."""
        views = batch.get("views")
        count = self.config.global_count
        if views is None or len(views) < max(2, count):
            raise BadInput(
                f"'cmd' compares crops of a picture: the batch has {len(views or ())}, expected {max(2, count)} or more; set "
                f"data.views, e.g. {{global_count: {count}, local_count: 4, global_size: 224, local_size: 96}}"
            )
        return list(views)

    def forward(self, batch: Batch) -> Losses:
        assert self.average is not None and self.average_heads is not None and self.heads is not None
        config, crops, tau_s = self.config, self.crops(batch), self.config.student_temperature
        with torch.no_grad():
            taught = self.look(Classifier.of(self.average.module), self.average_heads.module, crops[: config.global_count])
        seen = self.look(self.student, self.heads, crops)
        start, end = config.teacher_temperature
        tau_t = distance.teacher_temperature(self.epoch, start=start, end=end, warmup_epochs=config.warmup_epochs)
        images = [distance.centred(crop.scores, self.center.center, tau_t) for crop in taught]  # a^t, [B, K]
        regions = [distance.centred(crop.regions, self.region_center.center, tau_t) for crop in taught]  # R^t, [B, N, K]

        terms: dict[str, list[Tensor]] = {name: [] for name in self.weights if self.needs(name)}
        for q, v in distance.crop_pairs(len(taught), len(seen)):
            crop = seen[v]
            if "view" in terms:
                terms["view"].append(distance.self_cross_entropy(crop.scores, images[q], temperature=tau_s))
            if "region" in terms:
                match = distance.best_match(crop.features, taught[q].features)
                terms["region"].append(distance.region_loss(crop.regions, regions[q], match, temperature=tau_s))
            if "inter" in terms:
                image = images[q] if config.inter_target == "teacher" else (upcast(crop.scores) / tau_s).softmax(-1)
                inter = distance.inter_level_loss(crop.regions, image, temperature=tau_s, aggregation=config.aggregation)
                terms["inter"].append(inter)
            if "bag" in terms:
                bag = distance.log_bag(crop.regions, temperature=tau_s)
                terms["bag"].append(distance.self_cross_entropy(bag, regions[q].mean(1), temperature=1.0))
        if self.training:
            for crop in taught:
                self.center.see(crop.scores)
                self.region_center.see(crop.regions)
        return self.weigh(**{name: torch.stack(values).mean() for name, values in terms.items()})

    def look(self, network: Classifier, heads: nn.Module, crops: Sequence[Tensor]) -> list[Crop]:
        """What a network makes of crops [B, C, h, w]; those of one size that follow each other pass it together."""
        regional = any(self.needs(name) for name in ("region", "inter", "bag"))
        frozen = self.steps_per_epoch is not None and self.epoch < self.config.freeze_epochs
        image, region = heads.get_submodule("image"), heads.get_submodule("region")
        found: list[Crop] = []
        for _, group in groupby(crops, key=lambda crop: crop.shape[-2:]):
            alike = list(group)
            seen = network.read(torch.cat(alike))
            features = as_map(seen.features).flatten(2).mT
            scores = image(seen.pooled, frozen=frozen)
            regions = region(features if regional else features[:, :0], frozen=frozen)
            parts = [whole.chunk(len(alike)) for whole in (scores, regions, features)]
            found += [Crop(*crop) for crop in zip(*parts, strict=True)]
        return found

    @property
    def epoch(self) -> int:
        """Epochs trained so far; 0 where their length is not known."""
        return 0 if self.steps_per_epoch is None else self.steps_done // max(1, self.steps_per_epoch)

    def after_step(self, step: int) -> None:
        """Centres and teacher follow."""
        assert self.average is not None and self.average_heads is not None and self.heads is not None
        self.center.update()
        self.region_center.update()
        self.average.update(self.student, step)
        self.average_heads.update(self.heads, step)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Pictures [B, C, H, W] in [0, 1] -> the teacher's pooled features [B, D]: what is worth measuring."""
        assert self.average is not None
        return Classifier.of(self.average.module).read(pixel_values).pooled

    @torch.no_grad()
    def importance(self, pixel_values: Tensor) -> Tensor:
        """How much each region of pictures [B, C, H, W] says what the whole says, to the teacher: [B, N], rows sum to 1."""
        assert self.average is not None and self.average_heads is not None
        (crop,) = self.look(Classifier.of(self.average.module), self.average_heads.module, [pixel_values])
        tau = self.config.student_temperature
        return distance.importance((upcast(crop.scores) / tau).softmax(-1), crop.regions, temperature=tau)

    def deployable(self) -> nn.Module:
        """The teacher's backbone. Its pooled feature is what was learned; its own head is zero, and nothing trains it."""
        return self.student if self.average is None else self.average.module

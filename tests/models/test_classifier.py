"""The view of image classifiers: what a model is shown, and where its features, head and usual points are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.errors import BadInput
from limbeck.models.classifier import Classifier, anatomy, logits_of
from limbeck.models.loading import ensure_torchvision, load
from limbeck.models.tiny.classifiers import Cnn

ensure_torchvision()

PICTURES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Noted(nn.Module):
    """Logits of the mean colour; keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.shown = torch.empty(0)

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.shown = pixel_values
        return self.head(pixel_values.mean((2, 3)))


def small(source: str, name: str, **keys: Any) -> Classifier:
    view = load({"source": source, "name": name, "classes": 5, **keys})
    assert isinstance(view, Classifier)
    return view


class TestShown:
    def test_teacher_and_student_each_see_one_batch_by_their_own_statistics(self) -> None:
        teacher = Classifier(Noted(), mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.4])
        student = Classifier(Noted(), mean=[0.1], std=[2.0])
        for view in (teacher, student):
            view(PICTURES)
        back = teacher.model.shown * torch.tensor([0.1, 0.2, 0.4]).view(3, 1, 1) + torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
        torch.testing.assert_close(back, PICTURES)
        torch.testing.assert_close(student.model.shown, (PICTURES - 0.1) / 2)

    def test_a_plain_module_sees_what_comes(self) -> None:
        view = Classifier.of(Noted())
        assert Classifier.of(view) is view
        view(PICTURES)
        assert torch.equal(view.model.shown, PICTURES)

    def test_size_channels_and_dtype(self) -> None:
        view = Classifier(Noted().bfloat16(), size=16, channels=3)
        view(torch.full((2, 1, 40, 24), 0.25))
        assert torch.equal(view.model.shown, torch.full((2, 3, 16, 16), 0.25, dtype=torch.bfloat16))

    def test_colours_for_a_grey_model_are_refused(self) -> None:
        with pytest.raises(BadInput, match=r"Noted takes 1 channel\(s\), the pictures have 3.*`channels`"):
            Classifier(Noted(), channels=1)(PICTURES)

    def test_logits_are_found_in_what_a_model_returns(self) -> None:
        logits = torch.ones(1)
        assert logits_of(logits) is logits_of({"logits": logits}) is logits
        with pytest.raises(BadInput, match="returned tuple without logits"):
            logits_of((logits,))


ANATOMIES = [
    ("timm", "resnet18", {}, "layer4", "fc", "act1 layer1 layer2 layer3 layer4"),
    ("timm", "tf_efficientnet_lite0", {}, "bn2", "classifier", "blocks.0 blocks.1 blocks.2 blocks.4 blocks.6"),
    ("timm", "mobilenetv3_small_100", {}, "blocks", "classifier", "blocks.0 blocks.1 blocks.3 blocks.5"),
    ("timm", "convnext_atto", {}, "stages", "head.fc", "stages.0 stages.1 stages.2 stages.3"),
    ("timm", "poolformer_s12", {}, "stages", "head.fc", "stages.0 stages.1 stages.2 stages.3"),
    ("timm", "vit_tiny_patch16_224", {"size": 64}, "norm", "head", "blocks.2 blocks.5 blocks.8 blocks.11"),
    ("timm", "mixer_s32_224", {"size": 64}, "norm", "head", "blocks.1 blocks.3 blocks.5 blocks.7"),
    (
        "timm",
        "swin_tiny_patch4_window7_224",
        {
            "options": {
                "img_size": 64,
                "patch_size": 2,
                "window_size": 4,
                "embed_dim": 12,
                "depths": (1, 2, 1),
                "num_heads": (1, 2, 3),
            }
        },
        "norm",
        "head.fc",
        "layers.0 layers.1 layers.2",
    ),
    ("torchvision", "mobilenet_v2", {}, "features", "classifier.1", "features.1 features.3 features.6 features.13 features.18"),
    (
        "torchvision",
        "mobilenet_v3_small",
        {},
        "features",
        "classifier.3",
        "features.0 features.1 features.3 features.8 features.12",
    ),
    ("torchvision", "shufflenet_v2_x0_5", {}, "conv5", "fc", "conv1 stage2 stage3 conv5"),
    ("torchvision", "squeezenet1_1", {}, "features", "classifier.1", "features.1 features.4 features.7 features.12"),
    (
        "torchvision",
        "densenet121",
        {},
        "features",
        "classifier",
        "features.relu0 features.denseblock1 features.denseblock2 features.denseblock3 features.denseblock4",
    ),
    ("tiny", "cnn", {"options": {"channels": 3}}, "stages", "head", "stages.0 stages.1 stages.2"),
]


class TestAnatomy:
    @pytest.mark.parametrize(("source", "name", "keys", "features", "head", "stages"), ANATOMIES, ids=[a[1] for a in ANATOMIES])
    def test_features_head_and_stages_of_a_family(
        self, source: str, name: str, keys: dict[str, Any], features: str, head: str, stages: str
    ) -> None:
        view = small(source, name, **keys).eval()
        seen = view.read(PICTURES)
        assert (view.anatomy().features, view.anatomy().head) == (features, head)
        assert list(view.anatomy().stages) == stages.split()
        assert seen.pooled.shape == (2, view.width)
        if name != "squeezenet1_1":  # whose head comes before its pooling
            torch.testing.assert_close(view.head(seen.pooled), seen.logits)
        if view.anatomy().channels_last:
            assert seen.features.shape == (2, view.width, 8, 8)

    def test_vgg_is_read_at_its_convolutions(self) -> None:
        from torchvision.models import vgg11

        with torch.device("meta"):
            model = vgg11(num_classes=5, init_weights=False)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.constant_(parameter, 1e-3)
        found = anatomy(model, PICTURES[:1])
        assert found.stages == ("features.1", "features.4", "features.9", "features.14", "features.19")
        assert (found.features, found.head) == ("features", "classifier.6")

    def test_torchvision_vit(self) -> None:
        from torchvision.models import VisionTransformer

        model = VisionTransformer(64, 16, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=5)
        found = anatomy(model, PICTURES)
        assert found.stages == tuple(f"encoder.layers.encoder_layer_{block}" for block in range(4))
        assert (found.features, found.head) == ("encoder", "heads.head")

    @pytest.mark.parametrize("family", ["ResNet", "ViT", "ConvNext", "Segformer"])
    def test_transformers(self, family: str) -> None:
        import transformers

        widths = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}
        sizes, features, head, stages = {
            "ResNet": (
                {"embedding_size": 8, "layer_type": "basic", **widths},
                "resnet.encoder.stages.3",
                "classifier.1",
                "resnet.encoder.",
            ),
            "ConvNext": (widths, "convnext.encoder.stages.3", "classifier", "convnext.encoder."),
            "Segformer": ({"num_attention_heads": [1, 1, 2, 2], **widths}, "segformer.stages.3", "classifier", "segformer."),
            "ViT": (
                {"hidden_size": 24, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 64},
                "vit.layernorm",
                "classifier",
                "",
            ),
        }[family]
        config = getattr(transformers, f"{family}Config")(num_labels=5, **sizes)
        found = anatomy(getattr(transformers, f"{family}ForImageClassification")(config), PICTURES)
        expected = (
            [f"vit.layers.{block}" for block in (1, 3, 5, 7)] if family == "ViT" else [f"{stages}stages.{n}" for n in range(4)]
        )
        assert (found.features, found.head, list(found.stages)) == (features, head, expected)

    def test_a_picture_so_small_that_the_last_map_is_one_position(self) -> None:
        seen = small("timm", "resnet18").eval().read(torch.rand(2, 3, 28, 28))
        assert seen.features.shape == (2, 512, 1, 1)
        assert torch.equal(seen.features.flatten(1), seen.pooled)

    def test_pictures_that_are_not_square(self) -> None:
        view = small("timm", "resnet18").eval()
        assert view.read(torch.rand(2, 3, 64, 128)).features.shape == (2, 512, 2, 4)
        assert view.anatomy().stages == ("act1", "layer1", "layer2", "layer3", "layer4")

    def test_plain_modules(self) -> None:
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))
        found = anatomy(plain, PICTURES)
        assert (found.features, found.head, found.stages) == ("1", "4", ("1",))
        blind = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 5))
        assert anatomy(blind, PICTURES)[:3] == ("2", "4", ())
        seen = Classifier(Noted()).read(PICTURES)  # nothing runs before its head
        assert torch.equal(seen.features, seen.pooled)

    def test_it_leaves_the_model_as_it_was(self) -> None:
        model = nn.Sequential(Cnn(5, channels=3), nn.Dropout(0.5))
        model[0].stages[1].eval()
        modes = [module.training for module in model.modules()]
        before = copy.deepcopy(model.state_dict())
        state = torch.get_rng_state()
        anatomy(model, PICTURES)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(module._forward_hooks for module in model.modules())

    @pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "two-heads"])
    def test_two_heads_are_refused(self, name: str) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

            def forward(self, x: Tensor) -> Tensor:
                return (self.one(x.mean((2, 3))) + self.other(x.mean((2, 3)))) / 2

        view = Classifier(Two()) if name == "two-heads" else small("timm", name, size=64)
        with pytest.raises(BadInput, match=r"its logits \[2, \d\] are not what one linear layer returns.*nn.Linear"):
            view.read(PICTURES)

    def test_it_must_be_asked_with_pictures_first(self) -> None:
        with pytest.raises(BadInput, match="has not seen a picture yet"):
            Classifier(Noted()).width  # noqa: B018


class TestRead:
    def test_gradient_flows_through_features_pooled_and_logits(self) -> None:
        view = small("tiny", "cnn", options={"channels": 3})
        for each in view.read(PICTURES):
            view.zero_grad()
            each.square().sum().backward(retain_graph=True)
            assert view.model.stages[0][0].weight.grad.abs().sum() > 0
        assert torch.equal(view.read(PICTURES).features.mean((2, 3)), view.read(PICTURES).pooled)

    def test_it_runs_once_and_in_the_mode_that_the_model_is_in(self) -> None:
        view = small("tiny", "cnn", options={"channels": 3})
        view.anatomy(PICTURES)
        statistics = view.model.stages[0][1]
        before = statistics.num_batches_tracked.item()
        view.read(PICTURES)
        assert statistics.num_batches_tracked.item() == before + 1

    def test_under_autocast(self) -> None:
        view = small("tiny", "cnn", options={"channels": 3}).eval()
        with torch.autocast("cpu", torch.bfloat16):
            seen = view.read(PICTURES)
        assert seen.logits.dtype == torch.bfloat16
        torch.testing.assert_close(seen.logits.float(), view(PICTURES), atol=0.05, rtol=0.05)


class TestHead:
    @pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1"])
    def test_a_new_head(self, name: str) -> None:
        view = small("torchvision", name, dtype="float64").eval()
        view.read(PICTURES)
        width, kind, biased = view.width, type(view.head), view.head.bias is not None
        view.classes = ("a",) * 5
        view.new_head(7)
        assert (view.width, type(view.head), view.head.bias is not None) == (width, kind, biased)
        assert view.read(PICTURES).logits.shape == (2, 7)
        assert view.head.weight.dtype == torch.float64
        assert (view.classes, view.spec["classes"]) == ((), 7)

    def test_another_module_in_its_place_is_read_too(self) -> None:
        view = small("tiny", "cnn", options={"channels": 3}).eval()
        view.read(PICTURES)
        view.replace_head(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)))
        seen = view.read(PICTURES)
        torch.testing.assert_close(view.head(seen.pooled), seen.logits)
        assert seen.logits.shape == (2, 3)

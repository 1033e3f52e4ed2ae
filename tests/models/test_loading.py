"""Loading from folders that the tests write; the hub is never asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from limbeck.errors import BadInput
from limbeck.models import loading
from limbeck.models.loading import build_vlm, load, load_module, load_vlm, register_source
from limbeck.models.vlm import VLM, check_vocabulary
from tests.models.families import FAMILIES, build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("llava")[0].save_pretrained(tmp_path)
    return tmp_path


def one_line(error: pytest.ExceptionInfo[BadInput]) -> bool:
    return "\n" not in str(error.value)


class TestTransformers:
    @torch.no_grad()
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_saved_folder_gives_the_same_logits(self, family: str, tmp_path: Path) -> None:
        model, inputs = build(family)
        model.save_pretrained(tmp_path)
        vlm = load_vlm("transformers", str(tmp_path))
        assert vlm.processor is None
        assert torch.equal(vlm.head(vlm.read(inputs).hidden), model(**inputs).logits)

    def test_options(self, folder: Path) -> None:
        spec = {"source": "transformers", "name": str(folder)}
        assert load_module({**spec, "dtype": "bfloat16"}).dtype == torch.bfloat16
        assert load_module({**spec, "device": "meta"}).device.type == "meta"
        trained = load_module(spec).lm_head.weight
        assert not torch.equal(load_module({**spec, "random_init": True}).lm_head.weight, trained)

    @torch.no_grad()
    def test_the_processor_comes_along(self, folder: Path) -> None:
        vocabulary = {"<pad>": 0, "a": 1, "dog": 2, "<image>": 95}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        square = {"height": 16, "width": 16}
        images = transformers.CLIPImageProcessor(size=square, crop_size=square)
        transformers.LlavaProcessor(
            images, tokenizer, patch_size=4, num_additional_image_tokens=1, vision_feature_select_strategy="default"
        ).save_pretrained(folder)
        vlm = load_vlm("transformers", str(folder))
        picture = Image.new("RGB", (40, 20), "red")
        inputs = vlm.processor(images=[picture], text=["<image> a dog"], return_tensors="pt")
        assert inputs["input_ids"].tolist() == [[95] * 16 + [1, 2]]
        assert vlm.read(inputs).hidden.shape == (1, 18, 32)
        assert check_vocabulary(vlm, vlm) == 100

    @pytest.mark.parametrize("pickled", ["pytorch_model.bin", "weights.pt"])
    def test_pickled_weights_are_refused(self, folder: Path, pickled: str) -> None:
        torch.save({}, folder / pickled)
        (folder / "model.safetensors").unlink()
        with pytest.raises(BadInput, match=f"only pickled weights \\({pickled}\\).*save_pretrained") as error:
            load_vlm("transformers", str(folder))
        assert one_line(error)
        assert isinstance(load_vlm("transformers", str(folder), random_init=True), VLM)  # no weight is read

    def test_no_weights_no_config_no_folder(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name, reason in (
            (folder, "holds no weights"),
            (folder.parent, "holds no config.json"),
            (folder / "x", "there is no folder"),
        ):
            with pytest.raises(BadInput, match=reason) as error:
                load_vlm("transformers", str(name))
            assert one_line(error)

    def test_a_name_that_the_hub_does_not_give(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError("org/missing is not a local folder\nand much more advice")

        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
        with pytest.raises(BadInput, match=r"^cannot load org/missing: org/missing is not a local folder$"):
            load_vlm("transformers", "org/missing")

    def test_a_text_model_is_refused(self, tmp_path: Path) -> None:
        transformers.Qwen2Config().save_pretrained(tmp_path)
        with pytest.raises(BadInput, match="is a qwen2 model, which takes no images with text") as error:
            load_vlm("transformers", str(tmp_path), random_init=True)
        assert one_line(error)

    def test_an_unknown_dtype(self, folder: Path) -> None:
        with pytest.raises(BadInput, match="unknown dtype 'bf17'"):
            load_vlm("transformers", str(folder), dtype="bf17")


FACTORIES = """
from torch import nn
from tests.models.families import build
from limbeck.models.vlm import VLM
def module(width=2): return nn.Linear(width, width)
def pair(): return build("llava")[0], "the processor"
def view(): return VLM(build("llava")[0])
def nothing(): return None
"""


class TestPython:
    @pytest.fixture(autouse=True)
    def factories(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "made_here.py").write_text(FACTORIES)
        (tmp_path / "broken_here.py").write_text("import no_such_package")
        monkeypatch.syspath_prepend(str(tmp_path))

    def test_what_a_factory_may_return(self) -> None:
        made = load({"source": "python", "name": "made_here:module", "options": {"width": 3}, "dtype": "bfloat16"})
        assert made.weight.shape == (3, 3)
        assert made.weight.dtype == torch.bfloat16
        assert load_vlm("python", "made_here:pair").processor == "the processor"
        assert load_vlm("python", "made_here:view").family == "llava"
        assert isinstance(load_module({"source": "python", "name": "made_here:view"}), nn.Module)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("made_here", "write pkg.mod:factory"),
            ("made_here:modul", "has no 'modul'; did you mean 'module'"),
            ("nowhere_here:module", "cannot import 'nowhere_here'"),
            ("broken_here:module", "No module named 'no_such_package'"),
            ("made_here:nothing", "returned a NoneType"),
        ],
    )
    def test_what_goes_wrong(self, name: str, reason: str) -> None:
        with pytest.raises(BadInput, match=reason):
            load({"source": "python", "name": name})

    def test_a_module_where_a_vision_language_model_is_needed(self) -> None:
        with pytest.raises(BadInput, match="is a Linear, not a vision-language model"):
            load_vlm("python", "made_here:module")


class TestSpec:
    def test_the_nearest_known_source_and_option(self) -> None:
        with pytest.raises(BadInput, match=r"unknown model source 'transformer'; did you mean 'transformers'\?"):
            load({"source": "transformer", "name": "x"})
        with pytest.raises(BadInput, match=r"source 'transformers' has no option 'dtyp'; did you mean 'dtype'\?"):
            load({"source": "transformers", "name": "x", "dtyp": "bfloat16"})
        with pytest.raises(BadInput, match="needs `source` and `name`; name not in"):
            load({"source": "transformers"})

    def test_other_code_adds_a_source(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loading, "SOURCES", dict(loading.SOURCES))
        register_source("square", lambda name, **options: nn.Linear(int(name), int(name), **options))
        assert load({"source": "square", "name": "4", "bias": False}).bias is None


class TestBuild:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_on_the_meta_device_from_a_folder_and_from_a_dict(self, family: str, tmp_path: Path) -> None:
        model, inputs = build(family)
        model.config.save_pretrained(tmp_path)
        for config in (tmp_path, model.config.to_dict()):
            vlm = build_vlm(config)
            assert {parameter.device.type for parameter in vlm.model.parameters()} == {"meta"}
            assert {path: p.shape for path, p in vlm.model.named_parameters()} == {
                path: p.shape for path, p in model.named_parameters()
            }
            assert vlm.visual_widths == tuple(level.shape[-1] for level in VLM(model).see(inputs))
        with pytest.raises(BadInput, match="meta device"):
            vlm.head_spec()
        assert vlm.head(torch.empty(2, 3, vlm.model.config.get_text_config().hidden_size, device="meta")).shape == (
            2,
            3,
            vlm.vocab_size,
        )

    def test_on_another_device(self) -> None:
        config = build("llava")[0].config.to_dict()
        assert build_vlm(config, device="cpu").model.device.type == "cpu"

    def test_what_is_no_configuration_of_one(self) -> None:
        with pytest.raises(BadInput, match="needs `model_type`, given: hidden_size"):
            build_vlm({"hidden_size": 3})
        with pytest.raises(BadInput, match="is a qwen2 model"):
            build_vlm({"model_type": "qwen2"})
        with pytest.raises(BadInput, match="qwen99"):
            build_vlm({"model_type": "qwen99"})


def test_torchvision_can_be_imported_in_a_fresh_process() -> None:
    """Also where its compiled library cannot be loaded, and also when asked twice."""
    code = "from limbeck.models.loading import ensure_torchvision as e; e(); e(); import torchvision.transforms.v2, transformers"
    pytest.importorskip("torchvision")
    subprocess.run([sys.executable, "-c", f"{code}; transformers.AutoModelForImageTextToText"], check=True, capture_output=True)

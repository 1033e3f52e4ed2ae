"""The view of vision transformers: its parts, put together, are the model's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from limbeck.errors import BadInput
from limbeck.models.classifier import Classifier
from limbeck.models.vit import VitView
from limbeck.modules.masked_autoencoder import sincos_positions


def timm_vit(**options: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes = {"img_size": 12, "patch_size": 4, "in_chans": 1, "num_classes": 5, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return VisionTransformer(**{**sizes, **options}).eval()


def transformers_vit(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTMAEConfig if "MAE" in kind else transformers.ViTConfig
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    made = config(**sizes, image_size=12, patch_size=4, num_channels=1, **({"mask_ratio": 0.0} if "MAE" in kind else {}))
    return getattr(transformers, kind)(made).eval()


PICTURES = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"no_embed_class": True},
        {"pre_norm": True},
        {"dynamic_img_size": True},
        {"img_size": (12, 8), "patch_size": (3, 4)},
    ],
    ids=str,
)
def test_the_parts_of_a_timm_vit_are_its_forward(options):
    model = timm_vit(**options)
    view = VitView.of(Classifier(model))
    pictures = torch.rand(2, 1, *view.size)
    tokens = view.embed(pictures)
    assert tokens.shape == (2, view.prefix + view.patches, view.width) and view.prefix == options.get("class_token", True)
    tokens = view.run(tokens)[-1]
    torch.testing.assert_close(model.norm(tokens), model.forward_features(pictures))
    # With mean pooling timm's last norm stands after the pool; the view has it on the tokens.
    assert isinstance(view.norm, nn.LayerNorm)
    view.check(pictures, "student")


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "ViTMAEModel", "ViTMAEForPreTraining"])
def test_the_parts_of_a_transformers_vit_are_its_forward(kind):
    model = transformers_vit(kind)
    view = VitView.of(model)
    base = getattr(model, "vit", model)
    with torch.no_grad():
        if "MAE" in kind:  # its own noise shuffles the patches, unless it is sorted already
            whole = base(PICTURES, noise=torch.arange(9.0).expand(2, -1)).last_hidden_state
        else:
            whole = base(PICTURES).last_hidden_state
        torch.testing.assert_close(view.encode(PICTURES), whole)
    assert (view.grid, view.patch, view.channels, view.width, view.prefix, len(view.blocks)) == ((3, 3), (4, 4), 1, 16, 1, 3)


def test_blocks_after_the_last_do_not_run():
    model = timm_vit()
    view = VitView.of(model)
    tokens, ran = view.embed(PICTURES), []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    whole = view.run(tokens)
    ran.clear()
    some = view.run(tokens, 1)
    assert ran == [0, 1] and len(whole) == 3
    assert all(torch.equal(a, b) for a, b in zip(some, whole, strict=False))


@pytest.mark.parametrize("options", [{}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_fixed_positions_stand_where_the_patches_are(options):
    model = timm_vit(**options)
    view = VitView.of(model)
    fixed = sincos_positions(16, view.grid)
    view.fix_positions(fixed)
    model.patch_embed.proj.weight.data.zero_()
    model.patch_embed.proj.bias.data.zero_()
    tokens = view.embed(PICTURES)
    torch.testing.assert_close(tokens[:, view.prefix :], fixed.expand(2, -1, -1))
    if view.prefix:
        torch.testing.assert_close(tokens[:, :1], model.cls_token.expand(2, -1, -1))
    assert not model.pos_embed.requires_grad


def test_what_is_no_plain_vit_is_refused():
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva

    tiny = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
    for model, message in [
        (nn.Linear(2, 2), "Linear is no plain vision transformer"),
        (Eva(**tiny), "Eva is no plain vision transformer"),
        (timm_vit(reg_tokens=4), "5 tokens before its patches"),
        (timm_vit(class_token=False, reg_tokens=1, global_pool="avg"), "1 tokens before its patches"),
        (VisionTransformerDistilled(**tiny), "2 tokens before its patches"),
        (timm_vit(pos_embed="none"), "no position embedding"),
    ]:
        with pytest.raises(BadInput, match=message):
            VitView.of(model)
    with pytest.raises(BadInput, match=r"the teacher takes pictures of 1x12x12 .* and is shown 3x12x12"):
        VitView.of(timm_vit()).check(torch.rand(1, 3, 12, 12), "teacher")

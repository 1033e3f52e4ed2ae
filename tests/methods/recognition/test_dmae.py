"""DMAE and MAE: who sees what, what each term moves, and that the teacher may stop early."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from limbeck.errors import BadInput
from limbeck.losses.masked import token_distance
from limbeck.methods.recognition.dmae import DMAE, MAE, DMAEConfig, MAEConfig, chosen_blocks
from limbeck.methods.registry import configure
from limbeck.models.classifier import Classifier
from limbeck.models.vit import VitView
from limbeck.modules.masked_autoencoder import patchify, visible

SMALL = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def vit(seed: int, **options: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 5, "embed_dim": 16, "depth": 4, "num_heads": 2}
    return VisionTransformer(**{**sizes, **options})


def teacher(**options: Any) -> Any:
    return vit(1, **{"embed_dim": 24, "depth": 6, **options})


def batch(pictures: int = 3) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(5)
    return {
        "pixel_values": torch.rand(pictures, 1, 16, 16, generator=draw),
        "labels": torch.full((pictures,), -100),
        "ids": [str(index) for index in range(pictures)],
    }


def dmae(student: Any = None, other: Any = None, **hyper: Any) -> DMAE:
    student, other = student or vit(0), other or teacher()
    torch.manual_seed(0)
    made = DMAE(student, other, **{**SMALL, **hyper})
    with torch.no_grad():
        made.eval().prepare(batch())
    return made.train()


def moved(method: MAE, term: str) -> set[str]:
    """The names of the parameters that a term's gradient reaches."""
    method.zero_grad()
    method(batch())[term].backward()
    return {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_the_distillation_moves_the_student_up_to_its_block():
    method = dmae()
    assert method.student_blocks == (2,) and method.teacher_blocks == (3,)
    names = moved(method, "distil")
    in_student = {name.removeprefix("student.model.").partition(".")[0] for name in names if name.startswith("student")}
    blocks = {name.split(".")[3] for name in names if name.startswith("student.model.blocks")}
    assert blocks == {"0", "1", "2"} and in_student == {"patch_embed", "cls_token", "blocks"}
    assert {name for name in names if not name.startswith("student")} == {"adapters.0.weight", "adapters.0.bias"}
    assert all(p.grad is None for p in method.teacher.module.parameters())


def test_the_pixels_move_the_whole_encoder_and_the_decoder():
    names = moved(dmae(), "pixel")
    blocks = {name.split(".")[3] for name in names if name.startswith("student.model.blocks")}
    assert blocks == {"0", "1", "2", "3"} and "student.model.norm.weight" in names and "decoder.mask_token" in names
    assert not any(name.startswith(("adapters", "student.model.head")) for name in names)


def test_fixed_positions_never_move():
    method = dmae()
    assert not method.student.model.pos_embed.requires_grad
    student = vit(0)
    before = student.pos_embed.clone()
    assert "student.model.pos_embed" in moved(dmae(student, positions="own"), "pixel")
    assert torch.equal(student.pos_embed, before)


def test_both_networks_see_the_same_patches_in_the_same_order():
    method, seen = dmae(), {}
    for name, model in (("student", method.student.model), ("teacher", method.teacher.module.model)):
        model.patch_embed.proj.weight.data.zero_()
        model.patch_embed.proj.bias.data.zero_()
        model.pos_embed.data.zero_()
        model.pos_embed.data[0, 1:, 0] = torch.arange(16.0)  # a token is the number of its patch
        model.blocks[0].register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0][:, 1:, 0]}))
    masking = method.draw(batch()["pixel_values"])
    method.draw = lambda pictures: masking
    method(batch())
    assert torch.equal(seen["student"], seen["teacher"]) and torch.equal(seen["student"], masking.keep.float())
    assert seen["student"].shape == (3, 4)  # floor(16 * 0.25)


def test_the_teacher_stops_after_its_block_and_says_the_same():
    method, ran = dmae(), []
    for index, block in enumerate(method.teacher.module.model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    masking, pixel_values = method.draw(batch()["pixel_values"]), batch()["pixel_values"]
    (target,) = method.targets(pixel_values, masking)
    assert ran == [0, 1, 2, 3]
    whole = method.teacher_vit
    maps = whole.run(visible(whole.embed(pixel_values), masking.keep, 1))
    assert len(maps) == 6 and torch.equal(target, maps[3])
    tokens = method.adapters[0](method.seen(pixel_values, masking)[2])
    assert method.compared(tokens, target).item() == method.compared(tokens, maps[3]).item()


def test_a_student_that_is_the_teacher_is_at_no_distance():
    student = vit(0)
    other = copy.deepcopy(student)
    method = dmae(student, other, adapter="none", positions="own", student_blocks=(1, 3), teacher_blocks=(1, 3))
    assert method(batch())["distil"].item() == 0
    adapted = dmae(copy.deepcopy(other), other, positions="own")
    torch.nn.init.eye_(adapted.adapters[0].weight)
    torch.nn.init.zeros_(adapted.adapters[0].bias)
    assert adapted(batch())["distil"].item() == pytest.approx(0, abs=1e-7)
    adapted.adapters[0].weight.data.mul_(3)  # length does not count
    assert adapted(batch())["distil"].item() == pytest.approx(0, abs=1e-7)


def test_terms_are_the_papers():
    method = dmae(student_blocks=(0, 2), teacher_blocks=(1, 4), pixel=2.0, distil=0.5, norm_pix=True)
    pixel_values, masking = batch()["pixel_values"], method.draw(batch()["pixel_values"])
    method.draw = lambda pictures: masking
    terms = method(batch())
    ours = VitView.of(method.student)
    maps = ours.run(visible(ours.embed(pixel_values), masking.keep, 1))
    theirs = method.teacher_vit
    targets = theirs.run(visible(theirs.embed(pixel_values), masking.keep, 1))
    pairs = [(method.adapters[0](maps[0]), targets[1]), (method.adapters[1](maps[2]), targets[4])]
    distil = 0.0
    for ours_at, theirs_at in pairs:
        a, b = (side / side.norm(dim=-1, keepdim=True) for side in (ours_at, theirs_at))
        distil += (a - b).abs().sum().item() / a.numel()
        assert 0 < (a - b).abs().mean().item() <= 2 / math.sqrt(24)
    assert terms["distil"].item() == pytest.approx(0.5 * distil, rel=1e-5)
    painted, target = method.decoder(ours.norm(maps[-1]), masking.restore), patchify(pixel_values, (4, 4))
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (painted - target).square().mean(-1)
    removed = masking.mask.float()
    assert terms["pixel"].item() == pytest.approx(2 * (error * removed).sum().item() / removed.sum().item(), rel=1e-5)
    assert masking.mask.sum(1).tolist() == [12] * 3


def test_twice_the_same_pair_counts_twice():
    one = dmae(vit(0, embed_dim=24), adapter="none", student_blocks=(2,), teacher_blocks=(3,))
    two = dmae(vit(0, embed_dim=24), adapter="none", student_blocks=(2, 2), teacher_blocks=(3, 3))
    masking = one.draw(batch()["pixel_values"])
    one.draw = two.draw = lambda pictures: masking
    assert two(batch())["distil"].item() == pytest.approx(2 * one(batch())["distil"].item())


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_without_an_adapter_tokens_are_compared_as_they_are(distance):
    method = dmae(vit(0, embed_dim=24), adapter="none", distance=distance)
    a, b = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    expected = (a - b).abs().mean() if distance == "l1" else (a - b).square().mean()
    assert method.compared(a, b).item() == pytest.approx(expected.item())
    assert dmae(distance=distance).compared(a, b).item() == pytest.approx(token_distance(a, b, distance=distance).item())


def test_a_class_token_on_one_side_only_is_left_out():
    student = vit(0, class_token=False, global_pool="avg")
    method = dmae(student)
    seen = torch.randn(2, 4, 24)
    assert method.compared(seen, torch.cat([torch.randn(2, 1, 24), seen], dim=1)).item() == pytest.approx(0, abs=1e-7)
    assert method(batch()).total.isfinite()


def test_a_term_without_weight_does_not_run():
    method, ran = dmae(pixel=0.0), []
    method.decoder.register_forward_hook(lambda *_: ran.append("decoder"))
    method.student.model.blocks[3].register_forward_hook(lambda *_: ran.append("last"))
    assert set(method(batch())) == {"distil"} and not ran
    method = dmae(distil=0.0)
    method.teacher.module.model.blocks[0].register_forward_hook(lambda *_: ran.append("teacher"))
    assert set(method(batch())) == {"pixel"} and not ran


def test_each_network_is_shown_what_it_was_trained_to_see():
    student = Classifier(vit(0), mean=[0.2], std=[0.5])
    other = Classifier(teacher(img_size=8, patch_size=2, in_chans=3), size=8, channels=3, mean=[0.1] * 3, std=[0.3] * 3)
    method, seen = dmae(student, other), {}
    student.model.patch_embed.register_forward_pre_hook(lambda _, args: seen.update(student=args[0]))
    other.model.patch_embed.register_forward_pre_hook(lambda _, args: seen.update(teacher=args[0]))
    method(batch())
    torch.testing.assert_close(seen["student"], (batch()["pixel_values"] - 0.2) / 0.5)
    assert seen["teacher"].shape == (3, 3, 8, 8)
    torch.testing.assert_close(seen["teacher"], other.prepared(batch()["pixel_values"]))


def test_a_few_steps_bring_the_student_nearer():
    method, data = dmae(), batch(8)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    history = []
    for _ in range(40):
        terms = method(data)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        history.append({name: value.item() for name, value in terms.items()})
    for term in ("pixel", "distil"):
        assert sum(step[term] for step in history[-5:]) < 0.8 * sum(step[term] for step in history[:5])


def test_what_is_shipped_is_the_bare_student():
    student = vit(0)
    method = dmae(student)
    assert method.deployable().model is student
    kept = method.state_dict()
    assert not any("teacher" in name for name in kept)
    fresh = dmae(vit(7))
    fresh.load_state_dict(kept)
    masking = method.draw(batch()["pixel_values"])
    method.draw = fresh.draw = lambda pictures: masking
    assert torch.equal(method.eval()(batch())["pixel"], fresh.eval()(batch())["pixel"])
    assert torch.equal(method(batch())["distil"], fresh(batch())["distil"])


def test_the_feature_of_a_probe_is_of_the_whole_picture():
    student = vit(0)
    method = dmae(student).eval()
    whole = student.eval().forward_features(batch()["pixel_values"])
    torch.testing.assert_close(method.embed(batch()["pixel_values"]), whole[:, 1:].mean(1))
    by_class = MAE(student, pool="class", **SMALL).eval()
    torch.testing.assert_close(by_class.embed(batch()["pixel_values"]), whole[:, 0])
    assert torch.equal(method.embed(batch()["pixel_values"]), method.embed(batch()["pixel_values"]))


def test_mae_is_the_same_without_a_teacher():
    student = vit(0)
    torch.manual_seed(0)
    alone, taught = MAE(student, **SMALL), dmae(distil=0.0)
    masking = alone.draw(batch()["pixel_values"])
    alone.draw = taught.draw = lambda pictures: masking
    assert alone(batch())["pixel"].item() == taught(batch())["pixel"].item()
    assert set(alone(batch())) == {"pixel"} and not MAE.needs_teacher and DMAE.needs_teacher


def test_transformers_models_are_students_and_teachers():
    from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEModel

    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16, "patch_size": 4}
    other = ViTMAEModel(ViTMAEConfig(hidden_size=24, num_channels=1, **sizes))
    student = ViTForImageClassification(ViTConfig(hidden_size=16, num_channels=1, **sizes))
    method = dmae(student, other)
    terms = method(batch())
    terms.total.backward()
    assert set(terms) == {"pixel", "distil"} and student.vit.layers[0].mlp.fc1.weight.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_blocks_after_three_quarters():
    assert chosen_blocks(None, 12, "student") == (8,) and chosen_blocks(None, 24, "teacher") == (17,)
    assert chosen_blocks(None, 1, "student") == (0,)


def test_what_does_not_fit_is_refused():
    for build, message in [
        (lambda: DMAE(vit(0), **SMALL), "'dmae' needs a teacher"),
        (lambda: dmae(student_blocks=(0, 1)), r"student_blocks \[0, 1\] and teacher_blocks \[3\]"),
        (lambda: dmae(student_blocks=(4,)), "the student has 4 blocks: give indices from 0 to 3"),
        (lambda: dmae(teacher_blocks=(-1,)), "the teacher has 6 blocks"),
        (lambda: dmae(student_blocks=()), r"student_blocks is \[\]"),
        (lambda: dmae(adapter="none"), "the student has 16, the teacher 24: use linear"),
        (lambda: dmae(other=teacher(patch_size=8)), "4x4 patches, the teacher into 2x2"),
        (lambda: dmae(other=teacher(in_chans=3)), "the teacher takes pictures of 3x16x16"),
        (lambda: dmae(vit(0, img_size=32, patch_size=8)), "the student takes pictures of 1x32x32"),
        (lambda: dmae(mask_ratio=0.95), "leaves none of 16 patches visible"),
        (lambda: dmae(vit(0, class_token=False, global_pool="avg"), pool="class"), "the student has none; set pool: mean"),
        (lambda: MAE(torch.nn.Linear(2, 2)), "no plain vision transformer"),
        (lambda: configure(DMAE, {"mask_ratio": 1.0}), "mask_ratio is 1.0"),
        (lambda: configure(DMAE, {"pixel": 0, "distil": 0}), "not both 0"),
        (lambda: configure(MAE, {"decoder_depth": 0}), "decoder_depth must be at least 1"),
        (lambda: configure(MAE, {"distil": 1.0}), "no hyper-parameter 'distil'"),
    ]:
        with pytest.raises(BadInput, match=message):
            build()


def test_defaults_are_the_papers():
    config = DMAEConfig()
    assert (config.mask_ratio, config.pixel, config.distil, config.adapter, config.distance) == (0.75, 1.0, 1.0, "linear", "l1")
    assert (config.decoder_width, config.decoder_depth, config.decoder_heads, config.norm_pix) == (512, 8, 16, False)
    assert isinstance(config, MAEConfig)

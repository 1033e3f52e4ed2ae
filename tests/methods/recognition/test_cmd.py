"""Facts about CMD: which crops are compared, what gets gradient, what follows after a step, and what is shipped."""

import pytest
import torch

from limbeck.errors import BadInput
from limbeck.losses.self_distillation import best_match, centred
from limbeck.methods.recognition.cmd import CMD, CMDConfig
from limbeck.methods.registry import configure
from limbeck.models.loading import ensure_torchvision
from limbeck.models.tiny.classifiers import build
from limbeck.modules.dino import Centre, DINOHead

SMALL = {"outputs": 7, "hidden": 8, "bottleneck": 6}


def crop_batch(count: int = 4, local: int = 2) -> dict:
    draw = torch.Generator().manual_seed(0)
    views = [torch.rand(count, 1, side, side, generator=draw) for side in [12, 12, *[6] * local]]
    return {
        "views": views,
        "pixel_values": views[0],
        "labels": torch.full((count,), -100),
        "ids": [str(index) for index in range(count)],
    }


def vit() -> torch.nn.Module:
    ensure_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=12, patch_size=3, in_chans=1, num_classes=5, embed_dim=8, depth=2, num_heads=2, dynamic_img_size=True
    )


def method(student: torch.nn.Module | None = None, total_steps: int | None = None, **hyper) -> CMD:
    torch.manual_seed(0)
    made = CMD(student or build("cnn", 5, 1, widths=(4, 6)), **{**SMALL, **hyper})
    made.total_steps = total_steps
    with torch.no_grad():
        made.eval().prepare(crop_batch())
    return made.train()


def looks(made: CMD, batch: dict) -> tuple[list, list]:
    return made.look(made.average.module, made.average_heads.module, batch["views"][:2]), made.look(
        made.student, made.heads, batch["views"]
    )


@pytest.mark.parametrize("make", [lambda: build("cnn", 5, 1, widths=(4, 6)), vit])
def test_losses_are_the_slow_sums(make):
    made, batch = method(make(), bag=0.25).eval(), crop_batch()
    generator = torch.Generator().manual_seed(1)
    for centre in (made.center, made.region_center):
        centre.center.copy_(torch.rand(7, generator=generator) / 10)
    terms = made(batch)
    taught, seen = looks(made, batch)
    view, region, inter, bag, pairs = 0.0, 0.0, 0.0, 0.0, 0
    for q in range(2):
        a = ((taught[q].scores - made.center.center) / 0.04).softmax(-1)
        r = ((taught[q].regions - made.region_center.center) / 0.04).softmax(-1)
        for v in range(4):
            if v == q:
                continue
            pairs += 1
            log_a, log_r = (seen[v].scores / 0.1).log_softmax(-1), (seen[v].regions / 0.1).log_softmax(-1)
            view -= (a * log_a).sum(-1).mean()
            for b in range(4):
                for i in range(log_r.shape[1]):
                    cosines = torch.cosine_similarity(seen[v].features[b, i], taught[q].features[b], dim=-1)
                    region -= (r[b, cosines.argmax()] * log_r[b, i]).sum() / (4 * log_r.shape[1])
            m = log_r.exp().mean(1)
            inter += (log_a.exp() * (log_a - m.log())).sum(-1).mean()
            bag -= (r.mean(1) * m.log()).sum(-1).mean()
    assert pairs == 2 * 4 - 2
    for name, slow, weight in (("view", view, 0.5), ("region", region, 0.5), ("inter", inter, 1.0), ("bag", bag, 0.25)):
        torch.testing.assert_close(terms[name], weight * slow / pairs, rtol=1e-4, atol=1e-5)


def test_with_two_crops_each_learns_from_the_other():
    made, batch = method(inter=0.0, region=0.0).eval(), crop_batch(local=0)
    taught, seen = looks(made, batch)
    expected = sum(
        -(centred(taught[q].scores, made.center.center, 0.04) * (seen[1 - q].scores / 0.1).log_softmax(-1)).sum(-1).mean()
        for q in (0, 1)
    )
    torch.testing.assert_close(made(batch)["view"], 0.5 * expected / 2)


def test_the_crops_loss_is_least_where_the_student_says_what_the_teacher_says():
    made, batch = method().eval(), crop_batch()
    taught, _ = looks(made, batch)
    terms = made(batch)
    a = torch.cat([centred(crop.scores, made.center.center, 0.04) for crop in taught])
    r = torch.cat([centred(crop.regions, made.region_center.center, 0.04) for crop in taught])

    def entropy(p):
        return torch.special.entr(p).sum(-1)

    least_of_regions = entropy(r).min()
    assert terms["view"] + terms["region"] >= 0.5 * (entropy(a).mean() + least_of_regions) - 1e-5


def test_only_the_student_and_its_heads_learn():
    made, batch = method(), crop_batch()
    made(batch).total.backward()
    learning = {name.split(".")[0] for name, p in made.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learning == {"student", "heads"}
    assert all(p.grad is None for p in made.student.head.parameters())
    assert all(p.grad is None and not p.requires_grad for p in made.average.parameters())


def test_region_features_are_matched_without_gradient():
    f = torch.randn(2, 3, 4, requires_grad=True)
    assert not best_match(f, torch.randn(2, 5, 4)).requires_grad
    made, batch = method(view=0.0, inter=0.0), crop_batch()
    _, seen = looks(made, batch)
    grads = torch.autograd.grad(made(batch).total, [seen[2].features], allow_unused=True)
    assert grads == (None,)


@pytest.mark.parametrize("target", ["student", "teacher"])
def test_the_bag_follows_the_crop_and_not_the_other_way(target):
    made, batch = method(view=0.0, region=0.0, inter_target=target), crop_batch()
    made(batch).total.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in made.heads["image"].parameters())
    assert max(p.grad.abs().max() for p in made.heads["region"].parameters()) > 0


def test_centres_follow_the_teachers_mean_after_the_step():
    made, batch = method(), crop_batch()
    taught, _ = looks(made, batch)
    image = torch.cat([crop.scores for crop in taught])
    regions = torch.cat([crop.regions for crop in taught]).flatten(0, 1)
    before = torch.rand(7)
    made.center.center.copy_(before)
    made(batch)
    assert torch.equal(made.center.center, before)  # the loss was computed under the old one
    made.after_step(1)
    torch.testing.assert_close(made.center.center, 0.9 * before + 0.1 * image.mean(0))
    torch.testing.assert_close(made.region_center.center, 0.1 * regions.mean(0))


def test_centres_do_not_depend_on_how_a_batch_is_split_nor_on_the_student():
    batch = crop_batch()
    whole, split, other = method(vit()), method(vit()), method(vit())
    for made in (split, other):
        made.load_state_dict(whole.state_dict())
    with torch.no_grad():
        for parameter in [*other.student.parameters(), *other.heads.parameters()]:
            parameter.add_(1)
    for made in (whole, other):
        made(batch)
    for part in (slice(0, 1), slice(1, 4)):
        split({**batch, "views": [view[part] for view in batch["views"]]})
    for made in (whole, split, other):
        made.after_step(1)
    torch.testing.assert_close(split.center.center, whole.center.center)
    torch.testing.assert_close(split.region_center.center, whole.region_center.center)
    torch.testing.assert_close(other.center.center, whole.center.center)
    still = whole.center.center.clone()
    whole.eval()(batch)
    whole.after_step(2)
    assert torch.equal(whole.center.center, still)


def test_the_teacher_is_the_average_of_the_student():
    made = method(momentum=0.9, total_steps=10)
    name, own = next(iter(made.average.module.named_parameters()))
    before = own.clone()
    with torch.no_grad():
        for parameter in [*made.student.parameters(), *made.heads.parameters()]:
            parameter.add_(1)
    head = made.average_heads.module["image"].directions.clone()
    made.after_step(5)
    share = 0.1 / 2  # half of the way, the cosine has brought m from 0.9 to 0.95
    torch.testing.assert_close(own, before + share * (made.student.get_parameter(name) - before))
    torch.testing.assert_close(made.average_heads.module["image"].directions, head + share)


def test_the_teacher_normalises_as_the_student_where_it_is_asked_to():
    batch = crop_batch(local=0)
    follows, apart = method(), method(teacher_mode="eval")
    taught, seen = looks(follows, batch)
    torch.testing.assert_close(taught[0].scores, seen[0].scores)  # one set of weights, one batch
    taught, seen = looks(apart, batch)
    assert (taught[0].scores - seen[0].scores).abs().max() > 1e-3
    assert not any(module.training for module in apart.average.modules())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_teachers_statistics_are_those_of_its_own_forwards_or_averages(mode):
    made = method(total_steps=10, teacher_mode=mode, momentum=0.75)
    name = next(name for name, _ in made.student.named_buffers() if name.endswith("running_mean"))
    before = made.average.module.get_buffer(name).clone()
    made(crop_batch())
    own, students = made.average.module.get_buffer(name).clone(), made.student.get_buffer(name)
    assert torch.equal(own, before) == (mode == "eval")
    made.after_step(1)
    kept = made.average.module.get_buffer(name)
    expected = own if mode == "train" else own.lerp(students, 1 - made.average.momentum_at(1))
    torch.testing.assert_close(kept, expected)
    assert not torch.equal(kept, students)


def test_crops_of_one_size_pass_together_in_order():
    made, batch = method().eval(), crop_batch()
    _, seen = looks(made, batch)
    for view, crop in zip(batch["views"], seen, strict=True):
        alone = made.student.read(view)
        torch.testing.assert_close(crop.features, alone.features.flatten(2).mT)
        torch.testing.assert_close(crop.scores, made.heads["image"](alone.pooled))
    calls = []
    handle = made.student.model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    made(batch)
    handle.remove()
    assert calls == [8, 8]


def test_class_tokens_are_no_regions():
    made, batch = method(vit()).eval(), crop_batch()
    _, seen = looks(made, batch)
    assert [crop.features.shape[1] for crop in seen] == [16, 16, 4, 4]


def test_routes_of_weight_zero_do_not_run():
    made, batch = method(region=0.0, inter=0.0), crop_batch()
    assert set(made(batch)) == {"view"}
    _, seen = looks(made, batch)
    assert seen[0].regions.shape[1] == 0
    made.after_step(1)
    assert made.region_center.center.abs().max() == 0
    assert made.center.center.abs().max() > 0


def test_temperature_and_the_frozen_last_layer_follow_the_epochs():
    made, batch = method(teacher_temperature=(0.04, 0.4), warmup_epochs=3), crop_batch()
    made.steps_per_epoch = 10
    values = []
    for step in (0, 9, 10, 20, 300):
        made.steps_done = step
        made.zero_grad()
        terms = made(batch)
        terms.total.backward()
        assert (made.heads["image"].directions.grad is None) == (step < 10)
        values.append(terms["view"].item())
    assert made.epoch == 30
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert len({round(value, 4) for value in values[1:4]}) == 3
    assert values[3] == pytest.approx(values[4], abs=1e-6)


def test_the_teachers_backbone_is_shipped():
    made, batch = method(), crop_batch()
    shipped = made.eval().deployable()
    assert shipped is made.average.module
    torch.testing.assert_close(made.embed(batch["pixel_values"]), shipped.read(batch["pixel_values"]).pooled)
    with torch.no_grad():
        next(made.student.parameters()).add_(1)
    torch.testing.assert_close(made.embed(batch["pixel_values"]), shipped.read(batch["pixel_values"]).pooled)
    assert shipped(batch["pixel_values"]).abs().max() == 0  # a head that nothing trains favours no class
    assert made.importance(batch["pixel_values"]).sum(-1).allclose(torch.ones(4))


def test_a_rebuilt_run_goes_on_as_it_would_have():
    batch, made = crop_batch(), method()
    adam = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    made(batch).total.backward()
    adam.step()
    made.after_step(1)
    again = method()
    again.load_state_dict(made.state_dict())
    one, other = made(batch), again(batch)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["view"], method()(batch)["view"])


@pytest.mark.parametrize("hyper", [{}, {"aggregation": "attention"}, {"inter_target": "teacher"}, {"bag": 1.0}])
def test_losses_fall_in_training(hyper):
    made, batch = method(**hyper), crop_batch(8)
    adam = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    values = []
    for _ in range(40):
        adam.zero_grad()
        total = made(batch).total  # the teacher stands still: after_step is not called
        total.backward()
        adam.step()
        values.append(total.item())
    assert values[-1] < 0.9 * values[0]


def test_scores_of_a_head_are_cosines():
    head = DINOHead(4, 9, hidden=5, bottleneck=3)
    scores = head(torch.randn(6, 2, 4) * 100)
    assert scores.shape == (6, 2, 9) and scores.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        doubled = head.directions.mul_(2)
    assert doubled.shape == (9, 3)
    x = torch.randn(3, 4)
    before = head(x)
    with torch.no_grad():
        head.directions.mul_(5)
    torch.testing.assert_close(head(x), before)
    head(x, frozen=True).sum().backward()
    assert head.directions.grad is None and head.mlp[0].weight.grad is not None


def test_a_centre_that_saw_nothing_stays():
    centre = Centre(3, momentum=0.5)
    centre.see(torch.tensor([[1.0, 2.0, 3.0]]))
    centre.see(torch.tensor([[[3.0, 2.0, 1.0], [2.0, 2.0, 2.0]]]))
    centre.update()
    torch.testing.assert_close(centre.center, torch.tensor([1.0, 1.0, 1.0]))
    centre.update()
    torch.testing.assert_close(centre.center, torch.tensor([1.0, 1.0, 1.0]))
    assert set(centre.state_dict()) == {"center"}


def test_bad_input():
    batch = crop_batch()
    with pytest.raises(BadInput, match=r"the batch has 0, expected 2 or more; set data\.views"):
        method()({key: value for key, value in batch.items() if key != "views"})
    with pytest.raises(BadInput, match="the batch has 1"):
        method()({**batch, "views": batch["views"][:1]})
    for values, message in (
        ({"view": -1}, "view is -1"),
        ({"view": 0, "region": 0, "inter": 0}, "nothing would be learned"),
        ({"outputs": 1}, "outputs is 1"),
        ({"student_temperature": 0}, "temperatures are 0"),
        ({"momentum": 2}, "momentum is 2"),
    ):
        with pytest.raises(BadInput, match=message):
            CMDConfig(**values)
    assert configure(CMD, {"teacher_temperature": [0.02, 0.03]}).teacher_temperature == (0.02, 0.03)
    with pytest.raises(BadInput, match="layers is 0"):
        DINOHead(4, 9, layers=0)
    with pytest.raises(BadInput, match="momentum is 3"):
        Centre(4, momentum=3)

"""Switch-KD and its controls on every family of vision-language models: which loss moves what, and what must stay still."""

from __future__ import annotations

import copy
import fnmatch
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import create
from limbeck.batch import predicting, supervised
from limbeck.errors import BadInput
from limbeck.losses import bild, dbild, kl_divergence
from limbeck.losses.linear import LinearLogits
from limbeck.methods.vlm.switch_kd import SwitchKD
from limbeck.models.vlm import VLM
from limbeck.teachers.frozen import FrozenTeacher
from tests.models.families import FAMILIES, IMAGE, build


def pair(family: str) -> tuple[VLM, VLM, dict]:
    """A student, a teacher with other weights, and a batch that both read."""
    student, inputs = build(family, seed=1)
    teacher, _ = build(family, seed=2)
    return VLM(student), VLM(teacher), {"ids": ["a", "b"], "student": inputs}


def gradients(method, part: str) -> list[torch.Tensor]:
    """The gradients of one part of the student; None counts as zero."""
    return [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in method.student.named_parameters()
        if method.view.part_of(name) == part
    ]


def moves(method, part: str) -> bool:
    return any(gradient.abs().max() > 0 for gradient in gradients(method, part) if gradient.numel())


def backward(method, batch, term: str) -> None:
    method.zero_grad(set_to_none=True)
    method(batch)[term].backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_switch_term_moves_the_students_vision_and_nothing_else(family):
    student, teacher, batch = pair(family)
    method = SwitchKD(student, teacher)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    backward(method, batch, "switch")
    assert moves(method, "vision")
    assert not moves(method, "projector")
    assert not moves(method, "language")
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    for term in ("ce", "align"):
        backward(method, batch, term)
        assert all(moves(method, part) for part in ("vision", "projector", "language")), term
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_terms_are_what_the_paper_writes(family):
    """Against the routes run one by one, in float32, without replay: eq. 1, 4, 5, 6."""
    student, teacher, batch = pair(family)
    losses = SwitchKD(student, teacher, align=0.5, switch=2.0)(batch)
    inputs = batch["student"]
    positions, labels = supervised(inputs)
    plain = {key: value for key, value in inputs.items() if key != "labels"}
    z_s = student.model(**plain, use_cache=False).logits[positions]
    z_t = teacher.model(**plain, use_cache=False).logits[positions]
    z_w = teacher.head(teacher.speak(inputs, student.see(inputs)))[positions]
    torch.testing.assert_close(losses["ce"], F.cross_entropy(z_s, labels), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["align"], 0.5 * dbild(z_s, z_t), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["switch"], 2.0 * dbild(z_w, z_t), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.total, losses["ce"] + losses["align"] + losses["switch"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_gives_the_gradients_of_its_plain_losses_on_whole_logits(family):
    student, teacher, batch = pair(family)
    inputs = batch["student"]
    positions, labels = supervised(inputs)
    assert isinstance(student.logits(student.read(inputs).hidden[positions]), LinearLogits)
    z_s = student.head(student.read(inputs).hidden[positions])
    z_w = teacher.head(teacher.speak(inputs, student.see(inputs))[positions])
    z_t = teacher.head(teacher.read(inputs).hidden[positions]).detach()
    ce = F.cross_entropy(z_s, labels)
    plain = {
        "sft": ce,
        "kd": ce + kl_divergence(z_s, z_t),
        "bild": ce + bild(z_s, z_t),
        "switch-kd": ce + dbild(z_s, z_t) + dbild(z_w, z_t),
    }
    parameters = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    for name, total in plain.items():
        ours = create(name, student, None if name == "sft" else teacher)(batch).total
        torch.testing.assert_close(ours, total, rtol=1e-5, atol=1e-6)
        found = torch.autograd.grad(ours, parameters, materialize_grads=True)
        expected = torch.autograd.grad(total, parameters, materialize_grads=True, retain_graph=True)
        for gradient, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("touch", ["adapter", "hook", "replaced forward"])
def test_a_head_that_is_more_than_its_weights_is_called(touch):
    """What an adapter, a hook or a replaced forward does to the logits reaches the loss."""
    student, _, batch = pair("llava")
    before = create("sft", student)(batch).total
    head = student.model.lm_head
    if touch == "adapter":
        student.model.lm_head = nn.utils.parametrizations.weight_norm(copy.deepcopy(head))
        with torch.no_grad():
            student.model.lm_head.parametrizations.weight.original0 *= 2
    elif touch == "hook":
        head.register_forward_hook(lambda _module, _args, logits: 2 * logits)
    else:
        head.forward = lambda hidden: 2 * F.linear(hidden, head.weight)
    after = create("sft", student)(batch).total
    inputs = {key: value for key, value in batch["student"].items() if key != "labels"}
    positions, labels = supervised(batch["student"])
    torch.testing.assert_close(after, F.cross_entropy(student.model(**inputs, use_cache=False).logits[positions], labels))
    assert abs(after - before) > 1e-3


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_with_the_teachers_own_eyes_the_switch_term_is_zero(family):
    student, teacher, batch = pair(family)
    eyes = dict(teacher.model.named_parameters())
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if student.part_of(name) == "vision":
                parameter.copy_(eyes[name])
    losses = SwitchKD(student, teacher)(batch)
    assert losses["switch"].abs() < 1e-8
    assert losses["align"] > 1e-6


def test_the_teachers_vision_tower_runs_once_a_step():
    student, teacher, batch = pair("llava")
    method = SwitchKD(student, teacher)
    runs = []
    block = next(m for n, m in teacher.model.model.vision_tower.named_modules() if n.endswith("layers.0"))
    block.register_forward_hook(lambda *_: runs.append(1))
    method(batch)
    assert len(runs) == 1


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_recomputing_the_switch_route_changes_no_gradient_and_saves_memory(family):
    student, teacher, batch = pair(family)
    plain = SwitchKD(student, teacher)
    backward(plain, batch, "switch")
    expected = [gradient.clone() for gradient in gradients(plain, "vision")]
    kept = saved_bytes(plain, batch)
    recomputed = SwitchKD(student, teacher, checkpoint_switch=True)
    backward(recomputed, batch, "switch")
    for gradient, other in zip(gradients(recomputed, "vision"), expected, strict=True):
        torch.testing.assert_close(gradient, other)
    assert saved_bytes(recomputed, batch) < 0.7 * kept
    assert not teacher.model.training


def saved_bytes(method, batch) -> int:
    """Bytes that the switch route keeps for the backward pass, weights left out."""
    weights = {p.data_ptr() for m in (method.student, method.teacher.module) for p in m.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    visual = tuple(level.detach().requires_grad_() for level in method.view.see(batch["student"]))
    replay = method.teacher_route(batch).reading.replay
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = method.switch_logits(batch, visual, replay)
    assert logits.hidden.requires_grad
    return sum(kept.values())


def test_the_switch_without_a_graph_is_refused():
    student, teacher, batch = pair("llava")
    method = SwitchKD(student, teacher)
    with torch.no_grad(), pytest.raises(BadInput, match="carries no gradient"):
        method(batch)
    student.model.model.vision_tower.requires_grad_(False)
    with pytest.raises(BadInput, match="carries no gradient"):
        method(batch)
    method.weights["switch"] = 0.0
    assert "switch" not in method(batch)


def without_images(batch: dict) -> dict:
    inputs = {key: batch["student"][key] for key in ("input_ids", "attention_mask", "labels")}
    return {
        "ids": batch["ids"],
        "student": {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 5)},
    }


def test_a_batch_without_an_image_has_every_term_and_a_switch_of_zero():
    """A process whose terms were fewer would leave the others waiting for its part of one."""
    student, teacher, batch = pair("llava")
    method = SwitchKD(student, teacher)
    seen, unseen = method(batch), method(without_images(batch))
    assert list(seen) == list(unseen)
    assert unseen["switch"] == 0
    assert unseen["align"] > 0
    method.weights["switch"] = 0.0
    assert "switch" not in method(without_images(batch))


@pytest.mark.parametrize("name", ["sft", "kd", "bild", "switch-kd"])
@pytest.mark.parametrize("part", ["vision", "projector"])
def test_a_batch_without_an_image_trains_a_part_that_it_does_not_reach_by_zero(name, part):
    student, teacher, batch = pair("llava")
    method = create(name, student, None if name == "sft" else teacher)
    for parameter_name, parameter in student.model.named_parameters():
        parameter.requires_grad_(student.part_of(parameter_name) == part)
    losses = method(without_images(batch))
    with torch.no_grad():
        assert torch.equal(losses.total, method(without_images(batch)).total)
    losses.total.backward()
    for parameter_name, parameter in student.model.named_parameters():
        if student.part_of(parameter_name) == part:
            assert (parameter.grad == 0).all()
        else:
            assert parameter.grad is None


def test_a_frozen_teacher_is_taken_as_it_is():
    student, teacher, batch = pair("llava")
    frozen = FrozenTeacher(teacher.model)
    method = create("kd", student, frozen)
    assert method.teacher is frozen
    torch.testing.assert_close(method(batch).total, create("kd", student, teacher)(batch).total)


def test_teacher_is_outside_the_method():
    student, teacher, _ = pair("llava")
    method = SwitchKD(student, teacher)
    method.train()
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    own = {id(parameter) for parameter in method.parameters()}
    assert own == {id(parameter) for parameter in student.model.parameters()}
    assert all(name.startswith("student.") for name in method.state_dict())
    assert method.deployable() is student.model


@pytest.mark.parametrize("name", ["sft", "kd", "bild", "switch-kd"])
def test_ignored_positions_change_nothing(name):
    student, teacher, batch = pair("llava")
    method = create(name, student, teacher)
    full = method(batch).total
    inputs = copy.deepcopy(batch["student"])
    last = (inputs["labels"] != -100).int().cumsum(1).argmax(1)
    row = int((inputs["attention_mask"][:, -1] == 1).nonzero()[0])
    if last[row] + 1 < inputs["input_ids"].shape[1]:
        inputs["input_ids"][row, last[row] + 1 :] = 5
        torch.testing.assert_close(method({"ids": ["a", "b"], "student": inputs}).total, full)
    inputs["labels"].fill_(-100)
    nothing = method({"ids": ["a", "b"], "student": inputs})
    assert nothing.total == 0
    nothing.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


def test_teacher_and_student_are_paired_kth_to_kth():
    """A teacher that reads another, longer prompt still meets the student at the k-th answer token."""
    student, teacher, batch = pair("llava")
    inputs = batch["student"]
    inputs["labels"][:, 0] = -100  # nothing predicts a first token
    prefix = torch.full((inputs["input_ids"].shape[0], 3), 7)
    longer = {
        **inputs,
        "input_ids": torch.cat([prefix, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(prefix), inputs["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(prefix, -100), inputs["labels"]], 1),
    }
    method = create("kd", student, teacher)
    losses = method({**batch, "teacher": longer})
    (rows, columns), _ = supervised(inputs)
    z_s = student.head(student.read(inputs).hidden[rows, columns])
    z_t = teacher.head(teacher.read(longer).hidden[rows, columns + 3])
    expected = F.kl_div(z_s.log_softmax(-1), z_t.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(losses["kd"], expected)


def test_units_are_the_supervised_tokens():
    student, teacher, batch = pair("llava")
    assert create("kd", student, teacher).units(batch) == int((batch["student"]["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize(("sizes", "message"), [({"vision_width": 40}, r"\[48\].*\[40\]|\[40\].*\[48\]")])
def test_other_widths_are_refused_with_both_sizes_and_bridged_on_request(sizes, message):
    from limbeck.models.tiny import digit_vlm

    student = VLM(*digit_vlm.build("digit-vlm-student", **sizes))
    teacher = VLM(*digit_vlm.build("digit-vlm-teacher"))
    with pytest.raises(BadInput, match=message):
        SwitchKD(student, teacher)
    with pytest.warns(UserWarning, match="the Switch-KD paper has none"):
        method = SwitchKD(student, teacher, bridge="linear")
    assert [tuple(p.shape) for p in method.bridge.parameters()] == [(48, 40), (48,)]


def tiny_batch(student: VLM, teacher: VLM) -> dict:
    from limbeck.data.embedded.digit_scenes import digit_scenes
    from limbeck.data.vlm import VQACollator, VQADataset

    dataset = VQADataset(digit_scenes("train", 4), student.processor, teacher.processor)
    return VQACollator(student.processor, teacher.processor)([dataset[index] for index in range(4)])


def test_another_token_count_is_refused_before_training_and_bridged_on_request():
    from limbeck.models.tiny import digit_vlm

    student = VLM(*digit_vlm.build("digit-vlm-student", patch_size=8))
    teacher = VLM(*digit_vlm.build("digit-vlm-teacher", patch_size=4))
    batch = tiny_batch(student, teacher)
    with pytest.raises(BadInput) as error, torch.no_grad():
        SwitchKD(student, teacher).prepare(batch)
    assert "4" in str(error.value)
    assert "16" in str(error.value)
    method = SwitchKD(student, teacher, bridge="linear")
    with torch.no_grad():
        method.prepare(batch)
    backward(method, batch, "switch")
    assert moves(method, "vision")
    assert not moves(method, "language")


def test_another_vocabulary_is_refused_with_both_sizes():
    student, _inputs = build("llava", seed=1)
    teacher, _ = build("llava", seed=2)
    teacher.resize_token_embeddings(student.get_output_embeddings().weight.shape[0] + 8)
    with pytest.raises(BadInput) as error:
        create("kd", VLM(student), VLM(teacher))
    size = student.get_output_embeddings().weight.shape[0]
    assert f"{size:,}" in str(error.value)
    assert f"{size + 8:,}" in str(error.value)


@pytest.mark.parametrize("name", ["kd", "bild", "switch-kd"])
def test_a_padded_head_distils_over_the_shared_ids(name):
    from limbeck.models.tiny import digit_vlm

    student = VLM(*digit_vlm.build("digit-vlm-student"))
    model, processor = digit_vlm.build("digit-vlm-teacher")
    teacher = VLM(copy.deepcopy(model), processor)
    model.resize_token_embeddings(len(processor.tokenizer) + 24)
    padded = VLM(model, processor)
    batch = tiny_batch(student, teacher)
    torch.testing.assert_close(create(name, student, padded)(batch).total, create(name, student, teacher)(batch).total)


def test_a_method_without_its_teacher_says_what_to_add():
    student, _, _ = pair("llava")
    with pytest.raises(BadInput, match="needs a teacher"):
        create("kd", student)


def test_pretraining_trains_the_projector_by_labels_alone():
    student, teacher, _batch = pair("llava")
    first, second = SwitchKD(student, teacher, schedule="pretrain-dft").stages()
    assert first.weights == {"align": 0.0, "switch": 0.0}
    names = [name for name, _ in student.model.named_parameters() if student.part_of(name) == "projector"]
    matched = [n for n, _ in student.model.named_parameters() if any(fnmatch.fnmatch(f"student.{n}", p) for p in first.trainable)]
    assert sorted(matched) == sorted(names)
    assert second.trainable == ("*",)


@pytest.mark.parametrize("name", ["sft", "kd", "bild", "switch-kd"])
def test_no_line_of_ours_waits_for_the_device(name):
    """A collated batch says where its answers are; what transformers itself reads back from the device is its own affair."""
    from limbeck.models.tiny import digit_vlm

    student = VLM(*digit_vlm.build("digit-vlm-student"))
    teacher = VLM(*digit_vlm.build("digit-vlm-teacher"))
    batch = tiny_batch(student, teacher)
    assert torch.equal(batch["student"]["predicting"], predicting(batch["student"]["labels"]))
    method = create(name, student, None if name == "sft" else teacher)
    method(batch)  # measures the head
    aten = torch.ops.aten
    waiting = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal}
    blamed = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            by_mask = function.overloadpacket is aten.index and any(i is not None and i.dtype == torch.bool for i in args[1])
            if function.overloadpacket in waiting or by_mask:
                frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
                blamed.append(frames[-2].filename)  # the last is this method
            return function(*args, **(kwargs or {}))

    with Watch():
        method(batch)
    assert blamed, "transformers' own are seen, or the watch sees nothing"
    assert not [filename for filename in blamed if "/limbeck/" in filename and "/transformers/" not in filename]

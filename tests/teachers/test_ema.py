"""The student's average as a teacher: what it averages, what it copies, and that nothing trains it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.errors import BadInput
from limbeck.teachers.ema import EMATeacher


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


@torch.no_grad()
def fill(module: nn.Module, value: float) -> None:
    for parameter in module.parameters():
        parameter.fill_(value)


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 1), st.lists(st.floats(-3, 3), min_size=1, max_size=6))
def test_after_n_steps_it_is_the_weighted_sum_of_all_students(momentum, values):
    student = nn.Linear(2, 3).double()
    fill(student, 1.0)
    teacher = EMATeacher(student, momentum=momentum)
    for step, value in enumerate(values, start=1):
        fill(student, value)
        teacher.update(student, step)
    steps = len(values)
    expected = momentum**steps + sum((1 - momentum) * momentum ** (steps - i) * v for i, v in enumerate(values, start=1))
    for parameter in teacher.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected))
    assert all((parameter == values[-1]).all() for parameter in student.parameters())


def test_momentum_rises_to_one_along_a_cosine():
    teacher = EMATeacher(nn.Linear(2, 2), momentum=0.9, total=100)
    assert teacher.momentum_at(0) == pytest.approx(0.9)
    assert teacher.momentum_at(50) == pytest.approx(0.95)
    assert teacher.momentum_at(25) == pytest.approx(1 - 0.1 * (1 + math.cos(math.pi / 4)) / 2)
    assert teacher.momentum_at(100) == teacher.momentum_at(1000) == 1
    assert EMATeacher(nn.Linear(2, 2), momentum=0.9).momentum_at(10**6) == 0.9


def test_at_the_end_of_the_schedule_it_stands_still():
    student = nn.Linear(2, 3)
    teacher = EMATeacher(student, momentum=0.0, total=10)
    before = teacher.module.weight.clone()
    fill(student, 5.0)
    teacher.update(student, 10)
    assert torch.equal(teacher.module.weight, before)
    teacher.update(student, 0)
    assert torch.equal(teacher.module.weight, student.weight)


def test_it_is_a_copy_that_takes_no_gradient():
    student = net()
    teacher = EMATeacher(student)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    images = torch.randn(4, 3, requires_grad=True)
    assert not teacher(images).requires_grad
    student(images).sum().backward()
    teacher.update(student, 1)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())


def test_by_default_it_is_never_in_train_mode():
    student = net().train()
    teacher = EMATeacher(student)
    owner = nn.ModuleList([student, teacher])
    owner.train()
    assert student.training
    assert not any(module.training for module in teacher.modules())
    statistics, images = teacher.module[1].running_mean.clone(), torch.randn(5, 3)
    assert torch.equal(owner[1](images), owner[1](images))  # dropout is off
    assert torch.equal(teacher.module[1].running_mean, statistics)


def test_in_mode_train_it_follows_its_owner():
    teacher = EMATeacher(net(), mode="train")
    owner = nn.ModuleList([teacher]).train()
    assert all(module.training for module in teacher.modules())
    owner.eval()
    assert not any(module.training for module in teacher.modules())
    images = torch.randn(5, 3)
    owner.train()
    teacher(images)
    hidden = teacher.module[0](images)
    torch.testing.assert_close(teacher.module[1].running_mean, 0.1 * hidden.mean(0))


@pytest.mark.parametrize(("rule", "mean"), [("copy", 4.0), ("average", 1.0)])
def test_statistics_are_copied_or_averaged_and_counters_are_copied(rule, mean):
    student = net()
    teacher = EMATeacher(student, momentum=0.75, buffers=rule)
    student[1].running_mean.fill_(4.0)
    student[1].num_batches_tracked.fill_(9)
    teacher.update(student, 1)
    torch.testing.assert_close(teacher.module[1].running_mean, torch.full((4,), mean))
    assert teacher.module[1].num_batches_tracked == 9
    assert student[1].running_mean[0] == 4


def test_it_is_resumed_from_a_state_dict():
    student = net()
    teacher = EMATeacher(student, momentum=0.5)
    fill(student, 2.0)
    teacher.update(student, 1)
    resumed = EMATeacher(net(), momentum=0.5)
    resumed.load_state_dict(teacher.state_dict())
    for one in (teacher, resumed):
        fill(student, -1.0)
        one.update(student, 2)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("wrapper", [nn.Sequential, torch.compile], ids=["submodule", "compiled"])
def test_a_wrapped_student_is_the_same_student(wrapper):
    student = net()
    teacher = EMATeacher(student, momentum=0.0)
    fill(student, 3.0)
    student[1].running_var.fill_(7.0)
    teacher.update(wrapper(student), 1)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, teacher.module.state_dict()[name]), name


def test_a_float32_average_of_a_bfloat16_student_moves():
    """In bfloat16 itself, 1 + 0.001 is 1: an average kept in the student's precision would stand still."""
    student = nn.Linear(2, 2).bfloat16()
    fill(student, 1.0)
    teacher = EMATeacher(student, momentum=0.999).float()
    fill(student, 2.0)
    teacher.update(student, 1)
    torch.testing.assert_close(teacher.module.weight, torch.full((2, 2), 1.001))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "differ in parameter"),
        (nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 2)), r"'0.weight' is \[4, 3\].*\[5, 3\]"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Dropout(), nn.Linear(4, 2)),
            "in buffer",
        ),
        (nn.ReLU(), "differ in parameter"),
    ],
)
def test_another_module_is_refused_and_nothing_moves(other, message):
    teacher = EMATeacher(net(), momentum=0.0)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    with pytest.raises(BadInput, match=message):
        teacher.update(other, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"momentum": 1.1}, "momentum is 1.1"),
        ({"total": 0}, "total is 0"),
        ({"mode": "both"}, "mode is 'both'"),
        ({"buffers": "none"}, "buffers is 'none'"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(BadInput, match=message):
        EMATeacher(nn.Linear(2, 2), **given)

"""Official code, run once in float64, is reproduced: losses on relations, from megvii-research/mdistiller (a08d46f).

In `rkd.npz` case 1 has two equal teacher samples, case 2 two samples, and case 3 compares squared distances; in `sp.npz` case 2 is a
single sample.
"""

import pytest
import torch

from limbeck.losses.relations import rkd, rkd_angle, rkd_distance, sp
from tests.parity.test_vectors import load

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("case", range(4))
def test_rkd(case):
    golden = load("rkd", case)
    student, teacher, squared = golden["fs"].requires_grad_(), golden["ft"], bool(golden["squared"])
    torch.testing.assert_close(rkd_distance(student, teacher, squared=squared).detach(), golden["loss_d"], **EXACT)
    torch.testing.assert_close(rkd_angle(student, teacher).detach(), golden["loss_a"], **EXACT)
    loss = rkd(student, teacher, squared=squared)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss_25d_50a"], **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_fs"], **EXACT)


@pytest.mark.parametrize("case", range(3))
def test_sp(case):
    golden = load("sp", case)
    student = golden["fs"].requires_grad_()
    loss = sp(student, golden["ft"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"].squeeze(0), **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_fs"], **EXACT)

"""Official code, run once in float64, is reproduced.

`kd.npz` and `fitnet.npz` are from megvii-research/mdistiller (a08d46f), `bild.npz` from fpcsong/BiLD (4322056).

Keys are ``c<case>_<name>``; ``bild.npz`` holds one value a position for each branch, and the gradient of the mean of their sum.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.losses import bild, dbild, hint, kd
from limbeck.modules.projectors import ConvReg

EXACT = {"rtol": 0, "atol": 1e-9}


def load(name: str, case: int) -> dict[str, torch.Tensor]:
    with np.load(Path(__file__).with_name(f"{name}.npz")) as file:
        prefix = f"c{case}_"
        return {
            key.removeprefix(prefix): torch.from_numpy(file[key])
            for key in file.files
            if key.startswith(prefix) and file[key].dtype.kind != "U"
        }


@pytest.mark.parametrize("case", range(4))
def test_kd(case):
    golden = load("kd", case)
    student = golden["zs"].requires_grad_()
    loss = kd(student, golden["zt"], temperature=golden["T"].item())
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"], **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_zs"], **EXACT)


@pytest.mark.parametrize("case", range(4))
def test_fitnet(case):
    golden = load("fitnet", case)
    features = golden["fs"].requires_grad_()
    regressor = ConvReg(features.shape, golden["ft"].shape).double()
    regressor.conv.load_state_dict({"weight": golden["conv_w"], "bias": golden["conv_b"]})
    projected = regressor(features)
    loss = hint(projected, golden["ft"])
    loss.backward()
    torch.testing.assert_close(projected.detach(), golden["proj"], **EXACT)
    torch.testing.assert_close(loss.detach(), golden["loss"], **EXACT)
    torch.testing.assert_close(features.grad, golden["grad_fs"], **EXACT)
    torch.testing.assert_close(regressor.conv.weight.grad, golden["grad_w"], **EXACT)


@pytest.mark.parametrize("case", range(5))
def test_bild(case):
    golden = load("bild", case)
    student = golden["zs"].requires_grad_()
    k, tau = int(golden["k"]), golden["T"].item()
    loss = bild(student, golden["zt"], k=k, tau=tau)
    loss.backward()
    by_position = golden["teacher_led"] + golden["student_led"]
    torch.testing.assert_close(loss.detach(), by_position.mean(), **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_zs"], **EXACT)
    torch.testing.assert_close(bild(student, golden["zt"], k=k, tau=tau, reduction="none").detach(), by_position, **EXACT)


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_one_branch_of_bild(branch):
    golden = load("bild", 0)
    k = int(golden["k"])
    one = {"tau": golden["T"].item(), "k_min": k, "k_max": k, "divergence": "forward", "branches": (branch,), "reduction": "none"}
    torch.testing.assert_close(dbild(golden["zs"], golden["zt"], **one), golden[f"{branch}_led"], **EXACT)

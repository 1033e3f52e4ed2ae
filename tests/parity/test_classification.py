"""Official code, run once in float64, is reproduced: losses on the logits of a classifier.

`dkd.npz` is from megvii-research/mdistiller (a08d46f), `dist.npz` from hunto/image_classification_sota (6f7a70a), `logitstd.npz` from
sunshangquan/logit-standardization-KD (f6e5aa5), `takd.npz` from imirzadeh/Teacher-Assistant-Knowledge-Distillation (0f8168f),
`dml.npz` from YingZhangDUT/Deep-Mutual-Learning (34a2058), `one.npz` from Lan1991Xu/ONE_NeurIPS2018 (54afde3).
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.losses import cross_entropy
from limbeck.losses.classification import (
    dist,
    dist_parts,
    dkd,
    dkd_parts,
    dml,
    ensemble,
    logit_standardised_kd,
    one_kd,
    ramp_up,
    standardise,
    takd,
)
from tests.parity.test_vectors import load

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def assert_reproduced(golden, loss, student="zs", gradient="grad_zs"):
    (ours,) = torch.autograd.grad(loss, golden[student])
    torch.testing.assert_close(loss.detach(), golden["loss"], **EXACT)
    torch.testing.assert_close(ours, golden[gradient], **EXACT)


@pytest.mark.parametrize("case", range(4))
def test_dkd(case):
    golden = load("dkd", case)
    logits = golden["zs"].requires_grad_(), golden["zt"], golden["y"]
    temperature, alpha, beta = (golden[name].item() for name in ("T", "alpha", "beta"))
    target, others = dkd_parts(*logits, temperature=temperature)
    torch.testing.assert_close(target.detach(), golden["tckd"], **EXACT)
    torch.testing.assert_close(others.detach(), golden["nckd"], **EXACT)
    assert_reproduced(golden, dkd(*logits, alpha=alpha, beta=beta, temperature=temperature))


@pytest.mark.parametrize("case", range(4))
def test_dist(case):
    golden = load("dist", case)
    logits = golden["zs"].requires_grad_(), golden["zt"]
    beta, gamma, tau = (golden[name].item() for name in ("beta", "gamma", "tau"))
    inter, intra = dist_parts(*logits, tau=tau)
    torch.testing.assert_close(inter.detach(), golden["inter"], **EXACT)
    torch.testing.assert_close(intra.detach(), golden["intra"], **EXACT)
    assert_reproduced(golden, dist(*logits, beta=beta, gamma=gamma, tau=tau))


@pytest.mark.parametrize("case", range(3))
def test_logit_standardisation(case):
    golden = load("logitstd", case)
    student, teacher, temperature = golden["zs"].requires_grad_(), golden["zt"], golden["T"].item()
    torch.testing.assert_close(standardise(student).detach(), golden["norm_zs"], **EXACT)
    assert_reproduced(golden, logit_standardised_kd(student, teacher, temperature=temperature))
    decoupled = dkd(standardise(student), standardise(teacher), golden["y"], alpha=1, beta=8, temperature=temperature)
    torch.testing.assert_close(decoupled.detach(), golden["dkd_loss_a1_b8"], **EXACT)


@pytest.mark.parametrize("case", range(2))
def test_takd(case):
    golden = load("takd", case)
    student, teacher, temperature = golden["zs"].requires_grad_(), golden["zt"], golden["T"].item()
    distilled = takd(student, teacher, temperature=temperature)
    torch.testing.assert_close(distilled.detach(), temperature**2 * golden["kd_elementmean"], **EXACT)
    share = golden["lambda"].item()
    assert_reproduced(golden, (1 - share) * cross_entropy(student, golden["y"]) + share * distilled)


@pytest.mark.parametrize("case", range(2))
def test_dml(case):
    golden = load("dml", case)
    loss = dml(golden["z1_self"].requires_grad_(), golden["z2_peer"])
    assert_reproduced(golden, loss, student="z1_self", gradient="grad_z1")


@pytest.mark.parametrize("case", range(2))
def test_one_branch(case):
    golden = load("one", case)
    branch = golden["zs"].requires_grad_()
    assert_reproduced(golden, one_kd(branch.unsqueeze(1), golden["zt"], temperature=golden["T"].item()))


def test_one_ensemble_and_ramp_up():
    with np.load(Path(__file__).with_name("one.npz")) as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files}
    branches = torch.stack([golden[f"gate_branch{m}"] for m in range(3)], dim=1)
    torch.testing.assert_close(ensemble(branches, golden["gate_probs"]), golden["gate_logits"], **EXACT)
    ramp = [ramp_up(epoch, int(golden["ramp_len"])) for epoch in golden["ramp_epoch"].tolist()]
    torch.testing.assert_close(torch.tensor(ramp, dtype=torch.float64), golden["ramp_value"], **EXACT)

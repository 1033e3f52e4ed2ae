"""Official code on maps, run once in float64, is reproduced.

`at.npz`, `nst.npz` and `reviewkd.npz` are from megvii-research/mdistiller (a08d46f), `vid.npz` from HobbitLong/RepDistiller
(b84f547), `ofd.npz` from clovaai/overhaul-distillation (76344a8), `cwd.npz` from irfanICMLL/TorchDistiller (78bac7c), `mgd.npz` from
yzd-v/MGD (2c9da0b), `simkd.npz` from DefangChen/SimKD (2b389c3).

Keys are ``<case>_<name>``; ``grad_<name>`` is the gradient of the loss.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.losses import hint
from limbeck.losses.maps import (
    attention_transfer,
    cwd,
    hcl,
    margin_from_batch_norm,
    masked_generation,
    nst,
    ofd,
    pool_to_smaller,
    variational,
)
from limbeck.modules.regressors import ABF, Generation, ReviewFusion, SimKDProjector, VIDRegressor

EXACT = {"rtol": 0, "atol": 1e-9}
SINGLE = {"rtol": 1e-5, "atol": 0}


def load(name: str, case: str) -> dict[str, torch.Tensor]:
    with np.load(Path(__file__).with_name(f"{name}.npz"), allow_pickle=False) as file:
        return {
            key.removeprefix(f"{case}_"): torch.from_numpy(file[key])
            for key in file.files
            if key.startswith(f"{case}_") and file[key].dtype.kind != "U"
        }


def option(name: str, key: str) -> str:
    with np.load(Path(__file__).with_name(f"{name}.npz"), allow_pickle=False) as file:
        return str(file[key])


def set_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load what is stored; what is not (BatchNorm) stays as it starts."""
    assert not module.load_state_dict(weights, strict=False).unexpected_keys


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_at(case):
    golden = load("at", case)
    student = golden["fs"].requires_grad_()
    loss = attention_transfer(student, golden["ft"], p=golden["p"].item())
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"], **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_fs"], **EXACT)


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_nst(case):
    golden = load("nst", case)
    student = golden["fs"].requires_grad_()
    loss = nst(student, golden["ft"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"], **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_fs"], **EXACT)


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_vid(case):
    golden = load("vid", case)
    student = golden["fs"].requires_grad_()
    regressor = VIDRegressor(student.shape, golden["ft"].shape).double()
    weights = {f"predict.{2 * layer}.weight": golden[f"w{layer}"] for layer in range(3)}
    regressor.load_state_dict({**weights, "log_scale": golden["log_scale"]})
    loss = variational(regressor(student), golden["ft"], regressor.log_scale)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"], **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_fs"], **EXACT)
    torch.testing.assert_close(regressor.log_scale.grad, golden["grad_log_scale"], **EXACT)


def test_vid_starts_from_the_official_scale():
    golden = load("vid", "init")["log_scale"]
    regressor = VIDRegressor((2, 3, 4, 4), (2, len(golden), 4, 4))
    torch.testing.assert_close(regressor.log_scale.detach(), golden, **SINGLE)


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_cwd(case):
    golden = load("cwd", case)
    student = golden["s"].requires_grad_()
    over = {"channel": "channels", "spatial": "spatial"}[option("cwd", f"{case}_norm")]
    loss = cwd(student, golden["t"], temperature=golden["T"].item(), over=over)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"], **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_s"], **EXACT)


def test_cwd_by_squared_error_is_a_hint_between_distributions():
    """The official divergence "mse" ignores the temperature, and sums over positions."""
    golden = load("cwd", "c3")
    assert option("cwd", "c3_div") == "mse"
    student = golden["s"].requires_grad_()
    loss = hint(student.flatten(2).softmax(-1), golden["t"].flatten(2).softmax(-1)) * student[0, 0].numel()
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"], **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_s"], **EXACT)


@pytest.mark.parametrize("case", ["cls0", "cls1", "det0", "det1", "seg0", "seg1"])
def test_mgd(case):
    golden = load("mgd", case)
    student = golden["s"].requires_grad_()
    kind = "channel" if case.startswith("cls") else "pixel"
    generation = Generation(student.shape, golden["t"].shape, mask=kind, drop=golden["lambda"].item()).double()
    names = {"g0_w": "generate.0.weight", "g0_b": "generate.0.bias", "g2_w": "generate.2.weight", "g2_b": "generate.2.bias"}
    if "align_w" in golden:
        names |= {"align_w": "align.weight", "align_b": "align.bias"}
    generation.load_state_dict({ours: golden[theirs] for theirs, ours in names.items()})
    assert generation.draw_mask(golden["t"]).shape == golden["mask"].shape
    loss = masked_generation(generation(student, golden["mask"].bool()), golden["t"], alpha=golden["alpha"].item())
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"], **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_s"], **EXACT)


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_ofd(case):
    golden = load("ofd", case)
    student = golden["src"].requires_grad_()
    torch.testing.assert_close(margin_from_batch_norm(golden["bn_weight"], golden["bn_bias"]), golden["margin"], **SINGLE)
    loss = ofd(student, golden["tgt"], golden["margin"], reduction="sum")
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss_sum"], **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_src"], **EXACT)
    torch.testing.assert_close(ofd(student, golden["tgt"], golden["margin"]).detach(), golden["mdistiller_loss"], **EXACT)


@pytest.mark.parametrize("case", ["hcl0", "hcl1", "hcl2", "hcl3", "hcl4"])
def test_hcl(case):
    golden = load("reviewkd", case)
    student = golden["fs"].requires_grad_()
    loss = hcl(student, golden["ft"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"], **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_fs"], **EXACT)


@pytest.fixture
def review():
    """ReviewKD's two stored layers: deep and shallow inputs, and the stack over them with the stored weights."""
    maps, deep, shallow = load("reviewkd", "abf"), load("reviewkd", "abf0"), load("reviewkd", "abf1")
    inputs = [maps["x_shallow"].requires_grad_(), maps["x_deep"].requires_grad_()]
    fusion = ReviewFusion([x.shape for x in inputs], [maps["shallow_out"].shape, maps["deep_out"].shape]).double()
    set_weights(fusion.deepest, {"squeeze.0.weight": deep["conv1_w"], "project.0.weight": deep["conv2_w"]})
    set_weights(
        fusion.shallow[0],
        {
            "squeeze.0.weight": shallow["conv1_w"],
            "project.0.weight": shallow["conv2_w"],
            "gate.weight": shallow["att_w"],
            "gate.bias": shallow["att_b"],
        },
    )
    return maps, inputs, fusion


def test_abf(review):
    maps, (shallow, deep), fusion = review
    deepest, block = fusion.deepest, fusion.shallow[0]
    assert isinstance(deepest, ABF)
    out, residual = deepest(deep)
    torch.testing.assert_close(out.detach(), maps["deep_out"], **EXACT)
    torch.testing.assert_close(residual.detach(), maps["deep_res"], **EXACT)
    out, residual = block(shallow, residual)
    torch.testing.assert_close(out.detach(), maps["shallow_out"], **EXACT)
    torch.testing.assert_close(residual.detach(), maps["shallow_res"], **EXACT)


def test_review_fusion(review):
    maps, (shallow, deep), fusion = review
    outputs = fusion([shallow, deep])
    for output, name in zip(outputs, ["shallow_out", "deep_out"], strict=True):
        torch.testing.assert_close(output.detach(), maps[name], **EXACT)
    sum(output.square().mean() for output in outputs).backward()
    torch.testing.assert_close(deep.grad, maps["grad_x_deep"], **EXACT)
    torch.testing.assert_close(shallow.grad, maps["grad_x_shallow"], **EXACT)


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_simkd(case):
    golden = load("simkd", case)
    student = golden["s"].requires_grad_()
    projector = SimKDProjector(student.shape, golden["t"].shape, factor=golden["factor"].item()).double()
    set_weights(projector, {f"project.{3 * layer}.weight": golden[f"w{layer}"] for layer in range(3)})
    projected, target = pool_to_smaller(projector(student), golden["t"])
    loss = hint(projected, target)
    loss.backward()
    prediction = torch.nn.functional.linear(projected.mean((2, 3)), golden["cls_w"], golden["cls_b"])
    torch.testing.assert_close(projected.detach(), golden["proj_s"], **EXACT)
    torch.testing.assert_close(target, golden["target"], **EXACT)
    torch.testing.assert_close(prediction.detach(), golden["pred"], **EXACT)
    torch.testing.assert_close(loss.detach(), golden["loss"], **EXACT)
    torch.testing.assert_close(student.grad, golden["grad_s"], **EXACT)

"""Two calls of HobbitLong/RepDistiller's CRDLoss (b84f547) on one batch, run once in float64: the first sets Z, the second finds it.

``params`` are K, T, Z_v1, Z_v2 and momentum of the official buffer, which holds T in float32.
"""

import pytest
import torch

from limbeck.modules.memory import CRDHead
from tests.parity.test_vectors import EXACT, load


@pytest.mark.parametrize("case", range(2))
def test_two_calls(case):
    golden = load("crd", case)
    negatives, temperature, _, _, momentum = golden["step0_params_K_T_Z1_Z2_m"].tolist()
    width, student_dim = golden["ws"].shape
    head = CRDHead(
        student_dim, golden["wt"].shape[1], int(golden["n_data"]), None, int(negatives), temperature, momentum, width
    ).double()
    head.load_state_dict(
        {
            "student_embed.weight": golden["ws"],
            "student_embed.bias": golden["bs"],
            "teacher_embed.weight": golden["wt"],
            "teacher_embed.bias": golden["bt"],
            "memory.student_bank": golden["mem1_before"],
            "memory.teacher_bank": golden["mem2_before"],
            "memory.log_z": torch.full((2,), -torch.inf),
        }
    )
    for step in ("step0", "step1"):
        features = golden["fs"].clone().requires_grad_()
        head.zero_grad()
        loss = head(features, golden["ft"], golden["idx"], golden["cidx"])
        loss.backward()
        torch.testing.assert_close(loss.detach(), golden[f"{step}_loss"].squeeze(), **EXACT)
        torch.testing.assert_close(features.grad, golden[f"{step}_grad_fs"], **EXACT)
        torch.testing.assert_close(head.teacher_embed.weight.grad, golden[f"{step}_grad_wt"], **EXACT)
        torch.testing.assert_close(head.memory.student_bank, golden[f"{step}_mem1"], **EXACT)
        torch.testing.assert_close(head.memory.teacher_bank, golden[f"{step}_mem2"], **EXACT)
        normalisers = golden[f"{step}_params_K_T_Z1_Z2_m"][2:4]
        torch.testing.assert_close(head.memory.log_z.exp(), normalisers, rtol=1e-12, atol=0)

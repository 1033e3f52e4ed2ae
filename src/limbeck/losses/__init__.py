"""What is compared, and how far apart it is: functions of tensors, and nothing else.

Every loss takes the student first and the teacher second, detaches the teacher, computes in float32 where the input is half
precision, and reduces over the positions that its mask keeps.
"""

from limbeck.losses.bild import bild, dbild, kneedle
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
from limbeck.losses.contrastive import crd, info_nce
from limbeck.losses.features import cosine, hint
from limbeck.losses.logits import cross_entropy, kd, kl_divergence
from limbeck.losses.maps import (
    attention_transfer,
    cwd,
    fsp,
    hcl,
    margin_from_batch_norm,
    masked_generation,
    nst,
    ofd,
    pool_to_smaller,
    variational,
)
from limbeck.losses.relations import cc, pkt, rkd, rkd_angle, rkd_distance, sp

__all__ = [
    "attention_transfer",
    "bild",
    "cc",
    "cosine",
    "crd",
    "cross_entropy",
    "cwd",
    "dbild",
    "dist",
    "dist_parts",
    "dkd",
    "dkd_parts",
    "dml",
    "ensemble",
    "fsp",
    "hcl",
    "hint",
    "info_nce",
    "kd",
    "kl_divergence",
    "kneedle",
    "logit_standardised_kd",
    "margin_from_batch_norm",
    "masked_generation",
    "nst",
    "ofd",
    "one_kd",
    "pkt",
    "pool_to_smaller",
    "ramp_up",
    "rkd",
    "rkd_angle",
    "rkd_distance",
    "sp",
    "standardise",
    "takd",
    "variational",
]

"""What is compared, and how far apart it is: functions of tensors, and nothing else.

Every loss takes the student first and the teacher second, detaches the teacher, computes in float32 where the input is half
precision, and reduces over the positions that its mask keeps.
"""

from limbeck.losses.bild import bild, dbild, kneedle
from limbeck.losses.features import cosine, hint
from limbeck.losses.logits import cross_entropy, kd, kl_divergence

__all__ = ["bild", "cosine", "cross_entropy", "dbild", "hint", "kd", "kl_divergence", "kneedle"]

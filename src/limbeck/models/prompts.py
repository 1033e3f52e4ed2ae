"""Class names in words: the weights of a zero-shot classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import BadInput


def class_weights(encode_text: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The zero-shot classifier of a text encoder (CLIP, arXiv 2103.00020, section 3.1.4).

    encode_text: texts -> embeddings [N, D] of any scale. class_names: C names. templates: texts with ``{}`` where the name goes. A class is
    the mean over the templates of its normalised embeddings, normalised again; templates are encoded a class at a time.
    Returns [D, C] with columns of length 1. Raises `BadInput` without classes or templates, and for a template without ``{}``.
    """
    if not class_names or not templates:
        raise BadInput(
            f"a zero-shot classifier needs class names and prompt templates; given {len(class_names)} names and {len(templates)} templates"
        )
    for template in templates:
        if "{}" not in template:
            raise BadInput(f"prompt template {template!r} has no place for the class name: write {{}} where it goes")
    embeddings = [
        F.normalize(encode_text([template.replace("{}", name) for template in templates]), dim=-1).mean(0) for name in class_names
    ]
    return F.normalize(torch.stack(embeddings, dim=1), dim=0)

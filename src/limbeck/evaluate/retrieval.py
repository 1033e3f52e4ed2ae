"""Retrieval: what is found first, between pictures of a class and between pictures and their captions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import BadInput

ROWS = 1024  # queries that are ranked at a time


def same_class_retrieval(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Each picture asks for the others by cosine: ``r1``, ``r5`` (one of its class among the first 1, 5) and ``map`` (mean average
    precision over the whole ranking).

    features: [N, D]; labels: [N]. A picture that is alone in its class has nothing to find and does not ask; where none asks, all are 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1)
        parts = [_ranked(unit, labels, rows) for rows in torch.arange(len(labels), device=labels.device).split(ROWS)]
    found = torch.cat(parts) if parts else features.new_zeros(0, 3)
    r1, r5, precision = found.mean(0).tolist() if len(found) else (0.0, 0.0, 0.0)
    return {"r1": r1, "r5": r5, "map": precision}


def _ranked(unit: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Of the queries at ``rows`` that have something to find: hit at 1, hit at 5, average precision. [Q, 3]."""
    cosine = unit[rows] @ unit.T
    cosine[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
    order = cosine.argsort(dim=-1, descending=True, stable=True)[:, :-1]
    hits = (labels[order] == labels[rows, None]).float()
    hits = hits[hits.any(-1)]
    precision = hits.cumsum(-1) / torch.arange(1, hits.shape[1] + 1, device=hits.device)
    average = (precision * hits).sum(-1) / hits.sum(-1)
    return torch.stack([hits[:, :1].amax(-1), hits[:, :5].amax(-1), average], dim=-1) if len(hits) else hits.new_zeros(0, 3)


def recall_at_k(similarity: Tensor, k: int, captions_per_image: int = 1) -> tuple[float, float]:
    """R@K of image-to-text and of text-to-image, in percent (Karpathy and Fei-Fei, arXiv 1412.2306, section 4.2).

    similarity: [I, I * captions_per_image]; the captions of image i stand at columns i * captions_per_image and on. An image is a hit if
    any of its captions is among the first k. Equal scores count against the hit, so that equal embeddings find nothing.
    Raises `BadInput` for another shape, for k < 1, and for scores that are not numbers.
    """
    images, texts = similarity.shape
    if not images or texts != images * captions_per_image:
        raise BadInput(
            f"similarity is [{images}, {texts}]; expected [images, images * captions_per_image] with {captions_per_image} captions an image"
        )
    if k < 1:
        raise BadInput(f"k is {k}; expected at least 1")
    if similarity.isnan().any():
        raise BadInput("similarity holds NaN: nothing can be ranked by it")
    owner = torch.arange(texts, device=similarity.device) // captions_per_image  # [T]
    own = owner == torch.arange(images, device=similarity.device)[:, None]  # [I, T]
    best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    images_before = (~own & (similarity >= best)).sum(1)
    texts_before = (~own & (similarity >= similarity[owner, torch.arange(texts, device=owner.device)])).sum(0)
    return 100 * (images_before < k).double().mean().item(), 100 * (texts_before < k).double().mean().item()


def image_text_retrieval(similarity: Tensor, captions_per_image: int = 1, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """``image_to_text_r<k>``, ``text_to_image_r<k>`` and their sum ``rsum``, in percent; similarity as in `recall_at_k`."""
    found: dict[str, float] = {}
    for k in ks:
        found[f"image_to_text_r{k}"], found[f"text_to_image_r{k}"] = recall_at_k(similarity, k, captions_per_image)
    return {**found, "rsum": sum(found.values())}

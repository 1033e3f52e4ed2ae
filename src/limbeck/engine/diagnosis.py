"""Which term moves the student: shares of the gradient, cosines between terms, and warnings in words."""

from __future__ import annotations

from typing import Any

import torch

from limbeck.methods.base import Batch, Method

VANISHES = 0.01  # of the summed gradient norms


def shares(method: Method, batch: Batch) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure the gradient of each weighted term on one batch, with respect to the student's trainable parameters.

    Returns {"norm": {term: L2 norm}, "share": {term: part of the summed norms}, "cosine": {"a,b": cosine}} and a
    remark for a person on each term that does nothing. Both are empty where nothing of the student trains.
    The random state and the method's buffers (BatchNorm's, memories) are left as they were, and no gradient is accumulated.
    """
    parameters = [parameter for parameter in method.student.parameters() if parameter.requires_grad]
    if not parameters:
        return {"norm": {}, "share": {}, "cosine": {}}, {}
    devices = [parameters[0].device] if parameters[0].is_cuda else []
    buffers = {name: buffer.clone() for name, buffer in method.named_buffers()}
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        losses = method(batch)
    gradients = {}
    for name, value in losses.items():
        if not value.requires_grad:
            gradients[name] = torch.zeros(sum(parameter.numel() for parameter in parameters), device=parameters[0].device)
            continue
        parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True))
        gradients[name] = torch.cat([part.flatten().float() for part in filled])
    with torch.no_grad():
        for name, buffer in method.named_buffers():
            buffer.copy_(buffers[name])
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    total = sum(norms.values()) or 1.0
    names = list(norms)
    cosine = {
        f"{a},{b}": torch.dot(gradients[a], gradients[b]).item() / (norms[a] * norms[b])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if norms[a] and norms[b]
    }
    remarks = {}
    for name, norm in norms.items():
        if norm == 0:
            remarks[name] = (
                f"term {name!r} gives the student no gradient (value {losses[name].item():.3g}): are its weight and layer right?"
            )
        elif norm / total < VANISHES:
            remarks[name] = (
                f"term {name!r} is {norm / total:.2%} of the gradient: it vanishes beside the others; raise its weight"
            )
    return {"norm": norms, "share": {name: norm / total for name, norm in norms.items()}, "cosine": cosine}, remarks

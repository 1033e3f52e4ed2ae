"""``train.compile``: the repeated blocks of the student, of the teachers, or of both, through ``torch.compile``."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from limbeck import taps

BACKEND = "inductor"
VARIANTS = (
    64  # of one forward in the source, which student and teacher may share: with and without gradient, dtypes; torch allows 8
)


class Compiled:
    """Models whose blocks are compiled until ``close``; parameter names, hooks on the blocks and what saves the models are untouched.

    One graph serves every length (``dynamic``), so that numbers do not depend on which lengths came before: a resumed run that
    starts from the same first batch compiles the same. models: by the name to warn with.
    """

    def __init__(self, models: Iterable[nn.Module], warn: Callable[[str], None]) -> None:
        self.warn, self.on, self.told = warn, True, False
        self._undo = ExitStack()
        models = list(models)
        if not models:
            return
        import torch._dynamo  # slow to import
        import torch._functorch.config

        torch._dynamo.reset()  # nor on what this process compiled before
        self._undo.enter_context(torch._dynamo.config.patch(recompile_limit=VARIANTS))
        # The backward is compiled with the forward, where a failure can still be caught; a method may go through a graph twice.
        self._undo.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True, donated_buffer=False))
        for model in models:
            regions = {name: Region(block, self) for name, block in repeated_blocks(model).items()}
            self._undo.enter_context(taps.bypass(model, regions))

    def close(self) -> None:
        """Give the blocks their own forwards back."""
        self._undo.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is compiled."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def give_up(self, error: Exception) -> None:
        """Go on uncompiled, and say why in one line."""
        self.on = False
        inner = getattr(error, "inner_exception", error)
        reason = next(iter(str(inner).strip().splitlines()), "")
        self.warn(f"train.compile: going on uncompiled: {type(inner).__name__}: {reason}")

    def spare(self, block: nn.Module) -> None:
        """Say once that a block is read inside."""
        if not self.told:
            self.told = True
            self.warn(
                f"train.compile: inside of {type(block).__name__} something is tapped, which a compiled graph hides: uncompiled"
            )


class Region:
    """Stands in for the forward of a block (`taps.bypass`), compiled.

    It runs the block's own forward where something inside is hooked or bypassed, which a compiled graph would not notice, where
    compiling is paused, and from the first failure to compile on.
    """

    def __init__(self, block: nn.Module, owner: Compiled) -> None:
        self.block, self.owner = block, owner
        self.eager = self.__wrapped__ = block.forward
        self.inside = [module for module in block.modules() if module is not block]
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.owner.on:
            return self.eager(*args, **kwargs)
        if any(map(_tapped, self.inside)):
            self.owner.spare(self.block)
            return self.eager(*args, **kwargs)
        try:
            if self.compiled is None:
                self.compiled = torch.compile(self.eager, backend=BACKEND, dynamic=True)
            return self.compiled(*args, **kwargs)
        except Exception as error:  # compilers raise all kinds; what is the block's own fault it raises again
            self.owner.give_up(error)
            return self.eager(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.eager, memo)  # a copied block runs its own forward


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost blocks by name: members of one class, made of parts, of a ModuleList or Sequential. The model itself (``""``)
    where there are none."""
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        listed = isinstance(module, nn.ModuleList | nn.Sequential)
        kinds = Counter(type(child) for child in module.children() if listed and any(True for _ in child.children()))
        for name, child in module.named_children():
            if kinds[type(child)] > 1:
                found[f"{prefix}{name}"] = child
            else:
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found or {"": model}


def _tapped(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says. transformers' own recorders, which it never removes, do not count."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return "forward" in vars(module) or any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks)

"""Read, or replace, what flows through a named submodule of any ``nn.Module``; no model is edited.

    with taps.record(model, {"mid": "layer3", "seen": ("head", "input")}) as seen:
        model(x)
    seen["mid"]

What taps one model step after step keeps its `Places`, which find and check them faster than `record` does::

    places = taps.Places({"mid": "layer3"})
    with places.open(model) as seen:
        model(x)

A tap is open from the moment it is made until its ``with`` block ends, also by an exception, or until ``close()``; after that
the module is as it was, in whatever order the taps on it are closed. It works through nested modules, autocast,
``DistributedDataParallel`` and ``torch.compile`` wrappers: names are those of the wrapped module, with or without a leading ``module.``.

Gradient checkpointing runs a region a second time during backward. A recording does not see that second run. A replacement
inside such a region must see it, or the gradient is that of the unreplaced module: keep the tap open until backward is done, and
use non-reentrant checkpointing (``use_reentrant=False``, the default of transformers), the only kind that carries gradient to a
tensor that enters a region by a hook.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.errors import BadInput

Where = Literal["input", "output"]

WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


class Recording(Mapping[str, Any]):
    """What flowed through the tapped submodules, by the labels given to `record`; kept after the tap is closed.

    ``seen[label]`` is the value of the last call, ``seen.calls(label)`` those of all calls, oldest first.
    Tensors are the very ones of the graph; tuples, dicts and model outputs are copied one level deep, so that what the
    model later writes into them does not show.
    """

    def __init__(self, calls: dict[str, list[Any]], taps: Sequence[_Tap]) -> None:
        self._calls, self._taps = calls, taps

    def calls(self, label: str) -> list[Any]:
        """The value of every call, oldest first; empty where the submodule did not run."""
        return self._calls[label]

    def __getitem__(self, label: str) -> Any:
        calls = self._calls[label]
        if not calls:
            raise BadInput(f"the submodule tapped as {label!r} did not run; `limbeck taps` lists those that do")
        return calls[-1]

    def __contains__(self, label: object) -> bool:
        return label in self._calls

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def close(self) -> None:
        """Leave the modules as they were; what was recorded stays."""
        for tap in reversed(self._taps):  # the last one is found at once
            tap.close()
        self._taps = ()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


NOTHING = Recording({}, ())
"""What flowed through no submodule at all."""


class Places:
    """Where to record, on any model: what `record` takes, opened as often as needed.

    What was tapped is kept for the next time. Names are looked up anew on another model, or where another module stands at one of them
    or above it: what is tapped is what is there when it is opened. A copy of `Places` starts with nothing kept.
    """

    def __init__(self, targets: Mapping[str, str | tuple[str, Where]]) -> None:
        self.targets = dict(targets)
        self._model: nn.Module | None = None
        self._taps: list[_Tap] = []

    def __reduce__(self) -> tuple[type[Places], tuple[Any]]:
        return Places, (self.targets,)

    def open(self, model: nn.Module) -> Recording:
        """Record until the returned tap is closed. Raises `BadInput` for a name that does not exist, naming the nearest."""
        if not self.targets:
            return NOTHING
        if not self._stand_on(model):
            self._taps = [_Tap(label, model, *_place(target)) for label, target in self.targets.items()]
            self._model = model
        calls: dict[str, list[Any]] = {}
        for tap in self._taps:
            kept: list[Any] = []
            calls[tap.label] = kept
            tap.start(kept)
        return Recording(calls, self._taps)

    def _stand_on(self, model: nn.Module) -> bool:
        """Whether what was tapped last is closed, and is what a look-up would find."""
        if self._model is not model:
            return False
        for tap in self._taps:
            if tap.calls is not None or tap.buried:
                return False
            for parent, name, child in tap.path:
                if parent._modules.get(name) is not child:
                    return False
        return True


class Step(NamedTuple):
    """From a module to one of its children."""

    parent: nn.Module
    name: str
    child: nn.Module


class Submodule(NamedTuple):
    """One line of `describe`: a submodule's name, its class, and the shape of the first tensor it returns (None: no tensor)."""

    name: str
    kind: str
    shape: tuple[int, ...] | None


def record(model: nn.Module, targets: Mapping[str, str | tuple[str, Where]]) -> Recording:
    """Record submodules' outputs, or inputs, until the returned tap is closed.

    targets: label -> name of a submodule (its output), or (name, "input" | "output"). The input of a submodule is its first
    positional argument or, where there is none, its first keyword argument that is a tensor.
    Raises `BadInput` for a name that does not exist, naming the nearest.
    """
    return Places(targets).open(model)


def replace(model: nn.Module, values: Mapping[str, Any], *, at: Where = "output") -> ExitStack:
    """Replace submodules' outputs, or inputs, until the returned tap is closed.

    values: name of a submodule -> the value, or a callable that is given the original and returns the value (None keeps it).
    at: "output", or "input": the argument that `record` would record. Several taps on a module act in the order they were made.
    Raises `BadInput` for a name that does not exist, naming the nearest.
    """
    modules = {name: _find(model, name) for name in values}
    taps = ExitStack()
    for name, value in values.items():
        taps.callback(_Change(modules[name], at, value if callable(value) else _always(value)).close)
    return taps


def bypass(model: nn.Module, values: Mapping[str, Any]) -> ExitStack:
    """Do not run submodules at all, until the returned tap is closed: calling one gives the value.

    values: name of a submodule -> the value, or a callable that is given the arguments of the call. Hooks on the submodule
    still run. Raises `BadInput` for a name that does not exist, naming the nearest.
    """
    modules = {name: _find(model, name) for name in values}
    taps = ExitStack()
    for name, value in values.items():
        taps.callback(_StandIn(modules[name], value if callable(value) else _always(value)).close)
    return taps


def describe(model: nn.Module, run: Callable[[], object]) -> list[Submodule]:
    """Every submodule that runs during ``run()``, in the order in which they first finish.

    ``run`` calls the model once on some batch. It is called in eval mode and without gradient, so that nothing moves.
    """
    found: dict[str, Submodule] = {}
    with ExitStack() as taps, undisturbed(model):
        for name, module in model.named_modules():
            if name:
                note = _note(found, name, type(module).__name__)
                taps.callback(module.register_forward_hook(note).remove)
        run()
    return list(found.values())


@contextmanager
def undisturbed(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """For a dry forward: eval mode and no gradient; modes and the state of the random generators are as before afterwards.

    device: a GPU whose generator is kept too.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
            yield
    finally:
        for module in training:
            module.training = True


def _place(target: str | tuple[str, Where]) -> tuple[str, Where]:
    return (target, "output") if isinstance(target, str) else target


def _find(model: nn.Module, name: str) -> nn.Module:
    path = _path(model, name)
    return path[-1].child if path else model


def _path(model: nn.Module, name: str) -> list[Step]:
    """The way from a model down to its submodule, through the wrappers around it."""
    wrappers, inner = [], model
    while isinstance(inner, WRAPPERS) or "_orig_mod" in inner._modules:  # torch.compile's wrapper; its class is slow to import
        ((child, wrapped),) = inner.named_children()
        wrappers.append(Step(inner, child, wrapped))
        inner = wrapped
    for candidate in (name, name.removeprefix("module.")):
        steps = _steps(inner, candidate)
        if steps is not None:
            return [*wrappers, *steps]
    modules = dict(inner.named_modules(remove_duplicate=False))
    near = difflib.get_close_matches(name, modules, n=3) or [child for child, _ in inner.named_children()]
    raise BadInput(f"{type(inner).__name__} has no submodule {name!r}; nearest: {', '.join(near)}")


def _steps(model: nn.Module, name: str) -> list[Step] | None:
    """The way down a dotted name; None where there is no such submodule."""
    steps: list[Step] = []
    for part in name.split(".") if name else ():
        child = model._modules.get(part)
        if child is None:
            return None
        steps.append(Step(model, part, child))
        model = child
    return steps


class _Shim:
    """Stands in for one module's forward, from `open` to `close`, and calls what it stands in for: ``below``.

    Forwards rather than hooks: dynamo guards a forward and no hook, and a call of a module with hooks costs about 15 us more. Shims stand
    in a row; of those at an input the earlier made is the upper one and acts first, of those at an output the lower one does.
    where: None lets through what comes from below as little as what goes there.
    """

    __slots__ = ("bare", "below", "buried", "handle", "module", "where")

    def __init__(self, module: nn.Module, where: Where | None) -> None:
        self.module, self.where = module, where
        self.buried = False  # under a forward that somebody else put there since: it stays, and lets everything through
        self.handle: torch.utils.hooks.RemovableHandle | None = None

    def open(self, run: Callable[..., Any], hook: Callable[..., Any]) -> None:
        """run: a method of its own. hook: in its place where the module has hooks, since what they make of an output is the output."""
        module, above = self.module, None
        if self.where == "output" and module._forward_hooks:
            self.handle, run = module.register_forward_hook(hook), self.pass_by
        elif self.where == "input":
            for shim in _shims(module):
                if shim.where is None:
                    break
                if shim.where == "input":
                    above = shim
        if above is None:
            self.bare, self.below = "forward" not in module.__dict__, module.forward
            module.__dict__["forward"] = run
        else:
            self.bare, self.below = above.bare, above.below
            above.bare, above.below = False, run

    def close(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        attributes = self.module.__dict__
        if getattr(attributes.get("forward"), "__self__", None) is self:
            if self.bare:
                del attributes["forward"]
            else:
                attributes["forward"] = self.below
            return
        for above in _shims(self.module):
            if getattr(above.below, "__self__", None) is self:
                above.bare, above.below = self.bare, self.below
                return
        self.buried = True

    def pass_by(self, *args: Any, **kwargs: Any) -> Any:
        _in_backward()  # what dynamo cannot trace: it calls the module as it is, with its hooks of that moment
        return self.below(*args, **kwargs)


def _shims(module: nn.Module) -> Iterator[_Shim]:
    """From the uppermost down, as far as they are known."""
    run = module.__dict__.get("forward")
    while isinstance(shim := getattr(run, "__self__", None), _Shim):
        yield shim
        run = shim.below


class _Tap(_Shim):
    """Keeps in ``calls`` what one module takes or returns, while it is open; ``path`` is where it was found.

    An object rather than closures: those are new code to the interpreter each time they are made.
    """

    __slots__ = ("calls", "label", "path")

    def __init__(self, label: str, model: nn.Module, name: str, where: Where) -> None:
        self.label, self.path = label, _path(model, name)
        super().__init__(self.path[-1].child if self.path else model, where)
        self.calls: list[Any] | None = None

    def start(self, calls: list[Any]) -> None:
        self.calls = calls
        self.open(self.taken if self.where == "input" else self.returned, self.keep)

    def close(self) -> None:
        self.calls = None
        super().close()

    def returned(self, *args: Any, **kwargs: Any) -> Any:
        output = self.below(*args, **kwargs)
        if self.calls is not None and not _in_backward():
            self.calls.append(output if isinstance(output, Tensor) else copy.copy(output))
        return output

    def taken(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls is not None and not _in_backward():
            self.calls.append(_snapshot(args[0] if args else kwargs[_tensor_keyword(self.module, kwargs)]))
        return self.below(*args, **kwargs)

    def keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self.calls is not None and not _in_backward():
            self.calls.append(_snapshot(output))


class _Change(_Shim):
    """Changes what one module takes or returns, unless it is made None."""

    __slots__ = ("change",)

    def __init__(self, module: nn.Module, where: Where, change: Callable[[Any], Any]) -> None:
        super().__init__(module, where)
        self.change: Callable[[Any], Any] | None = change
        self.open(self.taken if where == "input" else self.returned, self.change_output)

    def close(self) -> None:
        self.change = None
        super().close()

    def returned(self, *args: Any, **kwargs: Any) -> Any:
        output = self.below(*args, **kwargs)
        value = None if self.change is None else self.change(output)
        return output if value is None else value

    def taken(self, *args: Any, **kwargs: Any) -> Any:
        if self.change is not None:
            keyword = "" if args else _tensor_keyword(self.module, kwargs)
            value = self.change(args[0] if args else kwargs[keyword])
            if value is not None and args:
                args = (value, *args[1:])
            elif value is not None:
                kwargs[keyword] = value
        return self.below(*args, **kwargs)

    def change_output(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return None if self.change is None else self.change(output)


class _StandIn(_Shim):
    """Runs ``forward`` in the place of a module's own, unless it is made None. No hook can skip a forward."""

    __slots__ = ("forward",)

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__(module, None)
        self.forward: Callable[..., Any] | None = forward
        self.open(self.run, self.run)

    def close(self) -> None:
        self.forward = None
        super().close()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return (self.forward or self.below)(*args, **kwargs)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: value


def _note(found: dict[str, Submodule], name: str, kind: str) -> Callable[[nn.Module, Any, Any], None]:
    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        found.setdefault(name, Submodule(name, kind, _shape(output)))

    return note


def _shape(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((shape for part in parts if (shape := _shape(part)) is not None), None)


def _snapshot(value: Any) -> Any:
    return value if isinstance(value, Tensor) else copy.copy(value)


def _tensor_keyword(module: nn.Module, kwargs: dict[str, Any]) -> str:
    keyword = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
    if keyword is None:
        raise BadInput(f"{type(module).__name__} was called without any positional argument or tensor: there is no input to tap")
    return keyword


def _in_backward() -> bool:
    """Whether autograd is running backward: a forward that happens now is a recomputation (as torch's ModuleTracker tells)."""
    return torch._C._current_graph_task_id() != -1

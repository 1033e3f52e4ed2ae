"""Taps on small modules: what is read, what is replaced, and that nothing stays behind."""

from __future__ import annotations

import copy
import itertools
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from limbeck import taps
from limbeck.errors import BadInput


class Net(nn.Module):
    """stem -> shared (twice) -> tail.last, by keyword; ``shared`` may be checkpointed."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 4)
        self.shared = nn.Linear(4, 4)
        self.tail = nn.ModuleDict({"last": nn.Linear(4, 2)})
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        for _ in range(2):
            x = (checkpoint(self.shared, x, use_reentrant=False) if self.checkpointed else self.shared(x)).tanh()
        return self.tail["last"](input=x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def hooks(model: nn.Module) -> int:
    """How many hooks and shadowed forwards a model holds."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module)) for module in model.modules()
    )


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


class TestRecord:
    def test_outputs_inputs_and_every_call(self, x: Tensor) -> None:
        net = Net()
        with taps.record(
            net, {"stem": "stem", "fed": ("shared", "input"), "shared": "shared", "end": ("tail.last", "input")}
        ) as seen:
            out = net(x)
        first = net.shared(net.stem(x).tanh())
        assert torch.equal(seen["stem"], net.stem(x))
        assert torch.equal(torch.stack(seen.calls("shared")), torch.stack([first, net.shared(first.tanh())]))
        assert torch.equal(seen["shared"], seen.calls("shared")[-1])
        assert torch.equal(seen.calls("fed")[1], first.tanh())
        assert torch.equal(net.tail["last"](seen["end"]), out)  # passed by keyword
        assert list(seen) == ["stem", "fed", "shared", "end"]

    def test_keeps_the_graph(self, x: Tensor) -> None:
        net = Net()
        with taps.record(net, {"stem": "stem"}) as seen:
            net(x)
        seen["stem"].sum().backward()
        assert net.stem.weight.grad is not None
        assert net.shared.weight.grad is None

    def test_a_submodule_that_did_not_run_says_so(self) -> None:
        with taps.record(Net(), {"mid": "shared"}) as seen:
            pass
        assert seen.calls("mid") == []
        with pytest.raises(BadInput, match="'mid' did not run"):
            seen["mid"]

    def test_later_writes_of_the_model_into_a_container_do_not_show(self) -> None:
        class Inner(nn.Module):
            def forward(self) -> dict[str, int]:
                return {"value": 1}

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Inner()

            def forward(self) -> dict[str, int]:
                result = self.inner()
                result["value"] = 2
                return result

        outer = Outer()
        with taps.record(outer, {"inner": "inner"}) as seen:
            assert outer() == {"value": 2}
        assert seen["inner"] == {"value": 1}

    def test_recomputation_is_not_a_call_and_the_gradient_is_that_of_the_plain_net(self, x: Tensor) -> None:
        results = []
        for checkpointed in (False, True):
            net = Net(checkpointed)
            seen = taps.record(net, {"shared": "shared"})
            (net(x).sum() + seen["shared"].pow(2).sum()).backward()
            seen.close()
            assert len(seen.calls("shared")) == 2
            results.append(gradients(net))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)

    def test_what_stood_on_the_module_before_is_seen_and_what_comes_later_is_not(self, x: Tensor) -> None:
        net, other = Net(), torch.randn(3, 4)
        plain = net.stem(x)
        with taps.replace(net, {"stem": other}), taps.record(net, {"stem": "stem"}) as after:
            net(x)
        with taps.record(net, {"stem": "stem"}) as before, taps.replace(net, {"stem": other}):
            net(x)
        with taps.record(net, {"stem": "stem"}) as first, taps.record(net, {"stem": "stem"}) as second:
            net(x)
        assert after["stem"] is other
        assert torch.equal(before["stem"], plain)
        assert first["stem"] is second["stem"]
        assert hooks(net) == 0

    def test_autocast_shows_what_flows(self, x: Tensor) -> None:
        net = Net()
        with torch.autocast("cpu", dtype=torch.bfloat16), taps.record(net, {"stem": "stem"}) as seen:
            net(x)
        assert seen["stem"].dtype == torch.bfloat16


class TestPlaces:
    def test_each_opening_records_anew_and_what_an_earlier_one_saw_stays(self, x: Tensor) -> None:
        net, places = Net(), taps.Places({"stem": "stem", "fed": ("shared", "input")})
        with places.open(net) as first:
            net(x)
        with places.open(net) as second:
            net(2 * x)
        assert torch.equal(first["stem"], net.stem(x))
        assert torch.equal(second["stem"], net.stem(2 * x))
        assert len(first.calls("fed")) == len(second.calls("fed")) == 2
        assert hooks(net) == 0

    def test_a_module_that_was_replaced_is_read_in_its_new_place(self, x: Tensor) -> None:
        net, places = Net(), taps.Places({"last": "tail.last"})
        for replaced in ("nothing", "the module", "the one above it", "the wrapped model"):
            if replaced == "the module":
                net.tail["last"] = nn.Linear(4, 2)
            elif replaced == "the one above it":
                net.tail = nn.ModuleDict({"last": nn.Linear(4, 2)})
            elif replaced == "the wrapped model":
                net = torch.compile(Net(), backend="eager")
            with places.open(net) as seen:
                output = net(x)
            assert torch.equal(seen["last"], output), replaced
        del net.tail["last"]
        with pytest.raises(BadInput, match=r"no submodule 'tail\.last'"):
            places.open(net)

    def test_one_after_another_on_two_models_and_one_within_another_on_one(self, x: Tensor) -> None:
        one, two, places = Net(), Net(checkpointed=True), taps.Places({"shared": "shared"})
        for net in (one, two, one):
            with places.open(net) as outer:
                net(x)
                with places.open(net) as inner:
                    net(2 * x)
            assert len(outer.calls("shared")) == 4
            assert [id(value) for value in inner.calls("shared")] == [id(value) for value in outer.calls("shared")[2:]]
            assert hooks(net) == 0

    def test_a_copy_reads_the_copied_model(self, x: Tensor) -> None:
        net, places = Net(), taps.Places({"stem": "stem"})
        with places.open(net):
            net(x)
        for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
            other, others = duplicate([net, places])
            with others.open(other) as seen, torch.no_grad():
                other.stem.weight.zero_()
                other(x)
            assert torch.equal(seen["stem"], other.stem.bias.expand(3, 4))

    def test_keeps_nothing_of_what_was_recorded(self, x: Tensor) -> None:
        net, places = Net(), taps.Places({"stem": "stem"})
        with places.open(net) as seen:
            net(x)
        recorded = weakref.ref(seen["stem"])
        del seen
        assert recorded() is None

    def test_after_an_exception_it_opens_again(self, x: Tensor) -> None:
        net, places = Net(), taps.Places({"stem": "stem"})
        with pytest.raises(RuntimeError), places.open(net):
            net(torch.zeros(3, 9))
        assert hooks(net) == 0
        with places.open(net) as seen:
            net(x)
        assert len(seen.calls("stem")) == 1

    def test_a_hook_that_came_between_two_openings_is_seen(self, x: Tensor) -> None:
        net, places, other = Net(), taps.Places({"stem": "stem"}), torch.randn(3, 4)
        with places.open(net):
            net(x)
        with taps.replace(net, {"stem": other}), places.open(net) as seen:
            net(x)
        assert seen["stem"] is other


class TestReplace:
    @pytest.mark.parametrize("name", ["stem", "tail.last"])  # called with a positional, with a keyword argument
    def test_input_by_value_and_by_callable(self, x: Tensor, name: str) -> None:
        net, other = Net(), torch.randn(3, 4)
        with taps.replace(net, {name: other}, at="input"), taps.record(net, {"out": name, "in": (name, "input")}) as seen:
            net(x)
        assert seen["in"] is other
        assert torch.equal(seen["out"], net.get_submodule(name)(other))
        with taps.replace(net, {name: lambda own: 2 * own}, at="input"), taps.record(net, {"in": (name, "input")}) as doubled:
            net(x)
        with taps.record(net, {"in": (name, "input")}) as plain:
            net(x)
        assert torch.equal(doubled["in"], 2 * plain["in"])

    def test_output_carries_gradient_to_the_value_and_not_to_what_it_replaces(self, x: Tensor) -> None:
        net, value = Net(), torch.randn(3, 4, requires_grad=True)
        with taps.replace(net, {"stem": value}):
            net(x).sum().backward()
        assert value.grad is not None
        assert net.stem.weight.grad is None

    def test_a_callable_that_returns_none_keeps_the_original(self, x: Tensor) -> None:
        net = Net()
        plain = net(x)
        for at in ("input", "output"):
            with taps.replace(net, {"stem": lambda own: None}, at=at):
                assert torch.equal(net(x), plain)

    def test_gradient_through_a_checkpointed_region_while_open(self, x: Tensor) -> None:
        """Within the region: the recomputation must see the replacement too."""

        class Block(nn.Module):
            def __init__(self, checkpointed: bool) -> None:
                super().__init__()
                self.net, self.checkpointed = Net(), checkpointed

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.net, x, use_reentrant=False) if self.checkpointed else self.net(x)

        results = []
        for checkpointed in (False, True):
            block = Block(checkpointed)
            scale = torch.tensor(3.0, requires_grad=True)
            tap = taps.replace(block, {"net.stem": lambda own, scale=scale: scale * own})
            block(x).sum().backward()
            tap.close()
            results.append([scale.grad, *gradients(block)])
            assert hooks(block) == 0
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


class TestBypass:
    def test_the_forward_does_not_run(self, x: Tensor) -> None:
        net, value = Net(), torch.randn(3, 4)

        def boom(*_: object) -> None:
            raise AssertionError("ran")

        net.stem.forward = boom
        with taps.bypass(net, {"stem": value}), taps.record(net, {"stem": "stem"}) as seen:
            net(x)
        assert seen["stem"] is value
        assert net.stem.forward is boom  # a forward that stood there before is put back

    def test_a_callable_gets_the_arguments(self, x: Tensor) -> None:
        net = Net()
        with taps.bypass(net, {"tail.last": lambda input: input}), taps.record(net, {"in": ("tail.last", "input")}) as seen:
            assert torch.equal(net(x), seen["in"])


class TestHygiene:
    @pytest.mark.parametrize("open_tap", [taps.replace, taps.bypass])
    def test_nothing_stays_on_exit_or_exception(self, open_tap, x: Tensor) -> None:
        net = Net()
        plain = net(x)
        with open_tap(net, {"stem": torch.zeros(3, 4)}), taps.record(net, {"a": "stem", "b": ("shared", "input")}):
            assert not torch.equal(net(x), plain)
        assert hooks(net) == 0
        with pytest.raises(RuntimeError), open_tap(net, {"stem": torch.zeros(3, 9)}), taps.record(net, {"a": "stem"}):
            net(x)
        assert hooks(net) == 0
        assert torch.equal(net(x), plain)

    @pytest.mark.parametrize("open_tap", [taps.record, taps.replace, taps.bypass])
    def test_an_unknown_name_names_the_nearest_and_hooks_nothing(self, open_tap) -> None:
        net = Net()
        with pytest.raises(BadInput, match=r"Net has no submodule 'sharde'; nearest: shared"):
            open_tap(net, {"stem": "stem", "sharde": "sharde"})
        with pytest.raises(BadInput, match=r"nearest: stem, shared, tail"):
            open_tap(net, {"zzz": "zzz"})
        assert hooks(net) == 0

    @pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
    @pytest.mark.parametrize("hooked", [False, True])
    def test_taps_on_one_module_are_closed_in_any_order(self, order, hooked: bool, x: Tensor) -> None:
        """Of those that are open each acts, and as if the others had never been."""
        net, one, two = Net(), torch.full((3, 4), 1.0), torch.full((3, 4), 2.0)
        if hooked:
            net.stem.register_forward_hook(lambda _module, _args, output: output + 1)
        before, plain = hooks(net), net.stem(x)
        seen: list[Tensor] = []
        makers = [
            lambda: taps.bypass(net, {"stem": one}),
            lambda: taps.record(net, {"stem": "stem"}),
            lambda: taps.replace(net, {"stem": lambda own: seen.append(own) or own}),
            lambda: taps.bypass(net, {"stem": two}),
        ]
        opened = {number: make() for number, make in enumerate(makers)}
        for number in order:
            opened.pop(number).close()
            uppermost = two if 3 in opened else one if 0 in opened else None
            expected = plain if uppermost is None else uppermost + hooked
            torch.testing.assert_close(net.stem(x), expected)
        assert hooks(net) == before

    def test_inputs_replaced_one_after_another_are_restored_in_any_order(self, x: Tensor) -> None:
        for order in itertools.permutations(range(3)):
            net, factors = Net(), {0: 2, 1: 3, 2: 5}
            opened = {
                number: taps.replace(net, {"stem": lambda own, factor=factor, number=number: own * factor + number}, at="input")
                for number, factor in factors.items()
            }
            for number in order:
                opened.pop(number).close()
                expected = x
                for left in opened:
                    expected = expected * factors[left] + left
                assert torch.equal(net.stem(x), nn.functional.linear(expected, net.stem.weight, net.stem.bias))
            assert hooks(net) == 0

    def test_under_a_forward_that_somebody_put_there_since_taps_let_everything_through(self, x: Tensor) -> None:
        net, places = Net(), taps.Places({"stem": "stem"})
        plain = net.stem(x)
        opened = [
            taps.bypass(net, {"stem": x}),
            places.open(net),
            taps.replace(net, {"stem": 0 * x}),
            taps.replace(net, {"stem": 0 * x}, at="input"),
        ]
        inner = net.stem.forward
        net.stem.forward = lambda value: 2 * inner(value)
        for tap in opened:
            tap.close()
        assert torch.equal(net.stem(x), 2 * plain)
        with places.open(net) as seen:
            net.stem(x)
        assert torch.equal(seen["stem"], 2 * plain)
        assert len(seen.calls("stem")) == 1

    def test_ddp_with_and_without_the_leading_module(self, x: Tensor, tmp_path) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            net = Net()
            plain = net(x)
            parallel = nn.parallel.DistributedDataParallel(net)
            with taps.record(parallel, {"short": "stem", "long": "module.stem"}) as seen:
                parallel(x).sum().backward()
            assert torch.equal(seen["short"], net.stem(x))
            assert torch.equal(seen["long"], seen["short"])
            for name in ("stem", "module.stem"):
                with taps.replace(parallel, {name: net.stem(x) + 1}):
                    assert not torch.equal(parallel(x), plain)
            with pytest.raises(BadInput, match=r"Net has no submodule .module\.stemm.; nearest: stem"):
                taps.record(parallel, {"a": "module.stemm"})
        finally:
            torch.distributed.destroy_process_group()

    def test_a_compile_wrapper_is_looked_through(self, x: Tensor) -> None:
        net = Net()
        compiled = torch.compile(net, backend="eager")
        with taps.record(compiled, {"stem": "stem"}) as seen:
            compiled(x)
        torch.testing.assert_close(seen["stem"], net.stem(x))


@pytest.fixture
def compiled(x: Tensor) -> nn.Module:
    """A net that dynamo has seen untapped, and guards no hook of."""
    torch._dynamo.reset()
    net = torch.compile(Net(), backend="eager")
    net(x)
    return net


class TestCompiled:
    @pytest.mark.parametrize("hooked", [False, True])
    @pytest.mark.parametrize("at", ["input", "output"])
    def test_replacements_act_and_end(self, compiled: nn.Module, x: Tensor, at: str, hooked: bool) -> None:
        net = compiled._orig_mod
        if hooked:
            net.stem.register_forward_hook(lambda _module, _args, output: 2 * output)
            torch._dynamo.reset()
        plain = compiled(x)
        for seed in (2, 3, 4):
            value = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
            with taps.replace(net, {"stem": value}, at=at):
                expected = net(x)
                torch.testing.assert_close(compiled(x), expected)
            assert not torch.equal(expected, plain)
            torch.testing.assert_close(compiled(x), plain)

    @pytest.mark.parametrize("hooked", [False, True])
    @pytest.mark.parametrize("labels", [("in",), ("out", "again"), ("in", "out", "again")])
    def test_inputs_and_outputs_are_recorded(self, compiled: nn.Module, x: Tensor, labels: tuple[str], hooked: bool) -> None:
        net = compiled._orig_mod
        if hooked:
            net.stem.register_forward_hook(lambda _module, _args, output: 2 * output)
            torch._dynamo.reset()
            compiled(x)
        for factor in (1, 2, 3):
            with taps.record(compiled, {label: ("stem", "input" if label == "in" else "output") for label in labels}) as seen:
                compiled(factor * x)
            for label in labels:
                [value] = seen.calls(label)
                torch.testing.assert_close(value, factor * x if label == "in" else net.stem(factor * x))
            compiled(x)


def test_describe_lists_what_runs_and_moves_nothing(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.LSTM(6, 5, batch_first=True))
    net.add_module("idle", nn.Identity())
    net.forward = lambda value: net[2](net[1](net[0](value))[:, None])
    before = net[1].running_mean.clone()
    lines = taps.describe(net, lambda: net(x))
    assert lines == [("0", "Linear", (3, 6)), ("1", "BatchNorm1d", (3, 6)), ("2", "LSTM", (3, 1, 5))]
    assert torch.equal(net[1].running_mean, before)
    assert net.training
    assert net[1].training
    assert sum(len(module._forward_hooks) for module in net.modules()) == 0

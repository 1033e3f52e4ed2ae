"""Terms over logits that never exist whole, against the plain losses on whole logits in float64: values and every gradient."""

import weakref
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import bild, cross_entropy, dbild, kl_divergence, linear
from limbeck.losses.linear import Head, LinearLogits
from limbeck.losses.top_k import TopK, top_k, top_k_divergence

TERMS = ["ce", "forward", "reverse", "jeffreys", "jsd", "top-k", "bild", "dbild"]

heads = st.fixed_dictionaries({
    "vocabulary": st.tuples(st.integers(6, 40), st.integers(6, 40)),
    "widths": st.tuples(st.integers(1, 6), st.integers(1, 6)),
    "bias": st.booleans(),
    "scale": st.sampled_from([1.0, 0.3]),
    "softcap": st.sampled_from([None, 2.0]),
})  # fmt: skip
positions = st.one_of(st.sampled_from([0, 1]), st.integers(2, 9))


def whole(logits: LinearLogits) -> torch.Tensor:
    head = logits.head
    z = torch.nn.functional.linear(logits.hidden, head.weight, head.bias) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def draw(count, vocabulary=(12, 12), widths=(4, 3), bias=True, scale=1.0, softcap=None, seed=0, dtype=torch.float64):
    """The logits of a student that learns and of a teacher, and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for size, width, learns in zip(vocabulary, widths, (True, False), strict=True):
        hidden, weight, shift = (
            2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((count, width), (size, width), (size,))
        )
        hidden, weight, shift = (tensor.to(dtype).requires_grad_(learns) for tensor in (hidden, weight, shift))
        sides.append(LinearLogits(hidden, Head(weight, shift if bias else None, scale, softcap)))
    labels = torch.randint(0, vocabulary[0], (count,), generator=generator)
    labels[torch.rand(count, generator=generator) < 0.2] = -100
    return *sides, labels


def both(name, student, teacher, labels, temperature=2.0):
    """A term, and the plain loss over the ids that both heads have."""
    shared = min(student.shape[-1], teacher.shape[-1])
    z_s, z_t = whole(student), whole(teacher).detach()
    if name == "ce":
        return linear.CrossEntropy(student, labels), cross_entropy(z_s, labels)
    z_s, z_t = z_s[..., :shared], z_t[..., :shared]
    if name == "top-k":
        known = top_k(z_t, 4, temperature=temperature)
        return linear.TopKDivergence(student, known), top_k_divergence(z_s, known)
    if name == "bild":
        return linear.BiLD(student, teacher, k=4), bild(z_s, z_t, k=4)
    if name == "dbild":
        return linear.DBiLD(student, teacher, window=5), dbild(z_s, z_t, window=5)
    options = {"kind": name, "temperature": temperature, "beta": 0.3}
    return linear.Divergence(student, teacher, **options), kl_divergence(z_s, z_t, **options)


def learning(*sides):
    found = []
    for side in sides:
        found += [t for t in (side.hidden, side.head.weight, side.head.bias) if t is not None and t.requires_grad]
    return list({id(tensor): tensor for tensor in found}.values())


def agree(ours, plain, parameters, rtol=1e-7, atol=1e-9):
    torch.testing.assert_close(ours, plain, rtol=rtol, atol=atol)
    for one, other in zip(
        torch.autograd.grad(ours, parameters, retain_graph=True),
        torch.autograd.grad(plain, parameters, retain_graph=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", TERMS)
@settings(max_examples=25, deadline=None)
@given(count=positions, head=heads, rows=st.integers(1, 4), few=st.sampled_from([0, 8]), seed=st.integers(0, 99))
def test_a_term_is_the_plain_loss_in_value_and_in_every_gradient(name, count, head, rows, few, seed):
    student, teacher, labels = draw(count, seed=seed, **head)
    term, plain = both(name, student, teacher, labels)
    with mock.patch.object(linear, "DENSE_BELOW", few):
        ours = linear.losses({"term": term}, weights={"term": 0.7}, chunk_bytes=rows * 8 * max(head["vocabulary"]))["term"]
    agree(ours, 0.7 * plain, learning(student))


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.sampled_from(TERMS), min_size=2, max_size=3, unique=True),
    factors=st.sampled_from([(1.0, 1.0, 1.0), (1.0, 2.0, 3.0), (0.0, 1.0, -1.0)]),
    count=positions,
    head=heads,
    seed=st.integers(0, 99),
)
def test_terms_in_one_pass_are_the_terms_one_by_one_whatever_is_made_of_them_afterwards(names, factors, count, head, seed):
    student, teacher, labels = draw(count, seed=seed, **head)
    pairs = {name: both(name, student, teacher, labels) for name in names}
    weights = {names[0]: 0.5}
    ours = linear.losses({name: term for name, (term, _) in pairs.items()}, weights=weights)
    plain = {name: weights.get(name, 1.0) * value for name, (_, value) in pairs.items()}
    parameters = learning(student)
    one, other = (sum(factor * terms[name] for factor, name in zip(factors, names, strict=False)) for terms in (ours, plain))
    agree(one, other, parameters)
    agree(ours[names[-1]], plain[names[-1]], parameters)  # one term alone, and the same graph a second time


@pytest.mark.parametrize("name", TERMS)
def test_a_mask_leaves_positions_out_and_their_gradient_at_zero(name):
    student, teacher, labels = draw(6)
    shaped = [LinearLogits(side.hidden.view(2, 3, -1), side.head) for side in (student, teacher)]
    mask = torch.tensor([[True, False, True], [False, False, True]])
    with torch.no_grad():
        student.hidden[1] = torch.nan  # where nobody looks
    kept = [LinearLogits(side.hidden[mask.flatten()], side.head) for side in (student, teacher)]
    if name == "top-k":
        known = top_k(whole(shaped[1]), 4)
        term = linear.TopKDivergence(shaped[0], known)
        plain = top_k_divergence(whole(kept[0]), TopK(known.ids[mask], known.log_probs[mask], known.log_rest[mask], 1.0, 12))
    else:
        term = both(name, *shaped, labels.view(2, 3))[0] if name != "ce" else linear.CrossEntropy(shaped[0], labels.view(2, 3))
        plain = both(name, *kept, labels[mask.flatten()])[1]
    ours = linear.losses({"term": term}, mask=mask)["term"]
    agree(ours, plain, [student.hidden, student.head.weight])
    [gradient] = torch.autograd.grad(ours, student.hidden)
    assert (gradient[~mask.flatten()] == 0).all()
    nothing = linear.losses({"term": term}, mask=torch.zeros_like(mask))["term"]
    assert nothing == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(nothing, [student.hidden, student.head.weight]))


@pytest.mark.parametrize("name", TERMS)
def test_a_sum_is_the_mean_times_what_counts(name):
    student, teacher, labels = draw(6)
    term = both(name, student, teacher, labels)[0]
    counted = (labels != -100).sum() if name == "ce" else 6
    total = linear.losses({"term": term}, reduction="sum")["term"]
    torch.testing.assert_close(total, linear.losses({"term": term})["term"] * counted)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Which shapes are made, and how many matrix products run."""

    def __init__(self):
        super().__init__()
        self.made, self.products = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.made.append(tuple(result.shape))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return result


@pytest.mark.parametrize("name", TERMS)
def test_a_frozen_head_gets_no_gradient_and_none_is_computed(name, monkeypatch):
    monkeypatch.setattr(linear, "DENSE_BELOW", 0)
    student, teacher, labels = draw(8)
    frozen = LinearLogits(student.hidden, Head(student.head.weight.detach(), student.head.bias.detach()))
    term, plain = both(name, frozen, teacher, labels)
    with Watch() as watch:
        linear.losses({"term": term})["term"].backward()
    torch.testing.assert_close(student.hidden.grad, torch.autograd.grad(plain, student.hidden)[0])
    reads = len(term.sides)
    assert watch.products == reads + (0 if isinstance(term, linear.SparseTerm) else 1)
    assert tuple(student.head.weight.shape) not in watch.made


@pytest.mark.parametrize("name", ["ce", "forward", "dbild"])
def test_the_logits_of_all_positions_never_exist(name):
    student, teacher, labels = draw(64, vocabulary=(500, 500))
    terms = {
        "ce": linear.CrossEntropy(student, labels),
        "forward": linear.Divergence(student, teacher),
        "dbild": linear.DBiLD(student, teacher, window=5),
    }
    with Watch() as watch:
        linear.losses({"term": terms[name]}, chunk_bytes=4 * 500 * 8)["term"].backward()
    largest = max(shape[0] for shape in watch.made if len(shape) == 2 and shape[-1] == 500)
    assert largest <= 4


def test_nothing_is_kept_for_backward_where_nothing_learns():
    student, teacher, labels = draw(5)
    with torch.no_grad():
        value = linear.losses({"ce": linear.CrossEntropy(student, labels)})["ce"]
    assert not value.requires_grad
    torch.testing.assert_close(value, cross_entropy(whole(student), labels))
    assert not linear.losses({"kd": linear.Divergence(teacher, teacher)})["kd"].requires_grad


def test_a_weight_that_is_used_twice_gets_both_gradients():
    """Tied to the embedding, and as the head of two routes in one pass."""
    student, teacher, labels = draw(4, widths=(4, 4))
    weight, hidden = student.head.weight, student.hidden
    embedded = torch.nn.functional.embedding(torch.tensor([0, 3, 3, 5]), weight)
    other = LinearLogits(hidden * 2, student.head)
    tied = LinearLogits(embedded + hidden, student.head)
    terms = {"ce": linear.CrossEntropy(tied, labels), "kd": linear.Divergence(other, teacher), "d": linear.DBiLD(tied, teacher)}
    plain = cross_entropy(whole(tied), labels) + kl_divergence(whole(other), whole(teacher)) + dbild(whole(tied), whole(teacher))
    agree(sum(linear.losses(terms).values()), plain, [weight, hidden])


@pytest.mark.parametrize("kind", ["forward", "reverse", "jeffreys", "jsd"])
def test_ids_that_only_one_head_has_are_left_out_and_not_taken_for_logits_of_zero(kind):
    """A head that is padded, like another in all else, is at distance 0; with zeros for the padding it would not be."""
    student, _, _ = draw(5, bias=False)
    padded = Head(torch.cat([student.head.weight.detach(), torch.randn(64, 4, dtype=torch.float64)]))
    teacher = LinearLogits(student.hidden.detach(), padded)
    value = linear.losses({"kd": linear.Divergence(student, teacher, kind=kind)})["kd"]
    assert value.abs() < 1e-12
    for gradient in torch.autograd.grad(value, [student.hidden, student.head.weight]):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["forward", "reverse", "jeffreys", "jsd"])
def test_an_id_at_minus_infinity_on_both_sides_counts_for_nothing(kind):
    student, teacher, labels = draw(5)
    closed = torch.tensor([2, 7])
    for side in (student, teacher):
        with torch.no_grad():
            side.head.bias[closed] = -torch.inf
    labels[:] = 0
    terms = {"ce": linear.CrossEntropy(student, labels), "kd": linear.Divergence(student, teacher, kind=kind, temperature=0.01)}
    ours = linear.losses(terms)
    left = torch.tensor([i for i in range(12) if i not in closed])
    z_s, z_t = whole(student)[:, left], whole(teacher)[:, left]
    torch.testing.assert_close(ours["ce"], cross_entropy(z_s, labels))
    torch.testing.assert_close(ours["kd"], kl_divergence(z_s, z_t, kind=kind, temperature=0.01))
    gradient = torch.autograd.grad(sum(ours.values()), student.head.weight)[0]
    assert (gradient[closed] == 0).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["bild", "dbild"])
def test_differences_pass_over_an_id_at_minus_infinity(name):
    student, teacher, labels = draw(5)
    with torch.no_grad():
        student.head.bias[3:] = -torch.inf  # fewer are left than are chosen
    term, plain = both(name, student, teacher, labels)
    agree(linear.losses({"term": term})["term"], plain, [student.hidden, student.head.weight])


@pytest.mark.parametrize("name", TERMS)
def test_values_are_known_in_inference_mode(name):
    student, teacher, labels = draw(5)
    term, plain = both(name, student, teacher, labels)
    with torch.inference_mode():
        torch.testing.assert_close(linear.losses({"term": term})["term"], plain.detach())


@pytest.mark.parametrize("name", TERMS)
def test_logits_of_a_head_that_is_not_linear_go_through_as_they_are(name):
    student, teacher, labels = draw(7)
    logits = whole(student).detach().requires_grad_()
    term = _on(name, logits, whole(teacher).detach(), labels)
    agree(linear.losses({"term": term}, chunk_bytes=1)["term"], _plain(name, logits, whole(teacher).detach(), labels), [logits])


def _on(name, student, teacher, labels):
    if name == "ce":
        return linear.CrossEntropy(student, labels)
    if name == "top-k":
        return linear.TopKDivergence(student, top_k(teacher, 4))
    if name in ("bild", "dbild"):
        return linear.BiLD(student, teacher, k=4) if name == "bild" else linear.DBiLD(student, teacher, window=5)
    return linear.Divergence(student, teacher, kind=name)


def _plain(name, student, teacher, labels):
    if name == "ce":
        return cross_entropy(student, labels)
    if name == "top-k":
        return top_k_divergence(student, top_k(teacher, 4))
    if name in ("bild", "dbild"):
        return bild(student, teacher, k=4) if name == "bild" else dbild(student, teacher, window=5)
    return kl_divergence(student, teacher, kind=name)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(name, dtype):
    """2,048 positions, each of whose gradients would vanish in a half-precision sum. Against the same numbers in float64."""
    student, teacher, labels = draw(2048, vocabulary=(40, 40), widths=(16, 16), bias=False, dtype=dtype)
    exact = []
    for side in (student, teacher):
        hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (side.hidden, side.head.weight))
        exact.append(LinearLogits(hidden, Head(weight)))
    ours = linear.losses({"term": both(name, student, teacher, labels)[0]}, reduction="sum")["term"]
    plain = both(name, *exact, labels)[1] * ((labels != -100).sum() if name == "ce" else len(labels))
    assert ours.dtype == torch.float32
    if name in ("bild", "dbild"):  # rounding of the logits may choose other ids
        assert abs(ours / plain - 1) < 0.03
        return
    torch.testing.assert_close(ours.double(), plain, rtol=1e-2, atol=0)
    ours.backward()
    expected = torch.autograd.grad(plain, [exact[0].hidden, exact[0].head.weight])
    for gradient, reference in zip((student.hidden.grad, student.head.weight.grad), expected, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("name", ["bild", "dbild"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_picking_a_few_ids_gives_the_gradients_of_products_with_all_of_them(name, dtype, monkeypatch):
    found = []
    for few in (0, 8):
        monkeypatch.setattr(linear, "DENSE_BELOW", few)
        student, teacher, labels = draw(64, vocabulary=(40, 40), widths=(16, 16), dtype=dtype)
        linear.losses({"term": both(name, student, teacher, labels)[0]}, reduction="sum")["term"].backward()
        found.append([tensor.grad for tensor in learning(student)])
    for picked, multiplied in zip(*found, strict=True):
        assert picked.dtype == dtype
        assert (picked - multiplied).float().norm() < (1e-2 if dtype != torch.float32 else 1e-5) * multiplied.float().norm()


def test_under_autocast_products_are_in_its_dtype_and_gradients_in_the_weights():
    student, teacher, labels = draw(32, widths=(16, 16), dtype=torch.float32)
    terms = {"ce": linear.CrossEntropy(student, labels), "kd": linear.Divergence(student, teacher)}
    exact = sum(linear.losses(terms).values())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sum(linear.losses(terms).values())
        plain = cross_entropy(whole(student), labels) + kl_divergence(whole(student), whole(teacher))
    assert rounded != exact
    torch.testing.assert_close(rounded, plain, rtol=1e-2, atol=0)
    rounded.backward()
    assert student.head.weight.grad.dtype == torch.float32
    expected = torch.autograd.grad(exact, student.head.weight)[0]
    assert (student.head.weight.grad - expected).norm() < 0.05 * expected.norm()


def near(dtype, count=1024):
    """A student and a teacher not far from it, over 4,000 ids: the averaged gradients are below what float16 holds. Half the labels are
    ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(count, 16, generator=generator), 0.3 * torch.randn(4000, 16, generator=generator)
    other = hidden + 0.1 * torch.randn(count, 16, generator=generator)
    labels = torch.randint(0, 4000, (count,), generator=generator)
    labels[::2] = -100
    student = LinearLogits(hidden.to(dtype).requires_grad_(), Head(weight.to(dtype).requires_grad_()))
    return student, LinearLogits(other.to(dtype), Head(weight.to(dtype))), labels


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("name", "few"), [("ce", 8), ("forward", 8), ("jeffreys", 8), ("dbild", 8), ("dbild", 1000)])
def test_the_gradient_of_a_mean_does_not_vanish_in_float16(name, few, autocast, monkeypatch):
    """Against that of a sum, divided; a scaler's factor is there in backward alone."""
    monkeypatch.setattr(linear, "DENSE_BELOW", few)
    student, teacher, labels = near(torch.float32 if autocast else torch.float16)
    term, found = _on(name, student, teacher, labels), {}
    for reduction, scale in (("mean", 2.0**16), ("sum", 1.0)):
        with torch.autocast("cpu", torch.float16) if autocast else nullcontext():
            value = linear.losses({"term": term}, weights={"term": 0.5}, reduction=reduction)["term"]
        found[reduction] = [gradient.double() / scale for gradient in torch.autograd.grad(value * scale, learning(student))]
    for mean, total in zip(found["mean"], found["sum"], strict=True):
        expected = total / (512 if name == "ce" else 1024)
        assert (mean - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("weight", [1.0, 1e4])
def test_gradients_in_float16_are_finite_whatever_terms_are_weighed_by_and_scaled(weight):
    """Also where the terms are weighed again outside, and a scaler's factor enters the second pass."""
    student, teacher, labels = near(torch.float32, 512)
    labels[1:] = -100
    terms = {"ce": linear.CrossEntropy(student, labels), "kd": linear.Divergence(student, teacher, temperature=4.0)}
    found = []
    for half in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=half):
            values = linear.losses(terms, weights=dict.fromkeys(terms, weight))
        for total in (sum(values.values()), values["ce"] + 0.5 * values["kd"]):
            found.append(torch.autograd.grad(total * 2.0**16, learning(student), retain_graph=True))
    for exact, rounded in zip(found[:2], found[2:], strict=True):
        for one, other in zip(exact, rounded, strict=True):
            assert (one - other).norm() < 0.02 * one.norm()


def test_under_autocast_logits_that_enter_no_product_are_read_as_they_are():
    student, teacher, labels = draw(32, dtype=torch.float32)
    for name in ("ce", "forward", "dbild"):
        logits, others = whole(student).detach().requires_grad_(), whole(teacher).detach()
        exact = linear.losses({"term": _on(name, logits, others, labels)})["term"]
        with torch.autocast("cpu", torch.bfloat16):
            value = linear.losses({"term": _on(name, logits, others, labels)})["term"]
        assert torch.equal(value, exact)
        assert torch.equal(torch.autograd.grad(value, logits)[0], torch.autograd.grad(exact, logits)[0])


@pytest.mark.parametrize("name", ["forward", "dbild"])
def test_a_teacher_that_would_learn_gets_no_gradient(name):
    student, teacher, labels = draw(8, vocabulary=(12, 15))
    weight = teacher.head.weight.clone().requires_grad_()
    hidden = teacher.hidden.clone().requires_grad_() * 1
    arrived = []
    hidden.register_hook(arrived.append)
    term = _on(name, student, LinearLogits(hidden, Head(weight)), labels)
    linear.losses({"term": term})["term"].backward()
    assert student.head.weight.grad is not None
    assert weight.grad is None
    assert arrived == []
    frozen = LinearLogits(student.hidden.detach(), Head(student.head.weight.detach()))
    assert not linear.losses({"term": _on(name, frozen, LinearLogits(hidden, Head(weight)), labels)})["term"].requires_grad


@pytest.mark.parametrize("of_head", [True, False])
def test_a_loss_that_is_kept_keeps_nothing_alive_after_backward(of_head):
    student, teacher, labels = draw(8)
    given = student.hidden * 1 if of_head else whole(student)
    side = LinearLogits(given, student.head) if of_head else given
    values = linear.losses({"ce": linear.CrossEntropy(side, labels), "kd": linear.Divergence(side, teacher)})
    seen = [weakref.ref(tensor) for tensor in (given, teacher.hidden, labels)]
    values["ce"].backward(retain_graph=True)
    sum(values.values()).backward()
    del student, teacher, labels, given, side
    assert [tensor() for tensor in seen] == [None] * 3
    assert values["ce"].requires_grad


@pytest.mark.parametrize("name", [name for name in TERMS if name != "top-k"])
def test_a_single_position_needs_no_dimension_of_its_own(name):
    student, teacher, _ = draw(1)
    label = torch.tensor(3)
    flat = [LinearLogits(side.hidden[0], side.head) for side in (student, teacher)]
    plain = _plain(name, whole(student)[0], whole(teacher)[0], label)
    agree(linear.losses({"term": _on(name, *flat, label)})["term"], plain, learning(student))
    mask = torch.tensor(False)
    assert linear.losses({"term": _on(name, *flat, label)}, mask=mask)["term"] == 0


def test_what_does_not_fit_is_named():
    student, teacher, labels = draw(4)
    with pytest.raises(ValueError, match=r"hidden states \[4, 3\] do not fit a head of weight \[12, 4\]"):
        LinearLogits(teacher.hidden, student.head)
    with pytest.raises(ValueError, match=r"labels \[3\]"):
        linear.CrossEntropy(student, labels[:3])
    with pytest.raises(ValueError, match="differ in positions"):
        linear.Divergence(student, LinearLogits(teacher.hidden[:3], teacher.head))
    with pytest.raises(ValueError, match="vocabulary is 13; expected 1 to 12"):
        linear.DBiLD(student, teacher, vocabulary=13)
    with pytest.raises(ValueError, match="temperature is 0"):
        linear.Divergence(student, teacher, temperature=0)
    with pytest.raises(ValueError, match="k is 13"):
        linear.BiLD(student, teacher, k=13)
    with pytest.raises(ValueError, match="teacher chose among 12 ids, the student has 5"):
        linear.TopKDivergence(draw(4, vocabulary=(5, 5))[0], top_k(whole(teacher), 3))
    with pytest.raises(ValueError, match="terms is empty"):
        linear.losses({})
    with pytest.raises(ValueError, match="different positions"):
        linear.losses({"a": linear.CrossEntropy(student, labels), "b": linear.CrossEntropy(draw(3)[0], labels[:3])})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([0, 1, 1, 0]), "mask is torch.int64; expected torch.bool"),
        (torch.ones(3, dtype=torch.bool), r"mask \[3\] does not match the positions \[4\]"),
    ],
)
def test_a_mask_of_indices_or_of_another_length_is_refused(mask, message):
    student, _, labels = draw(4)
    with pytest.raises(ValueError, match=message):
        linear.losses({"ce": linear.CrossEntropy(student, labels)}, mask=mask)

"""DBiLD and BiLD against the obvious loop over positions and pairs, and the facts of Switch-KD's objective."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import bild, dbild, kneedle

modes = st.fixed_dictionaries({
    "tau": st.sampled_from([0.5, 3.0]),
    "window": st.sampled_from([None, 6, 9]),
    "k_max": st.sampled_from([None, 5]),
    "divergence": st.sampled_from(["reverse", "forward"]),
    "pairs": st.sampled_from(["flat", "rows"]),
    "tau_squared": st.booleans(),
    "knee_on": st.sampled_from(["logits", "probabilities"]),
    "branches": st.sampled_from([("teacher", "student"), ("teacher",), ("student",)]),
})  # fmt: skip


def draw(*shape, seed=0, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)


def knee_loop(ranked, k_min, k_max, on):
    """Kneedle on one position's logits, largest first: steps a to c of the method, in Python floats."""
    y = [value for value in ranked.tolist() if value != -math.inf]
    if on == "probabilities":
        y = [math.exp(value - y[0]) for value in y]
    if y[0] == y[-1]:
        return k_min
    n = len(y)
    gaps = [(1 - i / (n - 1)) - (y[i] - y[-1]) / (y[0] - y[-1]) for i in range(n)]
    return min(max(gaps.index(max(gaps)) + 1, k_min), k_max)


def dbild_loop(
    student, teacher, *, tau=3.0, window=100, k_min=3, k_max=None, divergence="reverse", pairs="flat", tau_squared=False,
    knee_on="logits", branches=("teacher", "student"),
):  # fmt: skip
    """Every position, every branch, every pair."""
    vocabulary = student.shape[-1]
    window = min(window or vocabulary, vocabulary)
    k_max = min(k_max or window, window)
    losses = []
    for s, t in zip(student.reshape(-1, vocabulary), teacher.reshape(-1, vocabulary), strict=True):
        total = s.new_zeros(())
        for branch in branches:
            order = (t if branch == "teacher" else s.detach()).argsort(descending=True)
            lead = (t if branch == "teacher" else s.detach())[order[:window]]
            ids = order[: knee_loop(lead, k_min, k_max, knee_on)]
            ids = ids[torch.isfinite(s[ids]) & torch.isfinite(t[ids])]
            if pairs == "flat":
                i, j = torch.triu_indices(len(ids), len(ids), 1)
                log_s, log_t = (((z[ids][i] - z[ids][j]) / tau).log_softmax(0) for z in (s, t))
            else:
                log_s, log_t = (((z[ids][:, None] - z[ids][None]) / tau).log_softmax(1) for z in (s, t))
            p, q = (log_t, log_s) if divergence == "forward" else (log_s, log_t)
            kl = (p.exp() * (p - q)).sum()
            total = total + (kl if pairs == "flat" else kl / len(ids))
        losses.append(total)
    return torch.stack(losses) * (tau**2 if tau_squared else 1)


@settings(deadline=None, max_examples=60)
@given(modes, st.integers(0, 10_000), st.booleans())
def test_values_and_gradients_are_those_of_a_loop_over_pairs(mode, seed, padded):
    student, teacher = draw(4, 12, seed=seed)
    if padded:
        student[:, [2, 7]] = teacher[:, [2, 7]] = -torch.inf
    student.requires_grad_()
    value, expected = dbild(student, teacher, reduction="none", **mode), dbild_loop(student, teacher, **mode)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pairs", ["flat", "rows"])
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_gradcheck(pairs, divergence):
    student, teacher = draw(3, 9)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dbild(s, teacher, pairs=pairs, divergence=divergence), student)
    assert torch.autograd.gradcheck(lambda s: bild(s, teacher, k=5, pairs=pairs, divergence=divergence), student)


@settings(deadline=None, max_examples=60)
@given(modes, st.integers(0, 10_000))
def test_never_negative_and_zero_with_zero_gradient_at_the_teacher(mode, seed):
    student, teacher = draw(4, 12, seed=seed, dtype=torch.float32)
    assert (dbild(student, teacher, reduction="none", **mode) >= 0).all()
    same = teacher.clone().requires_grad_()
    loss = dbild(same, teacher, **mode)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(same.grad, torch.zeros_like(same), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(modes, st.integers(0, 10_000))
def test_shifts_and_a_common_permutation_change_nothing(mode, seed):
    student, teacher = draw(4, 12, seed=seed)
    loss = dbild(student, teacher, **mode)
    shift = draw(4, 1, seed=seed + 1)
    torch.testing.assert_close(dbild(student + shift[0], teacher + shift[1], **mode), loss)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(dbild(student[:, order], teacher[:, order], **mode), loss)


def test_swapping_the_models_swaps_the_branches_but_not_the_average():
    a, b = draw(6, 12)
    assert not torch.allclose(dbild(a, b), dbild(b, a))
    swapped = dbild(b, a, divergence="forward")  # KL(a || b) either way, on the same two index sets
    torch.testing.assert_close(dbild(a, b), swapped)


def test_rows_are_a_plain_kl_of_negated_logits():
    student, teacher = draw(5, 7)
    ours = bild(student, teacher, k=7, tau=2.0, pairs="rows")
    log_s, log_t = (-student / 2).log_softmax(-1), (-teacher / 2).log_softmax(-1)
    torch.testing.assert_close(ours, 2 * (log_t.exp() * (log_t - log_s)).sum(-1).mean())


# -- gradient: who gets it ----------------------------------------------------------------------------------------------------


def test_only_the_student_gets_gradient_and_only_at_the_chosen_ids():
    student, teacher = draw(1, 30).unbind()
    student.requires_grad_()
    teacher.requires_grad_()
    bild(student, teacher, k=4).backward()
    assert teacher.grad is None
    chosen = set(teacher.detach().topk(4).indices.flatten().tolist()) | set(student.detach().topk(4).indices.flatten().tolist())
    assert set(student.grad.nonzero()[:, 1].tolist()) == chosen


def test_two_logits_are_one_certain_pair():
    student, teacher = draw(5, 9, dtype=torch.float32)
    student.requires_grad_()
    for loss in (bild(student, teacher, k=2), dbild(student, teacher, k_min=2, k_max=2)):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, student)
        assert not gradient.any()


# -- positions ----------------------------------------------------------------------------------------------------------------


def test_masked_positions_contribute_nothing_whatever_they_hold():
    student, teacher = draw(2, 3, 12)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = dbild(student[mask], teacher[mask])
    student[~mask], teacher[~mask] = torch.nan, torch.inf
    student.requires_grad_()
    loss = dbild(student, teacher, mask=mask)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert torch.isfinite(student.grad).all()
    assert not student.grad[~mask].any()
    by_position = dbild(student, teacher, mask=mask, reduction="none")
    assert by_position.shape == mask.shape
    assert not by_position[~mask].any()
    torch.testing.assert_close(by_position.sum(), dbild(student, teacher, mask=mask, reduction="sum"))


@pytest.mark.parametrize("loss", [dbild, bild])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_position_at_all_is_zero_on_the_graph(loss, reduction):
    student, teacher = draw(4, 12)
    nothing = torch.zeros(4, dtype=torch.bool)
    for s, t, mask in ((student.requires_grad_(), teacher, nothing), (student[:0], teacher[:0], None)):
        value = loss(s, t, mask=mask, reduction=reduction)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.item() == 0
        assert not gradient.any()


# -- masked vocabulary --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(modes, st.integers(0, 10_000))
def test_padding_the_vocabulary_with_minus_infinity_changes_nothing(mode, seed):
    student, teacher = draw(3, 12, seed=seed)
    student.requires_grad_()
    pad = torch.full((3, 5), -torch.inf, dtype=torch.float64)
    padded = dbild(torch.cat([student, pad], 1), torch.cat([teacher, pad], 1), **mode)
    plain = dbild(student, teacher, **mode)
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(torch.autograd.grad(padded, student), torch.autograd.grad(plain, student))


def test_an_id_that_one_side_masks_takes_no_part():
    student, teacher = draw(3, 12)
    student[:, 4] = -torch.inf
    student.requires_grad_()
    loss = dbild(student, teacher, window=None, k_min=12)
    loss.backward()
    rest = [i for i in range(12) if i != 4]
    torch.testing.assert_close(loss, dbild(student[:, rest], teacher[:, rest], window=None, k_min=11))
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("alive", [0, 1, 2])
def test_positions_with_fewer_than_three_live_ids_are_zero(alive):
    student, teacher = draw(2, 12)
    student[:, alive:] = teacher[:, alive:] = -torch.inf
    student.requires_grad_()
    loss = dbild(student, teacher)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


# -- precision ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [dbild, bild])
def test_half_precision_computes_in_float32(loss, dtype):
    student, teacher = draw(6, 40).to(dtype)
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert student.grad.dtype == dtype
    torch.testing.assert_close(value, loss(student.float(), teacher.float()), rtol=0, atol=0)


def test_autocast_changes_nothing():
    student, teacher = draw(6, 40, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dbild(student, teacher)
    torch.testing.assert_close(inside, dbild(student, teacher), rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-3, 1e4), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), modes, st.integers(0, 1000))
def test_finite_for_every_finite_input(scale, dtype, mode, seed):
    student, teacher = draw(4, 12, seed=seed, scale=scale).to(dtype)
    student.requires_grad_()
    loss = dbild(student, teacher, **mode)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_float32_is_close_to_float64():
    student, teacher = draw(200, 500)
    torch.testing.assert_close(dbild(student.float(), teacher.float()).double(), dbild(student, teacher), rtol=0, atol=1e-5)


def test_memory_grows_with_k_and_not_with_its_pairs():
    positions, k = 50, 100
    student, teacher = draw(positions, 200, dtype=torch.float32)
    student.requires_grad_()
    saved = 0

    def count(tensor):
        nonlocal saved
        saved += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        bild(student, teacher, k=k)
    one_set_of_pairs = positions * k * (k - 1) // 2 * 4
    assert saved < one_set_of_pairs


# -- the knee -----------------------------------------------------------------------------------------------------------------

RANK = torch.arange(64, dtype=torch.float64)


@pytest.mark.parametrize(
    ("curve", "index"),
    [((-RANK / 2).exp(), 7), ((-RANK / 8).exp(), 17), (1 / (1 + RANK), 7), ((-RANK / 20).exp(), 24)],
)
def test_knee_of_known_curves(curve, index):
    assert kneedle(curve).item() == index + 1
    shuffled = curve[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    assert kneedle(4 * shuffled - 2).item() == index + 1


def test_a_steeper_curve_has_an_earlier_knee():
    knees = [kneedle((-RANK / length).exp()).item() for length in (2, 4, 8, 16, 32)]
    assert knees == sorted(knees)
    assert len(set(knees)) == 5


def test_curves_without_a_knee_take_the_floor():
    flat, straight, concave = torch.ones(64), -0.1 * torch.arange(64.0), -(torch.arange(64.0) ** 2)
    assert kneedle(torch.stack([flat, straight, concave]), k_min=4).tolist() == [4, 4, 4]


def test_the_knee_is_clamped_and_its_window_counts_finite_logits():
    curve = (-RANK / 8).exp()
    assert kneedle(curve, k_max=10).item() == 10
    assert kneedle(curve, k_min=30).item() == 30
    assert kneedle(curve, window=20).item() == kneedle(curve[:20]).item()
    assert kneedle(torch.cat([torch.full((9,), -torch.inf), curve])).item() == 18
    assert kneedle(curve.log_softmax(-1), on="probabilities") == kneedle(curve.softmax(-1))


def test_the_knee_has_no_gradient():
    logits = RANK.clone().requires_grad_()
    assert not kneedle(logits).requires_grad


# -- refusals -----------------------------------------------------------------------------------------------------------------


def test_shape_mismatch_names_both_shapes():
    with pytest.raises(ValueError, match=r"\[2, 10\].*\[2, 12\]"):
        dbild(torch.zeros(2, 10), torch.zeros(2, 12))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 1}, "k is 1"),
        ({"k": 11}, "k is 11; expected 2 to 10"),
        ({"tau": 0.0}, "tau is 0.0"),
        ({"divergence": "both"}, "'both'; expected one of 'forward', 'reverse'"),
        ({"pairs": "all"}, "'all'"),
        ({"reduction": "batchmean"}, "'batchmean'"),
        ({"mask": torch.ones(2)}, "torch.bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask \[3\]"),
    ],
)
def test_bild_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        bild(torch.zeros(2, 10), torch.zeros(2, 10), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k_min": 1}, "k_min is 1"),
        ({"k_min": 11}, "at most 10 of 10"),
        ({"k_min": 5, "k_max": 4}, "at most 4"),
        ({"knee_on": "ranks"}, "'ranks'"),
        ({"branches": ()}, "branches is empty"),
        ({"branches": ("both",)}, "'both'"),
    ],
)
def test_dbild_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        dbild(torch.zeros(2, 10), torch.zeros(2, 10), **arguments)

"""The memory of contrastive distillation: what is drawn, what is scored, what is remembered, and by whom."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.errors import BadInput
from limbeck.modules.memory import ContrastiveMemory, CRDHead, similarities

INDEX = torch.tensor([3, 11, 7, 0])


def head(**given) -> CRDHead:
    torch.manual_seed(0)
    return CRDHead(6, 9, 20, **{"negatives": 5, "width": 8, **given})


def features(rows: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 9, generator=generator)


# -- drawing ---------------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.integers(1, 40), st.integers(0, 1000))
def test_negatives_are_of_other_classes_and_none_comes_twice_before_all_came_once(labels, count, seed):
    labels = torch.tensor(labels) * 7 - 3
    if len(labels.unique()) == 1:
        return
    torch.manual_seed(seed)
    index = torch.randint(len(labels), (6,))
    drawn = ContrastiveMemory(len(labels), 2, labels=labels).sample_negatives(index, count)
    assert drawn.shape == (6, count)
    for row, sample in zip(drawn, index, strict=True):
        others = (labels != labels[sample]).nonzero().flatten()
        times = (row.unsqueeze(1) == others).sum(0)  # of each sample of another class
        assert times.sum() == count, "a negative is of the row's own class"
        assert times.max() - times.min() <= 1


def test_every_other_sample_is_drawn_equally_often_and_with_every_other():
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    drawn = ContrastiveMemory(7, 2, labels=labels).sample_negatives
    pairs = torch.zeros(7, 7)
    for _ in range(3000):
        first, second = drawn(torch.tensor([2]), 2)[0]
        pairs[first, second] += 1
    allowed = [1, 3, 4, 6]
    expected = (1 - torch.eye(4)) * 3000 / 12
    torch.testing.assert_close(pairs[allowed][:, allowed], expected, rtol=0, atol=5 * 250**0.5)
    assert pairs.sum() == pairs[allowed][:, allowed].sum()


def test_rows_of_one_class_do_not_share_their_negatives():
    torch.manual_seed(0)
    drawn = ContrastiveMemory(1000, 2, labels=torch.arange(1000) % 2).sample_negatives(torch.arange(0, 40, 2), 10)
    assert len(drawn.unique()) > 100


def test_without_labels_a_sample_is_no_negative_of_itself():
    torch.manual_seed(0)
    drawn = ContrastiveMemory(6, 2).sample_negatives(torch.arange(6), 5)
    assert drawn.sort(1).values.tolist() == [[i for i in range(6) if i != own] for own in range(6)]


def test_positives_are_the_sample_itself_or_any_of_its_class():
    labels = torch.tensor([0, 1, 0, 2, 1, 0]).repeat(10)[:20]
    index = torch.arange(20)
    exact, relaxed = (head(labels=labels, mode=mode)._contrast(index)[:, 0] for mode in ("exact", "relax"))
    assert torch.equal(exact, index)
    assert torch.equal(labels[relaxed], labels)
    assert not torch.equal(relaxed, index)
    memory = head(labels=labels).memory
    assert {memory.sample_positives(index[:1]).item() for _ in range(300)} == set((labels == 0).nonzero().flatten().tolist())


def test_an_unlabelled_sample_is_a_class_of_its_own():
    memory = ContrastiveMemory(6, 4, labels=torch.tensor([0, 1, -100, 0, -100, 1]))
    index = torch.arange(6).repeat(50)
    positives, negatives = memory.sample_positives(index), memory.sample_negatives(index, 5)
    for sample, own in ((2, {2}), (4, {4}), (0, {0, 3})):
        assert set(positives[index == sample].tolist()) == own
        assert set(negatives[index == sample].flatten().tolist()) == set(range(6)) - own


# -- scoring ---------------------------------------------------------------------------------------------------------------------------


def test_both_ways_to_score_give_one_value_and_gradient():
    """Few rows of a large bank are picked and multiplied; of a small one, all are multiplied and then picked."""
    torch.manual_seed(0)
    bank, embeddings = torch.randn(500, 8), torch.randn(2, 8, requires_grad=True)
    contrast = torch.randint(40, (2, 60))
    values = [similarities(embeddings, rows, contrast) for rows in (bank, bank[:40])]
    weights = torch.randn(2, 60)
    gradients = [torch.autograd.grad((value * weights).sum(), embeddings)[0] for value in values]
    slow = torch.stack([torch.stack([row @ bank[i] for i in picked]) for row, picked in zip(embeddings, contrast, strict=True)])
    for value, gradient in zip(values, gradients, strict=True):
        torch.testing.assert_close(value, slow)
        torch.testing.assert_close(gradient, torch.einsum("bk,bkw->bw", weights, bank[contrast]))


def test_scores_are_normalised_by_the_first_batch_ever_after():
    crd, (student, teacher) = head(), features()
    assert crd.memory.log_z.isneginf().all()
    crd(student, teacher, INDEX)
    first = crd.memory.log_z.clone()
    assert first.isfinite().all()
    crd(*features(seed=2), INDEX)
    assert torch.equal(crd.memory.log_z, first)


def test_the_first_batch_has_mean_score_one_over_n():
    memory = head().memory
    embeddings = torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=-1)
    contrast = torch.randint(20, (4, 6))
    for scores in memory.log_scores(*embeddings, contrast, temperature=0.07):
        assert scores.exp().mean().item() == pytest.approx(1 / 20)


# -- remembering -----------------------------------------------------------------------------------------------------------------------


def test_rows_of_the_batch_move_and_keep_unit_norm_and_no_other_row_moves():
    crd = head()
    memory, before = crd.memory, copy.deepcopy(crd.memory)
    crd(*features(), INDEX)
    others = torch.ones(20, dtype=torch.bool).index_fill(0, INDEX, False)
    for bank, old in ((memory.student_bank, before.student_bank), (memory.teacher_bank, before.teacher_bank)):
        assert torch.equal(bank[others], old[others])
        assert (bank[INDEX] != old[INDEX]).any(1).all()
        torch.testing.assert_close(bank[INDEX].norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_momentum_is_the_share_of_the_old_row(momentum):
    memory = ContrastiveMemory(20, 8, momentum=momentum)
    old = memory.student_bank.clone()
    embeddings = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    memory.update(INDEX, embeddings, embeddings)
    expected = torch.nn.functional.normalize(momentum * old[INDEX] + (1 - momentum) * embeddings, dim=1)
    torch.testing.assert_close(memory.student_bank[INDEX], expected)


def test_of_an_index_that_occurs_twice_the_first_embedding_counts():
    memory = ContrastiveMemory(20, 8, momentum=0.0)
    embeddings = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    memory.update(torch.tensor([5, 2, 5, 5]), embeddings, embeddings)
    torch.testing.assert_close(memory.student_bank[[2, 5]], embeddings[[1, 0]])


def test_evaluation_remembers_nothing():
    crd = head().eval()
    before = {name: tensor.clone() for name, tensor in crd.state_dict().items()}
    assert crd(*features(), INDEX).isfinite()
    assert all(torch.equal(tensor, before[name]) for name, tensor in crd.state_dict().items())


def test_memory_and_normalisers_are_resumed_and_what_follows_from_the_data_is_not_saved():
    crd = head(labels=torch.arange(20) % 3)
    crd(*features(), INDEX)
    state = crd.state_dict()
    assert {name for name in state if name.startswith("memory")} == {
        "memory.student_bank", "memory.teacher_bank", "memory.log_z",
    }  # fmt: skip
    resumed = head(labels=torch.arange(20) % 3)
    resumed.load_state_dict(state)
    values = []
    for one in (crd, resumed):
        torch.manual_seed(7)
        values.append(one(*features(seed=3), INDEX))
    assert torch.equal(*values)


# -- the loss --------------------------------------------------------------------------------------------------------------------------


def test_gradient_reaches_the_student_and_both_embeds_alone():
    crd, (student, teacher) = head(), features()
    student.requires_grad_()
    teacher.requires_grad_()
    crd(student, teacher, INDEX).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert {name for name, parameter in crd.named_parameters() if parameter.grad.any()} == {
        "student_embed.weight", "student_embed.bias", "teacher_embed.weight", "teacher_embed.bias",
    }  # fmt: skip


def test_it_learns_to_tell_samples_apart():
    torch.manual_seed(0)
    crd = CRDHead(6, 9, 20, negatives=15, width=8, temperature=0.2)
    teacher = torch.randn(20, 9)
    student = nn.Linear(9, 6)
    optimizer = torch.optim.Adam([*crd.parameters(), *student.parameters()], lr=0.03)
    losses = []
    for _ in range(60):
        loss = crd(student(teacher), teacher, torch.arange(20))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_half_precision_is_finite():
    for crd, autocast in ((head(), True), (head(), False), (head().bfloat16(), False)):
        student, teacher = (side.bfloat16().requires_grad_() for side in features())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = [crd(student, teacher, INDEX) for _ in range(2)]
        sum(losses).backward()
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses)
        assert student.grad.isfinite().all()
        assert all(tensor.isfinite().all() for tensor in crd.state_dict().values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": torch.zeros(19, dtype=torch.long)}, r"labels \[19\] do not fit 20 samples"),
        ({"labels": torch.zeros(20, dtype=torch.long)}, "all samples are of one class"),
        ({"negatives": 0}, "negatives is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"mode": "loose"}, "mode is 'loose'; expected 'exact' or 'relax'"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(BadInput, match=message):
        head(**given)


def test_features_that_were_not_pooled_are_refused():
    with pytest.raises(BadInput, match=r"\[4, 6, 2, 2\]; expected \[B, 6\]"):
        head()(torch.zeros(4, 6, 2, 2), torch.zeros(4, 9), INDEX)


# -- processes -------------------------------------------------------------------------------------------------------------------------


def two_steps(crd: nn.Module, part: slice) -> list[torch.Tensor]:
    losses = []
    for step in range(2):
        contrast = torch.randint(20, (8, 6), generator=torch.Generator().manual_seed(step))
        index = torch.arange(8) * 2 + step
        contrast[:, 0] = index
        losses.append(crd(*(side[part] for side in features(8, seed=step)), index[part], contrast[part]))
    return losses


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    crd = head()
    losses = two_steps(nn.parallel.DistributedDataParallel(crd), slice(4 * rank, 4 * rank + 4))
    torch.save({"losses": torch.stack(losses).detach(), **crd.memory.state_dict()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_remember_what_one_does(tmp_path):
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = head()
    losses = two_steps(alone, slice(8))
    for name, tensor in alone.memory.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor)
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, torch.stack(losses).detach())

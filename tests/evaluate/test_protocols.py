import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck import create
from limbeck.batch import answer_spans, supervised
from limbeck.data.embedded.digit_scenes import digit_scenes
from limbeck.data.vlm import VQACollator, VQADataset
from limbeck.errors import BadInput
from limbeck.evaluate import protocols
from limbeck.evaluate.probe import probe
from limbeck.models.tiny import digit_vlm
from limbeck.models.vlm import VLM


@pytest.fixture(scope="module")
def world():
    """A student that has learnt a little (so that some answers are right), its untrained teacher and held-out batches."""
    student = VLM(*digit_vlm.build("digit-vlm-student", seed=1))
    teacher = VLM(*digit_vlm.build("digit-vlm-teacher", seed=2))
    train = VQADataset(digit_scenes("train", 64, questions=4), student.processor, cache=True)
    held_out = VQADataset(digit_scenes("val", 36, kinds=("largest", "presence", "count")), student.processor)
    collate = VQACollator(student.processor)
    method = create("sft", student)
    optimizer = torch.optim.AdamW(method.parameters(), lr=5e-3)
    batch = collate([train[index] for index in range(64)])
    for _ in range(30):
        optimizer.zero_grad()
        method(batch).total.backward()
        optimizer.step()
    method.eval()
    batches = [collate([held_out[index] for index in range(first, first + 12)]) for first in range(0, 36, 12)]
    return method, student, teacher, batches, held_out


label_rows = st.lists(st.lists(st.sampled_from([-100, 3, 4]), min_size=6, max_size=6), min_size=1, max_size=4)


@given(label_rows)
def test_answers_are_the_runs_of_supervised_tokens(rows):
    labels = torch.tensor(rows)
    answer, row = answer_spans(labels)
    expected, expected_rows, number = [], [], -1
    for index, line in enumerate(rows):
        previous = -100
        for label in line[1:]:  # nothing predicts a first token
            if label != -100:
                if previous == -100:
                    number += 1
                    expected_rows.append(index)
                expected.append(number)
            previous = label
    assert answer.tolist() == expected
    assert row.tolist() == expected_rows


def test_exact_match_is_all_tokens_of_an_answer():
    labels = torch.tensor([[-100, 1, 2, -100, 3], [-100, -100, 1, 1, 1]])
    _, targets = supervised({"labels": labels})
    logits = torch.nn.functional.one_hot(targets, 5).float()
    assert protocols.exact_match(logits, labels)[0].tolist() == [1, 1, 1]
    logits[1] = 0  # the second token of the first answer
    assert protocols.exact_match(logits, labels)[0].tolist() == [0, 1, 1]


def test_exact_match_is_what_greedy_decoding_writes(world):
    _method, student, _, batches, held_out = world
    right = []
    for batch in batches:
        inputs = batch["student"]
        logits = student.head(student.read(inputs).hidden[supervised(inputs)[0]])
        right += protocols.exact_match(logits, inputs["labels"])[0].bool().tolist()
    assert 0 < sum(right) < len(right)
    for index, expected in enumerate(right):
        sample = held_out[index]["student"]
        answer = sample["labels"][sample["labels"] != -100]
        prompt = {key: value for key, value in sample.items() if key != "labels"}
        keep = int((sample["labels"] != -100).nonzero()[0])
        prompt = {key: value[None, :keep] if value.dim() == 1 else value for key, value in prompt.items()}
        written = student.model.generate(**prompt, do_sample=False, max_new_tokens=len(answer))[0, keep:]
        assert (written.tolist() == answer.tolist()) == expected, index


def test_accuracy_is_reported_by_kind(world):
    method, _, teacher, batches, _ = world
    found = protocols.evaluate(["vqa-accuracy", "switch-route", "teacher-agreement"], batches, method, teacher)
    kinds = [found[f"accuracy/{kind}"] for kind in ("largest", "presence", "count")]
    assert found["accuracy"] == pytest.approx(sum(kinds) / 3)
    assert found.keys() >= {"switch_route_accuracy", "teacher_agreement", "teacher_accuracy"}


def test_the_probe_agrees_with_the_protocols_and_with_itself(world):
    method, student, teacher, batches, _ = world
    found = protocols.evaluate(["vqa-accuracy", "switch-route", "teacher-agreement"], batches, method, teacher)
    result = probe(batches, student, teacher)
    assert result.accuracy["student"]["student"] == pytest.approx(found["accuracy"])
    assert result.accuracy["student"]["teacher"] == pytest.approx(found["switch_route_accuracy"])
    assert result.accuracy["teacher"]["teacher"] == pytest.approx(found["teacher_accuracy"])
    assert result.answers == 36
    own = probe(batches, student, student)
    cells = {value for row in own.accuracy.values() for value in row.values()}
    assert len(cells) == 1


def test_the_probe_leaves_out_what_is_not_legal_and_says_why(world):
    _, student, _, batches, _ = world
    wide = VLM(*digit_vlm.build("digit-vlm-teacher", vision_width=64))
    result = probe(batches, student, wide)
    assert result.accuracy["student"]["teacher"] is None
    assert result.accuracy["teacher"]["student"] is None
    assert set(result.refused) == {"teacher vision, student language", "student vision, teacher language"}
    assert all("48" in reason and "64" in reason for reason in result.refused.values())
    assert result.accuracy["student"]["student"] is not None


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ({"own": 0.5, "best": 0.9, "eyes": 0.55}, "mostly from seeing"),
        ({"own": 0.5, "best": 0.9, "eyes": 0.88}, "mostly from speaking"),
        ({"own": 0.5, "best": 0.9, "eyes": 0.7}, "seeing and speaking alike"),
        ({"own": 0.9, "best": 0.9, "eyes": 0.7}, "nothing to explain"),
        ({"own": 0.5, "best": 0.9, "eyes": None}, "cannot be split"),
    ],
)
def test_the_probes_reading(cells, says):
    from limbeck.evaluate.probe import ProbeResult

    table = {
        "teacher": {"teacher": cells["best"], "student": 0.6},
        "student": {"teacher": cells["eyes"], "student": cells["own"]},
    }
    assert says in ProbeResult(table, 10, {}).reading()


def test_protocols_that_need_a_teacher_say_so(world):
    method, _, _, batches, _ = world
    with pytest.raises(BadInput, match="needs a teacher"):
        protocols.evaluate(["switch-route"], batches, method)
    with pytest.raises(BadInput, match="did you mean 'vqa-accuracy'"):
        protocols.find("vqa-acc")

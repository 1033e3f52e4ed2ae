"""What ``train.ema`` keeps: of what a method chooses on validation data, the choice that was measured."""

import limbeck as lb
from limbeck.methods.recognition.dho import DHO
from limbeck.modules.heads import DualHead

RECIPE = {
    "method": {"name": "dho"},
    "student": {"source": "tiny", "name": "cnn", "options": {"widths": [4, 8]}},
    "teacher": {"source": "tiny", "name": "cnn", "options": {"widths": [8, 8]}},
    "data": {"source": "digits"},
    "train": {"steps": 12, "batch_size": 32, "lr": 1e-2, "evaluate_every": 6, "ema": 0.5},
}


def test_the_mixture_that_was_measured_is_shipped_and_trained_on(tmp_path, monkeypatch):
    chosen, trained = [], []
    mix, forward = DualHead.mix, DHO.forward

    def noted_mix(head, alpha, beta):
        mix(head, alpha, beta)
        chosen.append((alpha, beta))

    def noted_forward(method, batch):
        if isinstance(method.student.head, DualHead):
            trained.append((method.student.head.alpha.item(), method.student.head.beta.item()))
        return forward(method, batch)

    monkeypatch.setattr(DualHead, "mix", noted_mix)
    monkeypatch.setattr(DHO, "forward", noted_forward)
    choices = iter([(0.25, 4.0), (0.75, 2.0), (0.75, 2.0)])  # after 6 and 12 steps, and of the student that is kept
    monkeypatch.setattr("limbeck.methods.recognition.dho.best_mixture", lambda right: (1.0, *next(choices, (0.75, 2.0))))
    run = lb.run(RECIPE, out=tmp_path, quiet=True)
    assert chosen[1:3] == [(0.25, 4.0), (0.75, 2.0)], "the first is that of a fresh head"
    assert trained[-6:] == [(0.25, 4.0)] * 6
    saved = lb.load_classifier(tmp_path / "student")
    for student in (run.student, saved):
        buffers = {name.rpartition(".")[2]: value.item() for name, value in student.named_buffers() if not value.dim()}
        assert (buffers["alpha"], buffers["beta"]) == (0.75, 2.0)

"""Distil one hand-written module into another, on scikit-learn's digits (``pip install limbeck[embedded]``).

The student, a fifth of the teacher's width, learns from the labels, from the teacher's logits and from its last feature map.
Neither model knows anything of Limbeck. Run with ``python examples/any_two_modules.py``.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import limbeck as lb


class Net(nn.Module):
    """Digits [B, 1, 8, 8] -> logits [B, 10]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, 10)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(pixel_values)).mean((2, 3)))


def digits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Training, validation and test parts of the 1,797 digits, as (image, label) pairs."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16, torch.tensor(labels)[order]
    train, val, test = (TensorDataset(x[part], y[part]) for part in (slice(1000), slice(1000, 1300), slice(1300, None)))
    return train, val, test


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of right answers."""
    x, y = data.tensors
    with torch.no_grad():
        return (model.cpu().eval()(x).argmax(1) == y).float().mean().item()


def main() -> None:
    """Teacher from labels; student from the teacher."""
    train_data, val_data, test_data = digits()
    torch.manual_seed(0)
    teacher, student = Net(width=40), Net(width=8)

    lb.distill(lb.compose(None, teacher, [lb.CE()]), train_data, eval_data=val_data, epochs=10, out="runs/teacher")
    method = lb.compose(teacher, student, [lb.CE(), lb.KD(temperature=4), lb.Hint("body", "body", weight=0.5)])
    run = lb.distill(method, train_data, eval_data=val_data, epochs=30, lr=5e-3, out="runs/first")

    print(f"teacher {accuracy(teacher, test_data):.1%}, student {accuracy(run.student, test_data):.1%} on held-out digits")


if __name__ == "__main__":
    main()

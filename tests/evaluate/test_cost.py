import time
from functools import partial

import pytest
import torch
from torch import nn

from limbeck.evaluate.cost import flops, latencies, parameters, size_bytes
from limbeck.models.tiny import classifiers


def test_flops_of_a_linear_layer_and_of_a_convolution():
    assert flops(nn.Linear(10, 4), torch.zeros(3, 10)) == 2 * 3 * 10 * 4
    convolution = nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1)
    assert flops(convolution, torch.zeros(2, 3, 16, 16)) == 2 * 2 * 8 * 8 * 8 * 3 * 9
    grouped = nn.Conv2d(8, 8, kernel_size=3, padding=1, groups=8)
    assert flops(grouped, torch.zeros(1, 8, 4, 4)) == 2 * 8 * 4 * 4 * 9


@pytest.mark.parametrize("training", [True, False])
def test_flops_of_attention_however_it_is_computed(training):
    tokens, width = 7, 16
    layer = nn.MultiheadAttention(width, 4, batch_first=True).train(training)
    given = torch.zeros(1, tokens, width)
    projections, products = 4 * 2 * tokens * width * width, 2 * 2 * tokens * tokens * width
    assert flops(layer, given, given, given) == projections + products
    assert layer.training == training

    class Fused(nn.Module):
        def forward(self, query):
            return nn.functional.scaled_dot_product_attention(query, query, query)

    assert flops(Fused(), given[:, None]) == products


def test_counting_leaves_a_model_as_it_was():
    model = classifiers.build("cnn", 3, widths=(4, 8)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert flops(model, torch.rand(1, 1, 8, 8)) == 2 * (64 * 4 * 9 + 16 * 8 * 4 * 9 + 8 * 3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bytes_are_those_of_parameters_and_kept_buffers_in_their_dtypes():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))  # + weight, bias, two running means and an int64 counter
    assert size_bytes(model) == 4 * (16 + 4 + 4 + 4 + 4 + 4) + 8
    assert size_bytes(model.to(torch.bfloat16)) == 2 * 36 + 8
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert size_bytes(tied) == 4 * 16
    assert parameters(tied) == 16
    tied.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert size_bytes(tied) == 4 * 16


def test_latency_is_that_of_each_call_and_calls_take_turns():
    turns = []

    def sleep(name, seconds):
        turns.append(name)
        time.sleep(seconds)

    found = latencies({"slow": partial(sleep, "slow", 0.02), "fast": partial(sleep, "fast", 0.002)}, repeats=4, warmup=1)
    assert turns == ["slow", "fast"] * 5
    assert found["slow"] >= 20 > found["fast"] >= 2
    assert latencies({}) == {}


def test_latency_stops_when_its_time_is_up_and_takes_no_gradient():
    layer, outputs = nn.Linear(2, 2), []
    latencies({"one": lambda: outputs.append(layer(torch.ones(2)))}, repeats=1000, warmup=1, seconds=0)
    assert len(outputs) == 2
    assert not outputs[0].requires_grad

"""Without peft's cast, results are equal to the last bit and fewer casts are made."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from foundry_ext.adapters.casts import leave_casts_to_autocast


class CountedCasts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def make(casts, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 5, bias=False))
    model = get_peft_model(net, LoraConfig(r=3, target_modules=["0", "1"], **settings))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    if not casts:
        leave_casts_to_autocast(model)
    return model


def step(model, autocast):
    x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
    with CountedCasts() as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.float().sin().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return counted.shapes, [y, x.grad, *grads]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("autocast", [True, False], ids=["bf16", "fp32"])
def test_the_same_bits(autocast, dropout):
    results = []
    for casts in (True, False):
        model = make(casts, lora_dropout=dropout)
        torch.manual_seed(1)
        results.append(step(model, autocast))
    (theirs_cast, theirs), (ours_cast, ours) = results
    assert len(ours) == len(theirs) == 6
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    inside = (4, 10)  # what the second linear takes, and gives back
    # Up, down, and the same for the gradient.
    assert theirs_cast.count(inside) - ours_cast.count(inside) == (4 if autocast else 0)

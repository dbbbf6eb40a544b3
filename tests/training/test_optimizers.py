"""Optimizers with few kernel launches equal the ones that they replace, step by step."""

import copy

import llmfoundry.registry
import pytest
import torch
from composer.optim import DecoupledAdamW
from llmfoundry.optim import DecoupledLionW
from llmfoundry.utils.builders import build_optimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import foundry_ext.training.optimizers
from foundry_ext.training.optimizers import ForeachLionW, FusedAdamW

SHAPES = [(7, 5), (3,), (11, 2), (1,), (5, 9)]
PAIRS = {
    "lion": (ForeachLionW, DecoupledLionW),
    "adamw": (FusedAdamW, DecoupledAdamW),
    "amsgrad": (FusedAdamW, DecoupledAdamW),
}
EQUAL = {"lion": {"rtol": 0, "atol": 0}, "adamw": {"rtol": 2e-6, "atol": 1e-7}}
EQUAL["amsgrad"] = EQUAL["adamw"]
both = pytest.mark.parametrize("kind", PAIRS)


def make_parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def make(kind, side, parameters, *, weight_decay=0.01, lr=3e-3):
    """Return two groups with their own learning rates, as in LoRA+; the fourth is frozen."""
    parameters[3].requires_grad_(False)
    groups = [
        {"params": parameters[:2]},
        {"params": parameters[2:], "lr": 16 * lr, "weight_decay": weight_decay / 2},
    ]
    settings = {"amsgrad": True} if kind == "amsgrad" else {}
    return PAIRS[kind][side](groups, lr=lr, weight_decay=weight_decay, **settings)


def train(optimizer, parameters, steps, *, first=0):
    """Take steps with warm-up and decay to 0; in every third the last parameter has no gradient."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for index, p in enumerate(parameters):
            grad = torch.randn(p.shape, generator=generator)
            grad.view(-1)[0] = 0  # sign(0)
            p.grad = None if index == 4 and step % 3 == 0 else grad
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * max(0.0, min((step + 1) / 4, (20 - step) / 16))
        optimizer.step()


def assert_same(kind, ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), **EQUAL[kind])


@both
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_the_same_parameters_and_state_after_a_schedule(kind, weight_decay, monkeypatch):
    monkeypatch.setattr(
        foundry_ext.training.optimizers, "_CPU_CHUNK", 40
    )  # several chunks, one of one
    ours, theirs = make_parameters(), make_parameters()
    our_optimizer, their_optimizer = (
        make(kind, side, parameters, weight_decay=weight_decay)
        for side, parameters in enumerate((ours, theirs))
    )
    before = copy.deepcopy(ours)
    for step in range(21):
        train(our_optimizer, ours, 1, first=step)
        train(their_optimizer, theirs, 1, first=step)
        assert_same(kind, ours, theirs)
    moved = [not torch.equal(a, b) for a, b in zip(ours, before, strict=True)]
    assert moved == [True, True, True, False, True]
    states = our_optimizer.state_dict()["state"], their_optimizer.state_dict()["state"]
    assert states[0].keys() == states[1].keys() == {0, 1, 2, 4}
    for index, state in states[0].items():
        assert state.keys() == states[1][index].keys()
        assert_same(kind, state.values(), states[1][index].values())


@both
@pytest.mark.parametrize("first", [0, 1], ids=["ours to theirs", "theirs to ours"])
def test_a_checkpoint_of_one_goes_on_in_the_other(kind, first):
    straight, moved = make_parameters(), make_parameters()
    optimizer = make(kind, first, straight)
    train(optimizer, straight, 6)
    other = make(kind, 1 - first, moved)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, trained in zip(moved, straight, strict=True):
        p.data.copy_(trained.data)
    train(optimizer, straight, 6, first=6)
    train(other, moved, 6, first=6)
    assert_same(kind, moved, straight)
    keys = [{*group} for group in (*optimizer.param_groups, *other.param_groups)]
    assert all(key == keys[0] for key in keys)


@both
def test_a_learning_rate_of_zero_decays_as_theirs(kind):
    if kind == "lion":
        with pytest.raises(Exception, match="must be > 0"):
            make(kind, 0, make_parameters(), lr=0.0)
        return
    ours, theirs = make_parameters(), make_parameters()
    train(make(kind, 0, ours, lr=0.0), ours, 3)
    train(make(kind, 1, theirs, lr=0.0), theirs, 3)
    assert_same(kind, ours, theirs)
    assert not torch.equal(ours[0], make_parameters()[0])


@both
def test_the_same_metrics_for_the_monitor(kind):
    metrics = []
    for side in (0, 1):
        parameters = make_parameters()
        optimizer = make(kind, side, parameters)
        train(optimizer, parameters, 5)
        found = optimizer.report_per_parameter_metrics(parameters[0], "w", {})
        metrics.append(optimizer.pre_reduce_metrics(found))
    assert metrics[0].keys() == metrics[1].keys() and len(metrics[0]) == 4
    for name, value in metrics[0].items():
        torch.testing.assert_close(value, metrics[1][name], rtol=1e-5, atol=1e-7)


@both
def test_the_closure_is_evaluated_with_gradients(kind):
    parameters = make_parameters()
    optimizer = make(kind, 0, parameters)

    def closure():
        loss = sum(p.square().sum() for p in parameters)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(
        sum(p.square().sum().item() for p in make_parameters())
    )


class CountedOperations(TorchDispatchMode):
    """Operations that would be kernels on a GPU: no views, profiler marks or reads."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == "aten" and name not in ("detach", "_local_scalar_dense"):
            self.launches.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "ours", "theirs"), [("lion", 5, 5), ("adamw", 2, 10)])
def test_operations_do_not_grow_with_the_parameters(kind, ours, theirs):
    """Lion takes 5 in all instead of 5 per parameter, AdamW 2 instead of 10 and a read."""
    found = []
    for side in (0, 1):
        parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(40)]
        optimizer = PAIRS[kind][side](parameters, lr=1e-3, weight_decay=1e-4)
        for _ in range(2):
            for p in parameters:
                p.grad = torch.ones(3)
            with CountedOperations() as counted:
                optimizer.step()
        found.append(counted.launches)
    assert len(found[0]) == ours, found[0]
    assert len(found[1]) == theirs * 40, found[1][:20]


def test_sharded_parameters(mesh):
    for kind, (ours, _) in PAIRS.items():
        plain, sharded = make_parameters(), make_parameters()
        sharded = [torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for p in sharded]
        for parameters in (plain, sharded):
            optimizer = ours(parameters, lr=1e-2, weight_decay=1e-3)
            for _ in range(3):
                for p in parameters:
                    p.grad = p.detach().clone().sin()
                optimizer.step()
        assert isinstance(optimizer.state[sharded[0]]["exp_avg"], DTensor)
        assert_same(kind, [p.data.full_tensor() for p in sharded], plain)


@pytest.mark.parametrize(
    ("name", "kind"), [("foreach_lionw", ForeachLionW), ("fused_adamw", FusedAdamW)]
)
def test_llm_foundry_builds_them_by_name(name, kind):
    assert name in llmfoundry.registry.optimizers
    model = torch.nn.Linear(3, 2)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}
    optimizer = build_optimizer(model, name, settings)
    assert type(optimizer) is kind
    with pytest.raises(TypeError, match="lrr"):
        build_optimizer(model, name, {**settings, "lrr": 1.0})


@pytest.mark.gpu
@both
def test_on_a_gpu_without_a_synchronisation(kind):
    parameters = [torch.nn.Parameter(p.data.cuda()) for p in make_parameters()]
    optimizer = make(kind, 0, parameters)
    theirs = make_parameters()
    train(make(kind, 1, theirs), theirs, 2)
    optimizer.load_state_dict(make(kind, 0, make_parameters()).state_dict())
    for step in range(2):
        generator = torch.Generator().manual_seed(100 + step)
        for index, p in enumerate(parameters):
            grad = torch.randn(p.shape, generator=generator)
            grad.view(-1)[0] = 0
            p.grad = None if index == 4 and step % 3 == 0 else grad.cuda()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (step + 1) / 4
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=2e-6, atol=1e-7)

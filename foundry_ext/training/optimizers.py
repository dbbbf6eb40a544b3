"""Optimizers of llm-foundry and Composer, in few kernel launches instead of many.

Same arguments, same state, same metrics for `optimizer_monitor`, checkpoints that load either way:
only `step` differs. Theirs go through the parameters one by one, and DecoupledAdamW besides waits
for the device at each of them, to read its step count.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from composer.optim import DecoupledAdamW
from llmfoundry.optim import DecoupledLionW
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

# Elements that Lion updates at a time, for the update takes as much memory again: on a CPU what
# stays in its cache (2^26 took 1.3 of DecoupledLionW's time, 2^18 takes .96-1.07), else 256 MB.
_CPU_CHUNK, _CHUNK = 2**18, 2**26


class ForeachLionW(DecoupledLionW):
    """DecoupledLionW with each operation over many parameters at once.

    Equal to the last bit in fp32, in which parameters are kept here. (In bf16 on a CPU,
    torch._foreach_mul_ rounds the factor of the weight decay.)
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            decay = _decay_factor(group) * group["weight_decay"]
            for params in _chunks(_with_gradient(group)):
                for p in params:
                    if not self.state[p]:
                        self.state[p]["exp_avg"] = torch.zeros_like(p)
                weights, grads = _local(params), _local(p.grad for p in params)
                moments = _local(self.state[p]["exp_avg"] for p in params)
                if group["weight_decay"] != 0:
                    torch._foreach_mul_(weights, 1 - decay)
                updates = torch._foreach_lerp(moments, grads, 1 - beta1)
                torch._foreach_sign_(updates)
                torch._foreach_add_(weights, updates, alpha=-group["lr"])
                torch._foreach_lerp_(moments, grads, 1 - beta2)
        return loss


class FusedAdamW(DecoupledAdamW):
    """DecoupledAdamW by torch's fused kernel, whose rounding differs in the last bits."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            params = list(_with_gradient(group))
            kept = [self._initialised(p, amsgrad=group["amsgrad"]) for p in params]
            group.setdefault("initial_lr", group["lr"])
            # The kernel multiplies by 1 - lr * weight_decay; meant is 1 - lr/initial_lr times it.
            decay = group["weight_decay"]
            if group["initial_lr"]:
                decay /= group["initial_lr"]
            elif decay and params:
                torch._foreach_mul_(_local(params), 1 - decay)
            beta1, beta2 = group["betas"]
            adamw(
                _local(params),
                _local(p.grad for p in params),
                _local(state["exp_avg"] for state in kept),
                _local(state["exp_avg_sq"] for state in kept),
                _local(state["max_exp_avg_sq"] for state in kept if group["amsgrad"]),
                [state["step"] for state in kept],
                fused=True,
                amsgrad=group["amsgrad"],
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=decay if group["initial_lr"] else 0.0,
                eps=group["eps"],
                maximize=False,
            )
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Step counts go where the kernel reads them; a checkpoint has them on the CPU."""
        super().__setstate__(state)
        for p, kept in self.state.items():
            if "step" in kept:
                step = torch.as_tensor(kept["step"], dtype=torch.float32)
                kept["step"] = step.to(_local([p])[0].device)

    def _initialised(self, p: Tensor, *, amsgrad: bool) -> dict[str, Tensor]:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=_local([p])[0].device)
            for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _with_gradient(group: dict[str, Any]) -> Iterator[Tensor]:
    return (p for p in group["params"] if p.grad is not None and p.requires_grad)


def _chunks(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """In order, of as many elements as is good, or of one parameter that has more."""
    chunk: list[Tensor] = []
    elements = 0
    for p in params:
        size = p.numel()  # of all ranks, which is only the more careful
        if chunk and elements + size > (_CPU_CHUNK if p.device.type == "cpu" else _CHUNK):
            yield chunk
            chunk, elements = [], 0
        chunk.append(p)
        elements += size
    if chunk:
        yield chunk


def _local(tensors: Iterable[Any]) -> list[Tensor]:
    """This rank's part: every operation here is elementwise, and DTensor lacks some of them."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def _decay_factor(group: dict[str, Any]) -> float:
    return group["lr"] / group["initial_lr"] if group["initial_lr"] else 1.0

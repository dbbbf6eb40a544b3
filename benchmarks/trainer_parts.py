"""Parts of a trainer's step: the time of what Composer calls, and its waits for a GPU."""

import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import composer.trainer.trainer
import torch
from composer.core import State
from composer.loggers import Logger
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data.dataloader import _BaseDataLoaderIter

CORE = ("forward", "backward", "optimizer")
_SYNC_WARNING = "called a synchronizing CUDA operation"
# Operators whose result the host must wait for; on a GPU it also waits for copies to the host.
_READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")


class Parts:
    """Seconds that each part takes itself, without the parts that it calls.

    On a GPU this is host time, so a wait for the device counts in the part that waits.
    """

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.on = clock, True
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._undo: list[Callable[[], None]] = []

    def timed(self, name: str, function: Callable) -> Callable:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            if not self.on:
                return function(*arguments, **keywords)
            self._inner.append(0.0)
            start = self.clock()
            try:
                return function(*arguments, **keywords)
            finally:
                took = self.clock() - start
                self.seconds[name] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return wrapper

    def watch(self, state: State, logger: Logger, leave_out: object) -> None:
        """Start timing; call this when training starts, after Composer has made everything."""
        for callback in state.callbacks:
            if callback is not leave_out:
                self._replace(callback, "run_event", type(callback).__name__)
        for destination in logger.destinations:
            self._replace(destination, "log_metrics", type(destination).__name__)
        for algorithm in state.algorithms:
            self._replace(algorithm, "apply", type(algorithm).__name__)
        for scheduler in state.schedulers:
            self._replace(scheduler, "step", "scheduler")
        for optimizer in state.optimizers:
            self._replace(optimizer, "step", "optimizer")
            self._replace(optimizer, "zero_grad", "optimizer")
        self._replace(state.model, "forward", "forward")
        self._replace(state.device, "batch_to_device", "batch to the device")
        self._replace(torch.Tensor, "backward", "backward")
        self._replace(_BaseDataLoaderIter, "__next__", "data loader")
        self._replace(composer.trainer.trainer, "deepcopy", "Composer's copy of each microbatch")

    def _replace(self, owner: Any, attribute: str, name: str) -> None:
        original, own = getattr(owner, attribute), attribute in vars(owner)
        setattr(owner, attribute, self.timed(name, original))
        # Deleting the object's attribute makes its class's method visible again.
        if own:
            self._undo.append(lambda: setattr(owner, attribute, original))
        else:
            self._undo.append(lambda: delattr(owner, attribute))

    def restore(self) -> None:
        while self._undo:
            self._undo.pop()()


class HostWaits:
    """Number of times that the host waits for the device, by place in the code.

    On a GPU torch itself reports them. On a CPU nothing waits, so reads of a tensor's value that
    would wait on a GPU are counted. Copies to the host would wait too, but are not counted.
    """

    def __init__(self, device: str):
        self.device, self.places = device, Counter[str]()
        self._mode = _Reads(self)
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> "HostWaits":
        if self.device != "cuda":
            self._mode.__enter__()
            return self
        self._warnings.__enter__()
        warnings.simplefilter("always")
        show = warnings.showwarning

        def note(message: Any, *arguments: Any, **keywords: Any) -> None:
            if _SYNC_WARNING in str(message):
                self.note()
            else:
                show(message, *arguments, **keywords)

        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device != "cuda":
            self._mode.__exit__(*error)
            return
        torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(*error)

    def note(self) -> None:
        self.places[_place()] += 1


class _Reads(TorchDispatchMode):
    def __init__(self, waits: HostWaits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in _READS:
            self.waits.note()
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """Return the last frame outside torch, as `composer/trainer/trainer.py:2468 in _train_loop`."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        if frame.filename == __file__ or {"torch", "warnings.py"} & set(parts):
            continue
        known = [i for i, part in enumerate(parts) if part in ("site-packages", "foundry_ext")]
        start = known[-1] + (parts[known[-1]] == "site-packages") if known else -1
        return f"{'/'.join(parts[start:])}:{frame.lineno} in {frame.name}"
    return "?"

"""Ranks that wait for one another without a time limit, and compare what each of them was given.

A collective gives up after `dist_timeout`, but one node may tokenise for hours while another has
the tokens in its cache. So ranks meet in the store of torch's process group instead: each leaves a
value there and looks for those of the others. A rank shows by a heartbeat that it is alive, and a
rank's error ends the waiting of all others.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from composer.utils import dist
from torch.distributed import DistError, PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from foundry_ext.utils.errors import UserError, one_line

log = logging.getLogger(__name__)

_POLL, _BEAT = 0.1, 5.0  # seconds
_SILENCE = 300.0  # seconds without a heartbeat after which a rank is taken for dead
_ARRIVAL = 3600.0  # seconds until a rank, which may be saving a checkpoint, comes to a meeting
_MENTION = 30.0  # seconds of waiting after which a log line says for whom
_LEAVE = 10.0  # seconds that a failing rank gives the others to read why
_SHOWN = 3  # differing keys that an error shows


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[dict[str, Any]]:
    """Let each node's first rank fill the cache on disk before the node's other ranks read it.

    All ranks call it together, and leave it together when all are done. There is no time limit as
    long as the others are alive. The body must not contain a collective, or the first rank would
    wait for the others forever.

    Yields:
        what the node's first rank has found out, for the others: it fills the dict with anything
        that JSON has, and each other rank gets a copy.

    Raises:
        UserError: another rank failed or died; names it, its node and its error. The rank that
            failed raises its own error.
    """
    if dist.get_world_size() == 1:
        yield {}
        return
    with _Meeting() as meeting:
        first = dist.get_global_rank() - dist.get_local_rank()
        is_first = first == dist.get_global_rank()
        found = {} if is_first else json.loads(meeting.wait_for(first))
        yield found
        meeting.post(json.dumps(found if is_first else {}))
        for rank in range(dist.get_world_size()):
            meeting.wait_for(rank)


def check_same(items: Mapping[str, Any], way_out: str) -> None:
    """Compare named values over all ranks, which must call this together.

    Args:
        items: what must be the same, by key or file, most telling first. Values are anything that
            JSON has; they are shown, so they must hold no secret.
        way_out: the end of the error's line.

    Raises:
        UserError: on every rank, if values differ; names the first keys that do, with the values
            and nodes of two ranks.
    """
    if dist.get_world_size() == 1:
        return
    with _Meeting() as meeting:
        text = json.dumps(dict(items), default=str)
        meeting.store.set(f"items/{meeting.rank}", text)
        meeting.post(hashlib.sha256(text.encode()).hexdigest())
        digests = [meeting.wait_for(rank) for rank in range(dist.get_world_size())]
        for rank, digest in enumerate(digests):
            if digest != digests[0]:
                faults = _differences(*(meeting.items(one) for one in (0, rank)))
                if faults:
                    raise UserError(_describe(faults, meeting.name(0), meeting.name(rank), way_out))


def shared_out(work: Callable[[], Any]) -> list[Any]:
    """Return what each rank's work returns, by rank; anything that JSON has.

    All ranks call it together, and work at the same time, for as long as it takes.
    """
    if dist.get_world_size() == 1:
        return [work()]
    with _Meeting(arrival=_ARRIVAL) as meeting:
        meeting.post(json.dumps(work()))
        return [json.loads(meeting.wait_for(rank)) for rank in range(dist.get_world_size())]


def from_rank_zero(make: Callable[[], Any]) -> Any:
    """Return what rank 0 makes; anything that JSON has. All ranks call it together."""
    if dist.get_world_size() == 1:
        return make()
    with _Meeting(arrival=_ARRIVAL) as meeting:
        if meeting.rank == 0:
            meeting.post(json.dumps(make()))
        made = json.loads(meeting.wait_for(0))
        if meeting.rank != 0:
            meeting.post("heard")
        for rank in range(dist.get_world_size()):  # rank 0's process holds the store
            meeting.wait_for(rank)
        return made


@contextlib.contextmanager
def telling_others() -> Iterator[None]:
    """Let an error of this rank end the next meeting of the others, where they may wait already."""
    try:
        yield
    except Exception as error:
        tell_others(error)
        raise


def tell_others(error: BaseException | str) -> None:
    """Let other ranks' next meeting, where they may wait already, end with this rank's error."""
    if _can_meet():
        # Without the store, which rank 0's process holds, there is nobody to tell.
        with contextlib.suppress(_ToldError, UserError, DistError), _Meeting():
            raise _ToldError(error)


def hear_others() -> str | None:
    """Return the error that another rank has told since the last meeting, or None."""
    if not _can_meet():
        return None
    try:
        store: Any = PrefixStore(f"foundry_ext/{_Meeting.held}", _get_default_store())
        if not store.check(["fault"]):
            return None
        with _Meeting() as meeting:
            meeting.wait_for(dist.get_global_rank())
    except DistError:
        return None
    except _OfAnotherError as error:
        return str(error)
    return None


def _can_meet() -> bool:
    """Return whether there are other ranks, which have not been told of an error before."""
    return dist.is_initialized() and dist.get_world_size() > 1 and not _Meeting.has_failed


class _ToldError(Exception):
    """An error outside a meeting, whose text is the fault."""


class _OfAnotherError(UserError):
    """An error that another rank has told."""


class _Meeting:
    """A place where all ranks leave a value; all enter their meetings in the same order."""

    held: ClassVar[int] = 0
    has_failed: ClassVar[bool] = False
    """The last one ended with an error, which all know."""

    def __init__(self, *, arrival: float | None = None) -> None:
        self.rank, self.arrival = dist.get_global_rank(), arrival
        # Its stubs lack `check`.
        self.store: Any = PrefixStore(f"foundry_ext/{_Meeting.held}", _get_default_store())
        _Meeting.held += 1
        _Meeting.has_failed = False
        self._left = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "_Meeting":
        place = f"rank {self.rank} (node {dist.get_node_rank()}, {socket.gethostname()})"
        with _naming_the_store():
            self.store.set(f"name/{self.rank}", place)
        self._heart.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is not None:
                _Meeting.has_failed = True
                with contextlib.suppress(DistError):
                    self._fail(error)
        finally:
            self._left.set()
            self._heart.join()

    def _beat(self) -> None:
        with contextlib.suppress(DistError):
            for count in itertools.count():
                self.store.set(f"beat/{self.rank}", str(count))
                if self._left.wait(_BEAT):
                    return

    def post(self, value: str) -> None:
        """Leave this rank's value."""
        with _naming_the_store():
            self.store.set(f"value/{self.rank}", value)

    def wait_for(self, rank: int) -> str:
        """Return the value of a rank, once it has left it.

        Raises:
            UserError: some rank failed, or this one has shown no sign of life for long.
        """
        started = heard = time.monotonic()
        beat, mentioned = None, False
        with _naming_the_store():
            while not self.store.check([f"value/{rank}"]):
                if self.store.check(["fault"]):
                    raise _OfAnotherError(self.store.get("fault").decode())
                now = time.monotonic()
                seen = self._last_beat(rank)
                if seen != beat:
                    beat, heard = seen, now
                elif now - heard > (_SILENCE if beat or not self.arrival else self.arrival):
                    raise UserError(
                        f"{self.name(rank)} has not been heard of for {_SILENCE:.0f} seconds, so"
                        " its process or machine has ended or cannot be reached; see its output,"
                        " and start again on all nodes"
                    )
                if now - started > _MENTION and not mentioned:
                    log.warning("waiting for %s, which still reads its data", self.name(rank))
                    mentioned = True
                time.sleep(_POLL)
            return self.store.get(f"value/{rank}").decode()

    def _last_beat(self, rank: int) -> bytes | None:
        key = f"beat/{rank}"
        return self.store.get(key) if self.store.check([key]) else None

    def name(self, rank: int) -> str:
        """Return `rank 3 (node 1, hostname)`."""
        key = f"name/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else f"rank {rank}"

    def items(self, rank: int) -> dict[str, Any]:
        return json.loads(self.store.get(f"items/{rank}"))

    def _fail(self, error: BaseException) -> None:
        """Tell the others, and stay until they know: rank 0's process holds the store."""
        if not isinstance(error, _OfAnotherError):
            kind = "" if isinstance(error, UserError | _ToldError) else f"{type(error).__name__}: "
            fault = f"{self.name(self.rank)} has failed: {kind}{one_line(error)}"
            self.store.compare_set("fault", "", fault)
        self.store.add("left", 1)
        end = time.monotonic() + _LEAVE
        while self.store.add("left", 0) < dist.get_world_size() and time.monotonic() < end:
            time.sleep(_POLL)


@contextlib.contextmanager
def _naming_the_store() -> Iterator[None]:
    try:
        yield
    except DistError as error:
        raise UserError(
            "rank 0 (on node 0) has ended while this rank waited for others; see its output, and"
            f" start again on all nodes ({one_line(error)})"
        ) from error


def _differences(first: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, value, other value) for each key that differs, in the order of the keys."""
    nothing = "nothing"
    pairs = ((key, first.get(key, nothing), other.get(key, nothing)) for key in first | other)
    # By text too, because a NaN does not equal itself.
    return [(key, a, b) for key, a, b in pairs if a != b and repr(a) != repr(b)]


def _describe(faults: list[tuple[str, Any, Any]], name: str, other: str, way_out: str) -> str:
    shown = "; ".join(f"{key}: {a!r} on {name}, {b!r} on {other}" for key, a, b in faults[:_SHOWN])
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return f"ranks differ in {shown}{more}; {way_out}"

"""How ranks tell each other what they have, and that they have failed: by the group's store.

The store is where ranks found each other at `init_process_group`. It takes no collective, so that a
rank can fail, be slow or be killed at any place and the others hear of it:

    CALL/ANSWER/RANK   what a rank has got, in parts     CALL/failed   what a rank that failed says
    CALL/ANSWER/all    what follows for all of them      alive/RANK    its call, and a count

where CALL holds the number of a call, counted by each rank for itself, behind that of the call
around it, and ANSWER is a number within the call. What all have read is removed.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, NoReturn

import torch

from biassurgery.errors import BadOption, RankFailed

BEAT = 5.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one after which a rank counts as killed
_LATE = 0.1  # of a wait, by which its end may be noticed late
_PART = 4 << 20  # bytes of a value; a TCPStore takes less than 8 MiB at once
_MOST = 2000  # characters of what failed


class Exchange:
    """One call that several ranks make.

    The rank with the lowest number waits for the answers of all, the others for what it makes of
    them. A rank that is at work is waited for as long as it lives; one that has not begun the call,
    as long as the process group's time-out says.

    Args:
        verb: the call's name, which has to be the same everywhere.
        ranks: who takes part, ascending.
        outer: the call inside which this one is made; None: it is inside of none.
    """

    def __init__(self, verb: str, ranks: tuple[int, ...], outer: Exchange | None) -> None:
        self.verb = verb
        self.ranks = ranks
        self.outer = outer
        self.rank: int = torch.distributed.get_rank()
        self.answers = 0
        self.calls = Counter[str]()  # inside this one, by who takes part
        self.store: Any = torch.distributed.distributed_c10d._get_default_store()
        among = _short(ranks)
        if outer is None:
            base = f"biassurgery/{among}"
            with _reaching_store():
                self.number: int = self.store.add(f"{base}/calls/{self.rank}", 1)
        else:
            base = f"{outer.call}/{among}"
            outer.calls[among] += 1
            self.number = outer.calls[among]
        self.base = base
        self.call = f"{base}/{self.number}"

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Within the block the others see that this rank lives, whatever it does."""
        if self.outer is not None:  # whose signs go on
            yield
            return
        ended = Event()
        key = f"{self.base}/alive/{self.rank}"
        with _reaching_store():
            self.store.set(key, f"{self.number} 0")
        about = (self.store, key, self.number, ended)
        thread = Thread(target=_beat, args=about, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(BEAT)  # a store that does not answer holds up nobody

    def agree(self, mine: Any, how: Callable[[dict[int, Any]], Any]) -> Any:
        """What `how` makes of the answers by rank, on the lowest rank; the same for all.

        Raises:
            RankFailed: another rank has failed, or does not answer.
            BadOption: ranks make different calls, or the answer cannot be pickled.
            Exception: `how` has raised it, wherever this rank is.
        """
        key = f"{self.call}/{self.answers}"
        self._post(f"{key}/{self.rank}", (self.verb, mine))
        if self.rank == self.ranks[0]:
            try:
                outcome = how({rank: self._answer(key, rank) for rank in self.ranks})
            except RankFailed:
                raise
            except Exception as error:  # noqa: BLE001 whatever it is, it holds for all
                outcome = _Refusal(error)
            self._post(f"{key}/all", outcome)
        else:
            self._wait(f"{key}/all", self.ranks[0])
            outcome = self._take(f"{key}/all")
        self.answers += 1
        self._clean(key)
        if isinstance(outcome, _Refusal):
            raise outcome.error
        return outcome

    def tell(self, error: BaseException) -> None:
        """Tell the others that this rank has failed, unless one of them did before."""
        said = " ".join(f"{type(error).__name__}: {error}".split())
        text = f"rank {self.rank} failed in {self.verb} with {said[:_MOST]}"
        with _reaching_store():
            self.store.compare_set(f"{self.call}/failed", "", text)

    def _answer(self, key: str, rank: int) -> Any:
        """What a rank has posted, once it is there."""
        self._wait(f"{key}/{rank}", rank)
        verb, answer = self._take(f"{key}/{rank}")
        with _reaching_store():
            self._delete_parts(f"{key}/{rank}")
        if verb != self.verb:
            raise BadOption(
                f"group: rank {rank} is in {verb} while rank {self.rank} is in {self.verb}; let all"
                " ranks make the same calls in the same order, or pass group=False where a rank"
                " measures by itself."
            )
        return answer

    def _wait(self, key: str, rank: int) -> None:
        """Wait for what a rank posts, for as long as nobody fails and that rank lives."""
        began = since = time.monotonic()
        alive = ""
        pause = 0.0005
        while not self._has(key):
            self._raise_failed(key, rank)
            latest = self._alive(rank)
            if latest != alive:
                since = time.monotonic()
                alive = latest
            begun = self._begun(key, rank, alive)
            limit = SILENCE if begun else self.store.timeout.total_seconds()
            if time.monotonic() - since > limit:
                self._give_up(rank, begun, limit)
            time.sleep(pause)
            pause = min(max(pause, _LATE * (time.monotonic() - began)), 0.25)

    def _raise_failed(self, key: str, rank: int) -> None:
        """Raise what a rank has said of this call or of one around it, unless the key is there."""
        call: Exchange | None = self
        while call is not None:
            failed = self._has(f"{call.call}/failed")
            if failed and not self._has(key):  # it comes before what the rank then says
                with _reaching_store():
                    text = self.store.get(f"{call.call}/failed").decode()
                raise RankFailed(
                    f"group: {text} Rank {self.rank} has no fault; mend that and call {call.verb}"
                    " again on all ranks."
                )
            call = call.outer
            past = call is not None and self._has(f"{call.call}/{call.answers}/{rank}")
            if past and not self._has(key):
                self._raise_past(rank)

    def _alive(self, rank: int) -> str:
        """The number of the outermost call that a rank was last in, and a count; empty: none."""
        key = f"{self._outermost().base}/alive/{rank}"
        if not self._has(key):
            return ""
        with _reaching_store():
            return self.store.get(key).decode()

    def _begun(self, key: str, rank: int, alive: str) -> bool:
        """Whether a rank has begun the outermost call.

        Raises:
            RankFailed: it has even begun a later one, without what is waited for.
        """
        number = int(alive.split()[0]) if alive else 0
        mine = self._outermost().number
        if number > mine and not self._has(key):
            self._raise_past(rank)
        return number >= mine

    def _raise_past(self, rank: int) -> NoReturn:
        raise RankFailed(
            f"group: rank {rank} is past {self.verb}, in which rank {self.rank} waits for it; let"
            " all ranks make the same calls in the same order, or pass group=False where a rank"
            " measures by itself."
        )

    def _give_up(self, rank: int, begun: bool, limit: float) -> None:
        if begun:
            why = f"has given no sign of life for {limit:.0f} s, so it was killed or hangs"
        else:
            why = f"has not called {self.verb} in the {limit:.0f} s of the process group's time-out"
        error = RankFailed(
            f"group: rank {rank} {why}; all of the ranks {list(self.ranks)} have to call"
            f" {self.verb}. On one rank alone pass group=False."
        )
        self.tell(error)
        raise error

    def _outermost(self) -> Exchange:
        return self if self.outer is None else self.outer._outermost()

    def _has(self, key: str) -> bool:
        with _reaching_store():
            return self.store.check([key])

    def _post(self, key: str, value: Any) -> None:
        try:
            data = pickle.dumps(value)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise BadOption(
                f"group: what {self.verb} has counted cannot be sent to other ranks ({error}); pass"
                " group=False, or count in tensors and numbers."
            ) from error
        with _reaching_store():
            starts = range(0, len(data), _PART)
            for part, start in enumerate(starts):
                self.store.set(f"{key}/{part}", data[start : start + _PART])
            self.store.set(key, str(len(starts)))  # now it is there

    def _take(self, key: str) -> Any:
        # As in torch's own all_gather_object: the ranks of one job trust each other.
        with _reaching_store():
            parts = range(int(self.store.get(key)))
            data = b"".join(self.store.get(f"{key}/{part}") for part in parts)
        return pickle.loads(data)

    def _delete_parts(self, key: str) -> None:
        for part in range(int(self.store.get(key))):
            self.store.delete_key(f"{key}/{part}")

    def _clean(self, key: str) -> None:
        """Remove an exchange, once all have what follows from it."""
        with _reaching_store():
            if self.store.add(f"{key}/taken", 1) == len(self.ranks):
                self._delete_parts(f"{key}/all")
                for name in ("all", "taken", *self.ranks):
                    self.store.delete_key(f"{key}/{name}")


class _Refusal:
    """An error that is the same for all ranks."""

    def __init__(self, error: Exception) -> None:
        self.error = error


@contextmanager
def _reaching_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's errors of stores and of the network
        raise RankFailed(
            "group: the store of the process group does not answer"
            f" ({str(error).splitlines()[0]}); the rank that holds it, mostly 0, has ended. Start"
            " all ranks again."
        ) from error


def _beat(store: Any, key: str, number: int, ended: Event) -> None:
    beats = 0
    while not ended.wait(BEAT):
        beats += 1
        try:
            store.set(key, f"{number} {beats}")
        except RuntimeError:  # the store has gone, which the rank itself will find
            return


def _short(ranks: tuple[int, ...]) -> str:
    """A name for some ranks, however many they are."""
    return hashlib.sha256(str(ranks).encode()).hexdigest()[:16]

"""Random operations on a model: whatever is done to it, after a full unpatch nothing is left.

    python -m tests.patching.machine --operations 10000

runs that many, chosen by hypothesis from a seed, and prints how many there were of each kind.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

import biassurgery as bs
from biassurgery.errors import SurgeryError
from biassurgery.surgery.edit import edits_in
from tests.patching import operations
from tests.patching.operations import assert_same, identities, state
from tests.patching.subjects import (
    NAMES,
    Patching,
    dtype_of,
    dtypes_of,
    plain_like,
    plain_output,
    subject,
)
from tests.state import bits
from tests.surgery.faults import Broken, Interrupted, fault

STEPS = 50  # operations in a row on one model
PART = 500  # operations after which the long run says how far it is
AT_ONCE = 6  # patches
COMPILED = 4  # of so many models one is compiled once, less than 1 % of the operations
done: Counter[str] = Counter()  # operations by name
refused: Counter[str] = Counter()  # refusals by operation and class
faults: Counter[str] = Counter()  # by operation
effects: Counter[bool] = Counter()  # patches by whether the output changed

any_index = st.integers(0, 10_000)  # into a list whose length depends on the model
any_layers = st.sampled_from(["first", "all", [0], [1], [2], [1, 2]])


class Stopped(Exception):
    """What a user's own code raises inside of a `with` block."""


class Machine(RuleBasedStateMachine):
    """A model, what it was, and what should be on it."""

    may_compile = True

    @initialize(name=st.sampled_from(NAMES), compiles=st.integers(0, COMPILED - 1))
    def begin(self, name: str, compiles: int) -> None:
        self.kind = subject(name)
        self.model = self.kind.build()
        self.compiles = self.may_compile and compiles == COMPILED - 1  # once in such a run
        self.applied: list[tuple[str, Any]] = []  # modes and towers, in order
        self.generated: list[tuple[str, Any]] | None = None  # those of the latest generation
        self.latest = ""  # operation
        self.plain = state(self.model)
        self.host = {name for name, _ in self.model.named_parameters()}
        self.identities = identities(self.model)

    # -- what must hold after each operation

    @invariant()
    def nothing_is_left(self) -> None:
        if not hasattr(self, "model"):
            return
        assert applied(self.model) == self.applied
        for module, edit in edits_in(self.model):
            assert edit.training == module.training, edit
        assert torch.is_grad_enabled()
        if not self.applied:
            self.check_as_it_was(self.model)
            assert identities(self.model) == self.identities

    def check_as_it_was(self, model: nn.Module) -> None:
        """Bit by bit, also what it computes."""
        dtype = dtype_of(model)
        output = bits(self.kind.output(model))
        model.to(torch.float32)
        assert_same(state(model), self.plain)
        model.to(dtype)
        assert output == plain_output(model, self.kind)

    def teardown(self) -> None:
        if hasattr(self, "model"):
            bs.unpatch_model(self.model)
            self.applied = []
            self.nothing_is_left()

    def attempt(self, name: str, action: Callable[[], Any]) -> bool:
        """Whether an operation was done; one that is refused must have changed nothing."""
        done[name] += 1
        self.latest = name
        before = state(self.model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                action()
        except SurgeryError as error:
            refused[f"{name}: {type(error).__name__}"] += 1
            assert_same(state(self.model), before)
            return False
        return True

    def patching(self, index: int) -> Patching:
        return self.kind.patchings[index % len(self.kind.patchings)]

    def tower(self, index: int) -> Any:
        return list(self.kind.reading)[index % len(self.kind.reading)]

    # -- patches

    @precondition(lambda self: len(self.applied) < AT_ONCE)
    @rule(index=any_index, layers=any_layers)
    def patch(self, index: int, layers: Any) -> None:
        patching = self.patching(index)
        before = bits(self.kind.output(self.model))
        if self.attempt("patch", lambda: put(self.model, patching, layers)):
            self.applied += patching.applied
            effects[bits(self.kind.output(self.model)) != before] += 1

    @precondition(lambda self: self.applied)
    @rule()
    def unpatch_all(self) -> None:
        assert self.attempt("unpatch", lambda: bs.unpatch_model(self.model))
        self.applied = []

    @precondition(lambda self: self.applied)
    @rule(index=any_index, by_name=st.booleans())
    def unpatch_one(self, index: int, by_name: bool) -> None:
        mode = self.mode(index, by_name)
        left = self.without(mode)
        if self.attempt("unpatch one", lambda: bs.unpatch_model(self.model, mode)):
            self.applied = left

    def mode(self, index: int, by_name: bool) -> Any:
        """That of one of the patches, or its name."""
        chosen = [patch.mode for patch in bs.patches(self.model)][index % len(self.applied)]
        return chosen.name if by_name else chosen

    def without(self, mode: Any) -> list[tuple[str, Any]]:
        """What is applied when this mode has left."""
        pairs = zip(self.applied, bs.patches(self.model))
        return [name for name, patch in pairs if mode not in (patch.mode, patch.mode.name)]

    @rule(index=any_index, layers=any_layers, inside=st.sampled_from(["run", "raise", "unpatch"]))
    def patched(self, index: int, layers: Any, inside: str) -> None:
        patching = self.patching(index)
        before = state(self.model)

        def use() -> None:
            with bs.patched(self.model, **patching.arguments(layers)):
                assert applied(self.model) == self.applied + patching.applied
                self.kind.output(self.model)
                if inside == "raise":
                    raise Stopped
                if inside == "unpatch":
                    bs.unpatch_model(self.model)
                    self.applied = []

        try:
            self.attempt("patched", use)
        except Stopped:
            assert inside == "raise"
        if self.applied or inside != "unpatch":
            assert_same(state(self.model), before)

    @rule(call=st.sampled_from(operations.WRONG), index=any_index)
    def wrong_arguments(self, call: Callable[..., Any], index: int) -> None:
        assert not self.attempt("wrong arguments", lambda: call(self.model, self.tower(index)))

    # -- an exception at some call inside of the library

    @rule(
        action=st.sampled_from(["patch", "unpatch", "unpatch one", "patched", "measure", "save"]),
        index=any_index,
        layers=any_layers,
        at=st.integers(1, 600),
        error=st.sampled_from([Broken, Interrupted]),
    )
    def interrupted(
        self, action: str, index: int, layers: Any, at: int, error: type[BaseException]
    ) -> None:
        """Nothing has happened, or all of it."""
        patching = self.patching(index)
        after = self.applied
        if action == "patch":
            after = self.applied + patching.applied
        elif action == "unpatch":
            after = []
        elif action == "unpatch one" and self.applied:
            after = self.without(self.mode(index, by_name=False))
        before = state(self.model)
        reached = False

        def begin() -> None:
            nonlocal reached
            with fault(at, error):
                self.faulty(action, index, layers)
            reached = True

        try:
            if not self.attempt(f"interrupted {action}", begin):
                return
        except error:
            faults[action] += 1
        found = applied(self.model)
        # Where only the end of `patched` was stopped, one unpatch_model is what remains to be done.
        allowed = [after] if reached else [self.applied, after, self.applied + patching.applied]
        assert found in allowed
        if (found == self.applied and found != after) or action in ("measure", "save"):
            assert_same(state(self.model), before)
        self.applied = found

    def faulty(self, action: str, index: int, layers: Any) -> None:
        if action == "patch":
            put(self.model, self.patching(index), layers)
        elif action == "unpatch":
            bs.unpatch_model(self.model)
        elif action == "unpatch one" and self.applied:
            bs.unpatch_model(self.model, self.mode(index, by_name=False))
        elif action == "patched":
            with bs.patched(self.model, **self.patching(index).arguments(layers)):
                self.kind.output(self.model)
        elif action == "measure":
            self.measure_with(index)
        elif action == "save" and self.applied:
            with tempfile.TemporaryDirectory() as folder:
                bs.save_patch(self.model, folder)
                bs.load_patch(self.kind.build(), folder)

    # -- files and copies

    @precondition(lambda self: self.applied)
    @rule(fresh=st.booleans())
    def save_and_load(self, fresh: bool) -> None:
        """Onto another model, or onto this one again."""
        wanted = bits(self.kind.output(self.model))
        with tempfile.TemporaryDirectory() as folder:
            if not self.attempt("save", lambda: bs.save_patch(self.model, folder)):
                return
            other = plain_like(self.model, self.kind)
            if not fresh:
                bs.unpatch_model(self.model)
                other = self.model
            done["load"] += 1
            bs.load_patch(other, folder)
        assert applied(other) == self.applied
        assert bits(self.kind.output(other)) == wanted

    @rule(how=st.sampled_from(list(operations.COPIES)), keep=st.booleans())
    def copied(self, how: str, keep: bool) -> None:
        """A copy is a model of its own; go on with it or with the first."""
        done[how] += 1
        twin = operations.COPIES[how](self.model)
        assert applied(twin) == self.applied
        assert_same(state(twin), state(self.model))
        wanted = bits(self.kind.output(self.model))
        stays, goes = (self.model, twin) if keep else (twin, self.model)
        bs.unpatch_model(goes)
        self.check_as_it_was(goes)
        assert bits(self.kind.output(stays)) == wanted
        if not keep:
            self.model = stays
            found = identities(stays)
            self.identities = {name: found[name] for name in self.identities}

    # -- what users do with models

    @rule(
        index=any_index,
        inside=st.sampled_from(["run", "raise", "patched"]),
        what=st.sampled_from(operations.QUANTITIES),
        layers=st.sampled_from([None, [1]]),
    )
    def record(self, index: int, inside: str, what: str, layers: Any) -> None:
        before = state(self.model)

        def use() -> None:
            with bs.record(self.model, what, layers, tower=self.tower(index)) as found:
                self.kind.output(self.model)
                assert found[what]
                if inside == "raise":
                    raise Stopped
                if inside == "patched":
                    with bs.patched(self.model, **self.patching(index).arguments("all")):
                        self.kind.output(self.model)

        try:
            self.attempt("record", use)
        except Stopped:
            assert inside == "raise"
        assert_same(state(self.model), before)

    @rule(index=any_index)
    def measure(self, index: int) -> None:
        before = state(self.model)
        self.attempt("measure", lambda: self.measure_with(index))
        assert_same(state(self.model), before)

    def measure_with(self, index: int) -> None:
        chosen = list(operations.MEASURES.values())[index % len(operations.MEASURES)]
        chosen(self.model, self.kind, self.tower(index))

    @rule(training=st.booleans())
    def train_or_eval(self, training: bool) -> None:
        done["train() or eval()"] += 1
        self.model.train(training)
        self.plain |= {name: training for name in self.plain if name.endswith(":training")}

    @precondition(lambda self: operations.added(self.model, self.host))
    @rule()
    def step(self) -> None:
        done["train step"] += 1
        operations.train(self.model, self.kind, self.host)

    @precondition(lambda self: self.latest != "cast")
    @rule(index=any_index)
    def cast(self, index: int) -> None:
        done["cast"] += 1
        self.latest = "cast"
        dtypes = dtypes_of(self.kind.name)
        dtype = dtypes[index % len(dtypes)]
        self.model.to(dtype)
        assert {parameter.dtype for parameter in self.model.parameters()} == {dtype}

    @precondition(lambda self: not any(patch.frozen for patch in bs.patches(self.model)))
    @rule(index=any_index, trains=st.booleans())
    def freeze(self, index: int, trains: bool) -> None:
        """A parameter of the user's choice, while no patch freezes them all."""
        done["freeze"] += 1
        name = sorted(self.host)[index % len(self.host)]
        self.model.get_parameter(name).requires_grad_(trains)
        for same, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter is self.model.get_parameter(name):
                entry = same if "." in same else f".{same}"  # of the root
                self.plain[entry] = (trains, self.plain[entry][1])

    @precondition(lambda self: hasattr(self.model, "generate") and self.generated != self.applied)
    @rule()
    def generate(self) -> None:
        self.generated = list(self.applied)  # once is enough for one set of patches
        before = state(self.model)
        self.attempt("generate", lambda: operations.generated(self.model))
        assert_same(state(self.model), before)

    @precondition(lambda self: self.compiles)
    @rule(backend=st.sampled_from(["eager", "aot_eager"]), index=any_index)
    def compile(self, backend: str, index: int) -> None:
        """A compiled model computes the same, and what is patched since is seen."""
        self.compiles = False
        done["compile"] += 1
        torch._dynamo.reset()
        compiled = torch.compile(self.model, backend=backend)
        patching = Patching(
            "set_value", self.tower(index), {"value": 7.0, "channels": (1,), "positions": (1,)}
        )
        self.check_compiled(compiled)
        with bs.patched(self.model, **patching.arguments([1])):
            self.check_compiled(compiled)
        self.check_compiled(compiled)
        vars(self.model).pop("_is_torch_compile", None)  # torch's own mark

    def check_compiled(self, compiled: nn.Module) -> None:
        torch.testing.assert_close(
            self.kind.output(compiled), self.kind.output(self.model), rtol=0.03, atol=0.03
        )


def put(model: nn.Module, patching: Patching, layers: Any) -> None:
    bs.patch_model(model, **patching.arguments(layers))


def applied(model: nn.Module) -> list[tuple[str, Any]]:
    return [(patch.mode.name, patch.tower) for patch in bs.patches(model)]


def run(operations: int, first_seed: int = 0, compiled: bool = True) -> None:
    """At least so many operations, the same of every seed; raises the first that goes wrong."""
    end = done.total() + operations
    while done.total() < end:
        runs = min(10, max(1, (end - done.total()) // STEPS))
        machine = seed(first_seed)(type("Machine", (Machine,), {"may_compile": compiled}))
        first_seed += 1
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=runs,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                phases=(Phase.generate,),
                suppress_health_check=list(HealthCheck),
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    begun = time.monotonic()
    for part in range(given.operations, 0, -PART):
        run(min(part, PART), given.seed + 1000 * part)
        sys.stderr.write(f"{done.total()} operations, {time.monotonic() - begun:.0f} s\n")
    lines = [f"{done.total()} operations in {time.monotonic() - begun:.0f} s"]
    for title, counter in (("done", done), ("refused", refused), ("faults", faults)):
        lines.append(f"{title}: " + ", ".join(f"{n} {name}" for name, n in counter.most_common()))
    lines.append(f"patches that changed the output: {effects[True]} of {effects.total()}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

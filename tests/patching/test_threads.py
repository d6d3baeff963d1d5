"""Threads: what one patched model computes in several at once, and what only one may do."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, Event
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.errors import ModelInUse
from tests.models import images, planted, planted_vit, tokens
from tests.patching.subjects import subject
from tests.state import untouched

THREADS = 4


@pytest.fixture(autouse=True)
def _quick_switches() -> Iterator[None]:
    """Threads take turns so often that no state of one forward would last through it."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(jobs: list[Callable[[], Any]]) -> list[Any]:
    """The results of jobs that begin together, each in a thread of its own."""
    barrier = Barrier(len(jobs))

    def begin(job: Callable[[], Any]) -> Any:
        torch.set_num_threads(1)
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(begin, jobs))


# Batches of several shapes, so that what is mixed up fails or differs.
IDS = [
    tokens(rows, length, seed, None)
    for rows, length, seed in [(1, 9, 1), (2, 14, 2), (3, 11, 3), (2, 17, 4)]
]
PIXELS = [images(rows, seed) for rows, seed in [(1, 1), (2, 2), (3, 3), (2, 4)]]

MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "set_zero": ("set_zero", {"sites": ...}),
    "zero_random": ("zero_random", {"sites": ...}),
    "positions": ("set_value", {"value": 9.0, "channels": 3, "positions": 2, "layers": [1]}),
    "instrument": ("instrument", {}),
    "transplant": ("transplant", {"key_values": ...}),
    **{
        kind: ("attention_bias", {"kind": kind, "init": "normal", "std": 1.0})
        for kind in ("kv", "k", "v", "sink_logit", "gate")
    },
    "off_by_one": ("attention_bias", {"kind": "off_by_one"}),
    "registers": ("fix_registers", {"means": ..., "fill": "mean"}),
    "token": ("test_time_registers", {"neurons": ...}),
}
FINDINGS: dict[str, Callable[[Any, Tensor], Any]] = {
    "sites": lambda model, batch: bs.calibrate(model, batch, min_ratio=20.0),
    "key_values": bs.calibrate_key_values,
    "means": bs.calibrate_registers,
    "neurons": lambda model, batch: bs.find_register_neurons(model, batch, count=3),
}
FAMILIES = {
    "llama": lambda: planted("llama"),
    "falcon": lambda: planted("falcon_alibi"),
    "mpt": lambda: planted("mpt"),
    "timm": lambda: planted_vit(reg_tokens=2),
}


def patched(family: str, mode: str) -> tuple[Any, list[Tensor]]:
    model = FAMILIES[family]()
    batches = PIXELS if family == "timm" else IDS
    name, options = MODES[mode]
    given = {
        key: FINDINGS[key](model, batches[1]) if value is ... else value
        for key, value in options.items()
    }
    return bs.patch_model(model, name, **given), batches


def output(model: Any, batch: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(batch)
    return found if isinstance(found, Tensor) else found.logits


CASES = [
    (family, mode)
    for family in FAMILIES
    for mode in MODES
    if (mode not in ("registers", "token") or family == "timm")
    and (mode != "transplant" or family != "timm")
    and (family in ("llama", "timm") or mode in ("gate", "transplant", "kv"))
]


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_one_patched_model_in_several_threads(family: str, mode: str) -> None:
    """Bit by bit what each batch gives alone."""
    model, batches = patched(family, mode)
    alone = [output(model, batch) for batch in batches]
    plain = FAMILIES[family]()
    if mode != "instrument":
        assert any(not torch.equal(o, output(plain, b)) for o, b in zip(alone, batches))
    together = at_once(
        [lambda batch=batch: [output(model, batch) for _ in range(3)] for batch in batches]
    )
    for expected, found in zip(alone, together):
        assert all(torch.equal(expected, each) for each in found)


@pytest.mark.parametrize("mode", ["set_zero", "gate", "transplant"])
def test_one_patched_model_generates_in_several_threads(mode: str) -> None:
    model, batches = patched("llama", mode)

    def generate(batch: Tensor) -> Tensor:
        return model.generate(batch, max_new_tokens=4, do_sample=False)

    alone = [generate(batch) for batch in batches]
    together = at_once([lambda batch=batch: generate(batch) for batch in batches])
    assert all(map(torch.equal, alone, together))


def test_gradients_of_a_bias_in_several_threads() -> None:
    """As in DataParallel: the sum of what each batch gives alone."""
    model, batches = patched("llama", "gate")
    weight = model.model.layers[1].self_attn.attention_bias_gate.gate

    def gradient(batch: Tensor) -> Tensor:
        return torch.autograd.grad(model(batch).logits.square().mean(), weight)[0]

    alone = [gradient(batch) for batch in batches]
    assert all(each.abs().sum() > 0 for each in alone)
    together = at_once([lambda batch=batch: gradient(batch) for batch in batches])
    assert all(map(torch.equal, alone, together))


WHAT = (
    "block_input",
    "block_output",
    "norm_output",
    "attention_output",
    "q",
    "k",
    "v",
    "logits",
    "probs",
    "sink_mass",
    "bias_mass",
    "value_updates",
)


@pytest.mark.parametrize("family", ["llama", "timm"])
def test_a_record_of_several_threads_has_one_step_a_forward(family: str) -> None:
    model, batches = patched(family, "kv")
    alone = []
    for batch in batches:
        with bs.record(model, WHAT) as rec:
            output(model, batch)
        alone.append(rec.steps[0])
    with bs.record(model, WHAT) as rec:
        at_once([lambda batch=batch: output(model, batch) for batch in batches])
    assert len(rec.steps) == len(batches)
    by_shape = {step["logits"][1].shape: step for step in rec.steps}
    same = [step for step in alone if by_shape[step["logits"][1].shape] is not None]
    assert len(same) == len(batches)
    for expected in alone:
        candidates = [
            step
            for step in rec.steps
            if step["q"][0].shape == expected["q"][0].shape
            and torch.equal(step["block_input"][0], expected["block_input"][0])
        ]
        (found,) = candidates
        for name in WHAT:
            assert list(found[name]) == list(expected[name])
            for layer, tensor in expected[name].items():
                assert torch.equal(found[name][layer], tensor), (name, layer)


def test_a_backward_in_another_thread_that_runs_blocks_again() -> None:
    """Gradient checkpointing on a GPU: autograd has threads of its own."""
    model = planted("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = IDS[1]
    model(ids).logits.square().mean().backward()
    wanted = model.lm_head.weight.grad.clone()
    first = model.model.layers[0].self_attn.q_proj.weight
    wanted_first = first.grad.clone()
    model.zero_grad()
    with bs.record(model, ("sink_mass", "attention_output", "block_output")) as rec:
        loss = model(ids).logits.square().mean()
        at_once([loss.backward])
    assert len(rec.steps) == 1
    torch.testing.assert_close(model.lm_head.weight.grad, wanted)
    torch.testing.assert_close(first.grad, wanted_first, rtol=1e-3, atol=1e-4)


# -- what only one thread may do


@contextmanager
def measured(model: Any, batch: Tensor) -> Iterator[Callable[[], Any]]:
    """Within the block another thread is inside of `calibrate`; gives how to get its result."""
    inside, go_on = Event(), Event()

    def batches() -> Iterator[Tensor]:
        yield batch
        inside.set()
        assert go_on.wait(60)
        yield batch

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(bs.calibrate, model, batches())
        try:
            assert inside.wait(60)
            yield lambda: (go_on.set(), result.result(60))[1]
        finally:
            go_on.set()


VERBS: dict[str, Callable[[Any, Tensor], Any]] = {
    "calibrate": bs.calibrate,
    "detect": bs.detect,
    "calibrate_key_values": bs.calibrate_key_values,
    "perplexity": bs.perplexity,
    "compare": lambda model, ids: bs.compare(model, lambda m: bs.perplexity(m, ids), [None]),
    "patch_model": lambda model, ids: bs.patch_model(model, "attention_bias"),
    "patched": lambda model, ids: bs.patched(model, "instrument").__enter__(),
    "unpatch_model": lambda model, ids: bs.unpatch_model(model),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_that_another_thread_measures_is_refused(verb: str) -> None:
    model = planted("llama").train()
    ids = tokens(rows=2, length=12)
    wanted = bs.calibrate(model, [ids, ids])
    with untouched(model):
        with measured(model, ids) as result:
            with (
                untouched(model),
                pytest.raises(ModelInUse, match=r"LlamaForCausalLM.*wait.*deepcopy"),
            ):
                VERBS[verb](model, ids)
            assert list(result()) == list(wanted)
        VERBS["calibrate"](model, ids)  # it may be measured again


def test_the_body_and_a_copy_of_a_model_that_is_measured() -> None:
    """Its body shares its modules; a copy does not."""
    model = planted("llama")
    ids = tokens(rows=2, length=12)
    twin = copy.deepcopy(model)
    wanted = bs.calibrate(model, [ids, ids])
    with measured(model, ids) as result:
        with pytest.raises(ModelInUse):
            bs.calibrate(model.model, ids)
        assert list(bs.calibrate(twin, [ids, ids])) == list(wanted)
        assert list(result()) == list(wanted)


def test_a_model_that_runs_elsewhere_while_it_is_measured() -> None:
    """The measurement counts its own forwards only, and the others compute what they did."""
    model = planted("llama")
    ids = tokens(rows=2, length=12)
    others = tokens(rows=5, length=7, seed=8, delimiter_at=None)
    wanted = bs.calibrate(model, [ids, ids])
    alone = output(model, others)
    with measured(model, ids) as result:
        assert torch.equal(output(model, others), alone)
        assert list(result()) == list(wanted)


def test_different_models_are_patched_and_run_in_several_threads() -> None:
    kind = subject("llama")
    modes = ["set_zero", "kv", "gate", "transplant"]
    alone = []
    for mode in modes:
        model, batches = patched("llama", mode)
        alone.append(output(model, batches[1]))
    models = [kind.build() for _ in modes]

    def work(mode: str) -> Tensor:
        model, batches = patched("llama", mode)
        with untouched(model):
            found = output(model, batches[1])
        bs.unpatch_model(model)
        assert torch.equal(output(model, IDS[1]), output(planted("llama"), IDS[1]))
        return found

    together = at_once([lambda mode=mode: work(mode) for mode in modes])
    assert len(models) == len(together)
    for mode, expected, found in zip(modes, alone, together):
        if mode in ("set_zero", "transplant"):  # others draw their parameters
            assert torch.equal(expected, found), mode
        assert found.isfinite().all()


@pytest.mark.parametrize("mode", ["kv", "transplant"])
def test_positions_are_counted_in_every_thread(mode: str) -> None:
    """Behind padding, where a trial of the patch has run in the thread that patched alone."""
    model, _ = patched("llama", mode)
    mask = torch.ones_like(IDS[1])
    mask[:, :4] = 0

    def padded() -> Tensor:
        with torch.no_grad():
            return model(IDS[1], attention_mask=mask).logits[:, 4:]

    here = padded()
    (there,) = at_once([padded])
    assert torch.equal(here, there)
    with torch.no_grad():
        alone = model(IDS[1][:, 4:]).logits
    torch.testing.assert_close(here, alone, rtol=1e-4, atol=1e-4)

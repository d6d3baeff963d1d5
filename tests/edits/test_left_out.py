"""Levels that were left out of the sites stay as they are, whatever the mode."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace

import pytest
import torch

import biassurgery as bs
from biassurgery.edits.massive import ShuffleEdit, WriteEdit, ZeroRandomEdit
from biassurgery.errors import BadOption
from tests import models
from tests.models import DELIMITER_ID, START_ID
from tests.state import output_of
from tests.stepped import outputs, stepped

A, B, WIDTH = 2, 5, 12

# Levels of channel A: (role, cluster, values that calibration saw); B has one.
LEVELS = {
    ("start", 0): (2990.0, 3000.0, 3010.0),
    ("elsewhere", 0): (-900.0, -800.0),
    ("elsewhere", 1): (900.0, 1100.0, 1300.0),
    ("elsewhere", 2): (8000.0, 10000.0),
}
SPANS = tuple((*key, min(values), max(values)) for key, values in LEVELS.items())


def site(key, **options):
    role, cluster = key
    mean = sum(LEVELS[key]) / len(LEVELS[key])
    return bs.Site(0, A, role, mean, gate=200.0, cluster=cluster, spans=SPANS, **options)


OTHER = bs.Site(0, B, "start", 700.0, gate=100.0)


def hidden_state(dtype=torch.float32, rows=4):
    """(rows, 11, WIDTH): ordinary tokens, then in channel A the values of every level in turn."""
    hidden = torch.randn(rows, 11, WIDTH, generator=torch.Generator().manual_seed(0)) * 20
    values = [value for group in LEVELS.values() for value in group]
    hidden[:, 1:, A] = torch.tensor(values) * torch.linspace(0.99, 1.01, rows)[:, None]
    hidden[:, 4, B] = 650.0
    return hidden.to(dtype)


def key_of(x):
    """The level that a value was made from: the one of whose values it is within 2 %."""
    near = [key for key, values in LEVELS.items() if any(abs(x / v - 1) < 0.02 for v in values)]
    return near[0] if near else None


SUBSETS = [
    [("start", 0)],
    [("elsewhere", 1)],
    [("elsewhere", 2)],
    [("start", 0), ("elsewhere", 0)],
    [("elsewhere", 0), ("elsewhere", 2)],
    [("elsewhere", 0), ("elsewhere", 1), ("elsewhere", 2)],
    list(LEVELS),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kept", SUBSETS, ids=str)
def test_only_values_of_the_levels_that_are_there_are_written(kept, dtype):
    sites = bs.Sites([*map(site, kept), OTHER])
    hidden = hidden_state(dtype)
    means = {key: sum(LEVELS[key]) / len(LEVELS[key]) for key in kept}
    for write, wanted_of in ((lambda s: s.mean, means), (lambda s: 0.0, dict.fromkeys(kept, 0.0))):
        edited = WriteEdit(sites, {s: write(s) for s in sites})(hidden)
        wanted = hidden.clone()
        for row, token in torch.cartesian_prod(torch.arange(4), torch.arange(11)).tolist():
            key = key_of(hidden[row, token, A].item())
            if key in kept:
                wanted[row, token, A] = wanted_of[key]
        wanted[:, 4, B] = write(OTHER)
        assert torch.equal(edited, wanted)
        assert not torch.equal(edited, hidden)


@pytest.mark.parametrize("kept", SUBSETS[:-1], ids=str)
def test_the_other_edits_leave_them_alone_too(kept):
    sites = bs.Sites(map(site, kept))
    hidden = hidden_state()
    is_kept = torch.tensor([[key_of(x) in kept for x in row] for row in hidden[..., A].tolist()])
    for edit in (
        ShuffleEdit(sites),
        WriteEdit(sites, {s: s.mean for s in sites}, dict.fromkeys(sites, 5.0)),
    ):
        changed = edit(hidden) != hidden
        assert changed[..., A][is_kept].any()
        assert not changed[..., A][~is_kept].any()
        assert not changed[..., [c for c in range(WIDTH) if c != A]].any()
    edit = ZeroRandomEdit(sites, WIDTH, 0)
    assert torch.equal((edit(hidden) != hidden).any(-1), is_kept)


def growing(layers, **options):
    """The start token's level of channel 7 in two blocks, beside one that is left out in both."""
    spans = (("start", 0, 3000.0, 3100.0), ("elsewhere", 0, 500.0, 900.0))
    return [
        bs.Site(i, models.CHANNEL, "start", 3050.0, gate=200.0, spans=spans, **options)
        for i in layers
    ]


def test_what_grows_again_beside_what_was_left_out_is_told(recwarn):
    """Behind set_zero the value of block 2 may be that of what was left out; behind set_mean not.

    Block 1 + 2600 is 3050 + 2600 in a plain forward, and 2600 behind a zero.
    """
    model = models.planted("llama")
    sites = bs.Sites(growing([1, 2], first=True), origin=bs.Origin("llama"))
    with pytest.warns(UserWarning, match="layer 2, channel 7, values grow again behind set_zero"):
        bs.patch_model(model, "set_zero", sites=sites)
    bs.unpatch_model(model)
    recwarn.clear()
    kept = [replace(site, role="elsewhere", mean=700.0) for site in sites]
    for mode, chosen, layers in (
        ("set_mean", sites, None),
        ("noise", sites, None),
        ("set_zero", sites, [1]),
        ("set_zero", bs.Sites([*sites, *kept]), None),  # nothing is left out
        (
            "set_zero",
            bs.Sites(growing([1, 2], first=False)),
            "all",
        ),  # measured: nothing grows there
    ):
        with bs.patched(model, mode, sites=chosen, layers=layers):
            assert bs.patches(model)[0].mode.name == mode
    assert [str(w.message) for w in recwarn if "grow again" in str(w.message)] == []


def test_hand_made_sites_mean_what_they_meant():
    """Without spans nothing is known of what was left out: the nearest of what is there."""
    sites = bs.Sites([replace(site(("start", 0)), spans=())])
    edited = WriteEdit(sites, {s: s.mean for s in sites})(hidden_state())
    assert (edited[:, 1:, A] == 3000).all()


def test_a_boundary_is_in_the_gap_not_in_the_middle_of_the_means():
    """Values of 100 to 2200 with a mean of 500 are left out, a constant of 3000 is replaced."""
    spans = (("start", 0, 3000.0, 3000.0), ("elsewhere", 0, 100.0, 2200.0))
    start = bs.Site(0, A, "start", 3000.0, gate=50.0, spans=spans)
    hidden = torch.zeros(1, 4, WIDTH)
    hidden[0, :, A] = torch.tensor([3000.0, 2200.0, 2500.0, 2600.0])  # the gap's middle: 2569
    with pytest.warns(UserWarning, match=r"from 100 to 2200 were left out.*'start'") as told:
        edit = WriteEdit(bs.Sites([start]), {start: 0.0})
    assert len(told) == 1
    assert edit(hidden)[0, :, A].tolist() == [0.0, 2200.0, 2500.0, 0.0]


@pytest.mark.parametrize(
    ("span", "refused"),
    [
        (("elsewhere", 0, 2000.0, 2999.0), False),
        (("elsewhere", 0, 2000.0, 3000.0), True),
        (("elsewhere", 0, 2000.0, 9000.0), True),
        (("elsewhere", 0, 3500.0, 9000.0), False),
        (("elsewhere", 0, -3100.0, -3000.0), False),
    ],
)
def test_what_cannot_be_told_apart_is_refused_before_anything_is_changed(span, refused):
    start = bs.Site(
        1, models.CHANNEL, "start", 3050.0, gate=50.0, spans=(("start", 0, 3000.0, 3100.0), span)
    )
    sites = bs.Sites([start], origin=bs.Origin("llama"))
    model = models.planted("llama")
    ids = models.tokens()
    before = output_of(model, ids)
    for mode in ("set_mean", "set_zero", "noise", "shuffle", "zero_random"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if refused:
                with pytest.raises(
                    BadOption, match=r"layer 1, channel 7.*by value.*tell them apart"
                ):
                    bs.patch_model(model, mode, sites=sites)
            else:
                bs.unpatch_model(bs.patch_model(model, mode, sites=sites))
    assert bs.patches(model) == ()
    assert torch.equal(output_of(model, ids), before)
    both = bs.Sites([start, replace(start, role="elsewhere", mean=2500.0)])  # nothing is left out
    with bs.patched(model, "set_mean", sites=both):
        assert len(bs.patches(model)) == 1


# -- on a model, and through files

GROWN = {
    (1, START_ID, 20): 8570.0,
    (1, DELIMITER_ID, 20): 1100.0,
    (1, START_ID, 30): -500.0,
    (3, DELIMITER_ID, 30): 2000.0,
}
FILTERS = {
    "start": lambda s: s.role == "start",
    "elsewhere": lambda s: s.role == "elsewhere",
    "channel": lambda s: s.channel == 30,
    "layer": lambda s: s.layer == 3,
    "level": lambda s: abs(s.mean) > 5000,
}


@pytest.fixture(scope="module")
def grown():
    model = stepped(GROWN)
    return model, bs.calibrate(model, models.tokens(4, 16, 1, 9))


def wanted_outputs(model, ids, sites):
    """Zero where a token of the role has a site, at every block that has; by hooks."""
    roles = {"start": ids == START_ID, "elsewhere": ids == DELIMITER_ID}
    hooks = []
    for layer, block in enumerate(model.model.layers):

        def hook(_module, _inputs, out, layer=layer):
            hidden = (out if isinstance(out, torch.Tensor) else out[0]).clone()
            for s in sites:
                if s.layer == layer:
                    hidden[..., s.channel][roles[s.role]] = 0.0
            return hidden if isinstance(out, torch.Tensor) else (hidden, *out[1:])

        hooks.append(block.register_forward_hook(hook))
    seen = outputs(model, ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("chosen", FILTERS.values(), ids=FILTERS)
def test_filtered_sites_on_a_model(grown, chosen, tmp_path):
    """The issue: the start's 8,570 was written over other tokens' 1,100."""
    model, sites = grown
    ids = models.tokens(3, 12, 5, 7)
    some = [s for s in sites if chosen(s)]
    assert 0 < len(some) < len(sites)
    filtered = bs.Sites(some, origin=sites.origin)
    filtered.save(tmp_path / "sites.safetensors")
    at = next(i for i, s in enumerate(sites) if chosen(s))
    ways = {
        "filtered": filtered,
        "a list": some,
        "loaded": bs.Sites.load(tmp_path / "sites.safetensors"),
        "concatenated": bs.Sites([*some[1:], *some[:1]]),
        "pickled": pickle.loads(pickle.dumps(filtered)),
    }
    wanted = wanted_outputs(model, ids, some)
    plain = outputs(model, ids)
    assert not all(map(torch.equal, wanted, plain))
    for way, given in ways.items():
        with bs.patched(model, "set_zero", sites=given, layers="all"):
            assert all(map(torch.equal, outputs(model, ids), wanted)), way
        with bs.patched(model, "set_mean", sites=given, layers="all"):
            for after, before in zip(outputs(model, ids), plain, strict=True):
                torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4, msg=way)
    one = sites[at : at + 1]
    with bs.patched(model, "set_zero", sites=one):
        assert all(map(torch.equal, outputs(model, ids), wanted_outputs(model, ids, one)))
    assert all(map(torch.equal, outputs(model, ids), plain))


def test_a_saved_patch_knows_what_was_left_out(grown, tmp_path):
    model, sites = grown
    ids = models.tokens(3, 12, 5, 7)
    starts = bs.Sites([s for s in sites if s.role == "start"], origin=sites.origin)
    with bs.patched(model, "set_zero", sites=starts, layers="all"):
        wanted = outputs(model, ids)
        bs.save_patch(model, tmp_path / "patch")
    fresh = bs.load_patch(stepped(GROWN), tmp_path / "patch")
    assert all(map(torch.equal, outputs(fresh, ids), wanted))


def test_a_saved_default_patch_changes_the_channels_that_it_changed(grown, tmp_path):
    """Channel 20 is left alone at block 3, where channel 30 grows."""
    model, sites = grown
    ids = models.tokens(3, 12, 5, 7)
    with bs.patched(model, "set_value", sites=sites, value=-321.0):
        assert {(s.layer, s.channel) for s in bs.patches(model)[0].sites} == {
            (1, 20),
            (1, 30),
            (3, 30),
        }
        wanted = outputs(model, ids)
        bs.save_patch(model, tmp_path / "patch")
    assert (wanted[3][:, 0, 20] == -321).all()  # as block 1 wrote it
    fresh = bs.load_patch(stepped(GROWN), tmp_path / "patch")
    assert all(map(torch.equal, outputs(fresh, ids), wanted))


@pytest.mark.parametrize("layers", ["first", "all"])
def test_the_control_of_filtered_sites_is_at_their_tokens_and_in_no_massive_channel(grown, layers):
    model, sites = grown
    ids = models.tokens(3, 12, 5, 7)
    starts = bs.Sites([s for s in sites if s.role == "start"], origin=sites.origin)
    plain = outputs(model, ids)
    ever = torch.zeros(64, dtype=torch.bool)
    for seed in range(40):
        with bs.patched(model, "zero_random", sites=starts, layers=layers, seed=seed):
            changed = outputs(model, ids)[1] != plain[1]
        assert not changed[ids != START_ID].any()
        assert changed.sum(-1).max() <= 2  # one for each channel; it may have been 0 before
        ever |= changed.any(0).any(0)
    assert ever.sum() > 20
    assert not ever[[20, 30]].any()


def test_compiled_in_one_graph():
    starts = bs.Sites([site(("start", 0)), OTHER])
    edit = WriteEdit(starts, dict.fromkeys(starts, 0.0))
    compiled = torch.compile(edit, fullgraph=True, backend="eager")
    assert edit.kept is not None
    assert torch.equal(compiled(hidden_state()), edit(hidden_state()))


def test_filtered_patches_stack_to_the_whole():
    """Zero at start tokens and zero at the others, in either order, is zero at all of them."""
    model = models.planted("llama")
    ids = models.tokens(rows=2)
    sites = bs.calibrate(model, ids)
    starts = bs.Sites([s for s in sites if s.role == "start"], origin=sites.origin)
    others = bs.Sites([s for s in sites if s.role != "start"], origin=sites.origin)
    assert len(starts)
    assert len(others)
    with bs.patched(model, "set_zero", sites=sites):
        wanted = output_of(model, ids)
    with bs.patched(model, "set_zero", sites=starts):
        partly = output_of(model, ids)
    assert not torch.equal(partly, wanted)
    value = {"sites": starts, "value": 0.0}
    with bs.patched(model, "set_value", **value), bs.patched(model, "set_zero", sites=others):
        assert torch.equal(output_of(model, ids), wanted)
    with bs.patched(model, "set_zero", sites=others), bs.patched(model, "set_value", **value):
        assert torch.equal(output_of(model, ids), wanted)

"""A diagnosis: what it says, its lists, its file."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

import biassurgery as bs
from biassurgery.errors import BadOption, FileError
from biassurgery.findings.diagnosed import (
    Float16,
    Inside,
    LinearRange,
    Measured,
    SinkUse,
    SuperWeight,
    Token,
)
from biassurgery.findings.files import read_tensors, write_tensors
from tests.models import planted, tokens

TOKEN = Token("start", 0, 1, "<s>")


def row(name: str, largest: float, ordinary: float) -> LinearRange:
    kinds = {"ordinary": ordinary, "start": largest}
    return LinearRange(name, 3, largest, ordinary, TOKEN, kinds, 2 * largest)


ROWS = (row("a.q", 5.0, 5.0), row("a.down", 3000.0, 9.0), row("b.down", 90.0, 9.0))
SITES = bs.Sites(
    [bs.Site(3, 507, "start", 24_000.0, count=8)],
    origin=bs.Origin("llama", 30, 576, ("start", "elsewhere"), source="a text"),
)
WEIGHT = SuperWeight("a.down", 3, 507, 12, 5.9, 18_000.0, 0.72, 1.9)
FOUND = bs.Diagnosis(
    ROWS,
    (WEIGHT, replace(WEIGHT, column=13, loss=None)),
    Float16({2: 60.0, 3: 24_000.0}, (Inside("a.down", "reads", 3000.0),)),
    SinkUse({3: 0.0, 4: 0.8}, 20.0, 200.0, 63),
    SITES,
    {"start": 8, "elsewhere": 0},
    8,
    1024,
    notes=("nothing else",),
    not_told=("a.experts",),
    measured=(Measured("static", "none", 87.0), Measured("static", "ignore", None)),
)


def test_the_verdict_comes_first_in_four_lines():
    lines = str(FOUND).splitlines()
    assert lines[:4] == list(FOUND.verdict)
    assert repr(FOUND) == str(FOUND)
    assert FOUND.verdict == (
        "massive activations: up to 24,000 (channel 507, from block 3 on), carried by 8 start"
        " tokens of 1,024",
        "int8: massive tokens rule what 2 of 3 linear layers read (a.down: 3,000, others 9.000)"
        " (1 more not looked at)",
        "float16: fits, with head room of 2.73 (largest 24,000) (1 more not looked at)",
        "first token: gets 40 % of the attention of later ones; evicted from the cache, perplexity"
        " 20.00 -> 200.0",
    )
    assert all(part in str(FOUND) for part in ("a.down[507, 12]", "+1.90 nats", "72 %", "87.00"))
    assert len(lines) < 50


def test_a_print_says_how_many_notes_it_leaves_out():
    lines = repr(replace(FOUND, notes=tuple(f"note {i}" for i in range(9)))).splitlines()
    shown = [line.strip() for line in lines if line.strip().startswith(("(note", "(and"))]
    assert shown == [*(f"(note {i})" for i in range(6)), "(and 3 more notes)"]


def test_advice_names_calls():
    text = "\n".join(FOUND.advice)
    for call in ("quantize_static(", '"pin"', "a.down[507, 12]", '"transplant"', "bs.SinkCache"):
        assert call in text
    assert "rescale" not in text
    small = replace(FOUND, sinks=replace(FOUND.sinks, evicted=20.1))
    assert "transplant" not in "\n".join(small.advice)
    unruled = replace(FOUND, linears=ROWS[:1])
    assert "quantize_static" not in "\n".join(unruled.advice)


def test_no_massive_activations_no_advice():
    healthy = replace(FOUND, sites=bs.Sites(), linears=ROWS[:1], super_weights=())
    assert healthy.verdict[0] == "massive activations: none in 1,024 tokens"
    assert healthy.advice == ()
    overflowing = replace(healthy, float16=Float16({1: 70_000.0}, ()))
    assert len(overflowing.advice) == 1  # whatever makes it so large
    assert "rescale" in overflowing.advice[0]


@pytest.mark.parametrize(
    ("largest", "factor"),
    [
        (0.0, 1.0),
        (32_752.0, 1.0),
        (32_753.0, 0.5),
        (65_504.0, 0.5),
        (104_000.0, 0.25),
        (9e6, 2**-9),
    ],
)
def test_the_mildest_factor_that_leaves_head_room_of_two(largest, factor):
    found = Float16({0: 1.0, 1: largest}, ())
    assert found.factor == factor
    assert found.largest * factor * 2 <= 65_504 or largest == 0
    assert factor == 1 or found.largest * factor * 4 > 65_504
    assert found.overflows == (1 if largest > 65_504 else None)


def test_what_overflows_inside_a_branch_is_not_helped_by_a_factor():
    inside = (Inside("a.down", "returns", 1e5), Inside("a.down", "reads", 9.0))
    found = replace(FOUND, float16=Float16({0: 1.0}, inside))
    assert found.verdict[2] == (
        "float16: overflows inside a branch; a.down returns 100,000 (1 more not looked at)"
    )
    assert "use bfloat16" in "\n".join(found.advice)


def test_ignore_lists():
    assert FOUND.ignore() == ["a.down", "b.down"]
    assert FOUND.ignore(ratio=10.1) == ["a.down"]
    assert FOUND.ignore(1) == ["a.q", "a.down", "b.down"]
    assert row("z", 3.0, 0.0).ratio == math.inf
    assert row("z", 0.0, 0.0).ratio == 1.0
    for ratio in (0.5, True, "all", float("nan"), None):
        with pytest.raises(BadOption, match="ratio"):
            FOUND.ignore(ratio)


def test_a_frame():
    pytest.importorskip("pandas")
    frame = FOUND.to_pandas()
    assert list(frame.index) == ["a.q", "a.down", "b.down"]
    assert frame.loc["b.down", "ratio"] == 10.0
    assert frame.loc["a.down", "token"] == "start '<s>' at 0"


@pytest.mark.parametrize("found", [FOUND, replace(FOUND, sinks=None, measured=())])
def test_a_file_holds_all_of_it(found, tmp_path):
    found.save(tmp_path / "found.safetensors")
    again = bs.Diagnosis.load(tmp_path / "found.safetensors")
    assert again == found
    assert again.verdict == found.verdict


def test_a_measured_one_in_a_file(tmp_path):
    found = bs.diagnose(planted("llama"), tokens(rows=4, length=40))
    found.save(tmp_path / "found.safetensors")
    assert bs.Diagnosis.load(tmp_path / "found.safetensors") == found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("linears", 0, "largest"), -1.0),
        (("linears", 0, "token", "position"), "0"),
        (("super_weights", 0, "row"), 1.5),
        (("float16", "layers", 0, 0), -1),
        (("sinks", "perplexity"), "20"),
        (("modality",), "sound"),
        (("carriers", "start"), None),
        (("measured", 0, "perplexity"), True),
        (("notes",), "one"),
    ],
)
def test_what_a_file_cannot_say(path, value, tmp_path):
    file = tmp_path / "found.safetensors"
    FOUND.save(file)
    _, metadata = read_tensors(file)
    header = json.loads(metadata[bs.Diagnosis.file_key])
    *way, last = path
    place = header
    for step in way:
        place = place[step]
    place[last] = value
    write_tensors(file, {}, {bs.Diagnosis.file_key: json.dumps(header)})
    with pytest.raises(FileError, match=r"does not hold a diagnosis that can be read|modality"):
        bs.Diagnosis.load(file)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(BadOption, match="not finite"):
        replace(FOUND, super_weights=(replace(WEIGHT, value=math.nan),))
    with pytest.raises(BadOption, match="not finite"):
        replace(FOUND, float16=Float16({0: math.inf}, ()))

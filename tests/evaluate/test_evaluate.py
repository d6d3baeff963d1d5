"""Perplexity against a loop over tokens, accuracy against a loop over images, and the intervention
table against patches by hand.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.data.loading import load_model
from biassurgery.data.windows import token_windows
from biassurgery.evaluate import Comparison, compare, perplexity, top1_accuracy
from biassurgery.modes import defaults
from tests.models import PAD_ID, START_ID, VOCAB, images, planted, planted_vit, tokens
from tests.state import untouched

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
STORIES = SHARED / "weights" / "stories260K_hf"
ABSENT = "the folder `shared` beside the repository, with trained weights and texts, is absent"


def loop(model: Any, rows: list[list[int]]) -> float:
    """Perplexity one sequence and one token at a time, in float64 from the model's logits on."""
    total = 0.0
    count = 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row]), use_cache=False).logits[0]
        for position in range(1, len(row)):
            scores = [float(score) for score in logits[position - 1]]
            largest = max(scores)
            total -= (
                scores[row[position]]
                - largest
                - math.log(sum(math.exp(score - largest) for score in scores))
            )
            count += 1
    return math.exp(total / count)


def stream(count: int, seed: int = 3) -> Tensor:
    return torch.randint(2, PAD_ID, (count,), generator=torch.Generator().manual_seed(seed))


class Letters:
    """A tokenizer of one token a character that would add a special token if it were asked to."""

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        return {
            "input_ids": [START_ID] * add_special_tokens + [ord(letter) - 95 for letter in text]
        }


# Perplexity


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_alibi"])
def test_batches_against_a_loop(family: str) -> None:
    model = planted(family)
    batches = [tokens(3, 20, seed=4), tokens(2, 11, seed=5)]
    rows = [row for batch in batches for row in batch.tolist()]
    assert perplexity(model, batches) == pytest.approx(loop(model, rows), rel=1e-6)


@pytest.mark.parametrize(
    ("count", "length", "bos", "cuts"),
    [
        (40, 10, None, [(0, 10), (10, 20), (20, 30), (30, 40)]),
        (47, 10, None, [(0, 10), (10, 20), (20, 30), (30, 40)]),
        (47, 10, START_ID, [(0, 9), (9, 18), (18, 27), (27, 36), (36, 45)]),
        (8, 10, None, [(0, 8)]),
        (8, 10, START_ID, [(0, 8)]),
        (9, 10, START_ID, [(0, 9)]),
        (10, 10, START_ID, [(0, 9)]),
        (1, 2, START_ID, [(0, 1)]),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_stream_is_cut_into_windows(
    count: int, length: int, bos: int | None, cuts: list[tuple[int, int]], batch_size: int
) -> None:
    model = planted("llama")
    ids = stream(count)
    rows = [([] if bos is None else [bos]) + ids[start:stop].tolist() for start, stop in cuts]
    assert token_windows(model, ids, length, bos).tolist() == rows
    expected = loop(model, rows)
    assert perplexity(model, ids, length=length, bos=bos, batch_size=batch_size) == pytest.approx(
        expected, rel=1e-6
    )
    assert perplexity(model, ids[None].int(), length=length, bos=bos) == pytest.approx(
        expected, rel=1e-6
    )


def test_the_default_length_is_the_models_context_but_at_most_2048() -> None:
    model = planted("llama")
    assert token_windows(model, stream(600), None, None).shape == (2, 256)
    model.config.max_position_embeddings = 8192
    assert token_windows(model, stream(5000), None, None).shape == (2, 2048)
    assert token_windows(nn.Linear(1, 1), stream(5000), None, 5).shape == (2, 2048)


def test_a_text_gets_no_special_tokens_but_bos() -> None:
    model = planted("llama")
    text = "themassiveactivationsofalanguagemodel"
    ids = [ord(letter) - 95 for letter in text]
    for bos, front in ((None, []), (START_ID, [START_ID])):
        assert perplexity(model, text, tokenizer=Letters(), bos=bos) == pytest.approx(
            loop(model, [front + ids]), rel=1e-6
        )
    assert perplexity(model, text, tokenizer=Letters()) != pytest.approx(
        perplexity(model, text, tokenizer=Letters(), bos=START_ID)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_alibi", "mpt", "opt", "gpt_neox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(family: str, side: str) -> None:
    model = planted(family)
    rows = [tokens(1, length, seed=length)[0].tolist() for length in (16, 10, 12)]
    pads = [[PAD_ID] * (16 - len(row)) for row in rows]
    padded = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads)]
    mask = [
        [0] * len(pad) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(pad)
        for row, pad in zip(rows, pads)
    ]
    batch = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
    expected = loop(model, rows)
    assert perplexity(model, [batch]) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, batch) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, batch["input_ids"]) != pytest.approx(
        expected, rel=5e-5
    )  # the mask matters


def test_labels_take_tokens_out() -> None:
    model = planted("llama")
    ids = tokens(2, 12, seed=8)
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        expected = math.exp(model(ids, labels=labels).loss.double().item())
    assert perplexity(model, [{"input_ids": ids, "labels": labels}]) == pytest.approx(
        expected, rel=1e-5
    )
    assert perplexity(model, [ids]) != pytest.approx(expected, rel=1e-3)


def test_sums_over_tokens_not_over_batches() -> None:
    model = planted("llama")
    long = tokens(4, 24, seed=1)
    short = tokens(1, 3, seed=2, delimiter_at=None)
    together = perplexity(model, [long, short])
    parts = [math.log(perplexity(model, [part])) for part in (long, short)]
    assert math.log(together) == pytest.approx((parts[0] * 92 + parts[1] * 2) / 94, rel=1e-9)
    assert math.log(together) != pytest.approx(sum(parts) / 2, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_float32_whatever_the_model_is(dtype: torch.dtype) -> None:
    model = planted("llama", dtype)
    ids = tokens(2, 20, seed=6)
    assert perplexity(model, [ids]) == pytest.approx(
        loop(model, ids.tolist()), rel=1e-3
    )  # row by row differs in the logits' last bit
    row = ids[:1]
    assert perplexity(model, [row]) == pytest.approx(loop(model, row.tolist()), rel=1e-6)


def test_a_training_model_is_evaluated_without_dropout_and_gets_its_modes_back() -> None:
    model = planted("gpt2")
    ids = tokens(2, 12)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    expected = loop(model, ids.tolist())
    model.train()
    model.transformer.h[0].eval()
    with untouched(model):
        assert perplexity(model, [ids]) == pytest.approx(expected, rel=1e-6)


def test_no_gradients_and_no_cache() -> None:
    model = planted("llama")
    seen = []

    def note(_: Any, __: Any, arguments: dict[str, Any], output: Any) -> None:
        seen.append((arguments["use_cache"], output.past_key_values, output.logits.requires_grad))

    hook = model.register_forward_hook(note, with_kwargs=True)
    perplexity(model, [tokens(1, 12)])
    hook.remove()
    assert seen == [(False, None, False)]


def test_a_compiled_model_runs_compiled() -> None:
    model = planted("llama")
    ids = tokens(2, 12)
    calls = []

    def backend(graph: Any, _: Any) -> Any:
        calls.append(graph)
        return graph.forward

    assert perplexity(torch.compile(model, backend=backend), [ids]) == pytest.approx(
        loop(model, ids.tolist()), rel=1e-6
    )  # type: ignore[arg-type]
    assert calls


def with_bias(value: float) -> Any:
    """A model whose head adds `value` to the logit of token 5."""
    model = planted("llama")
    weight = model.lm_head.weight.data
    model.lm_head = nn.Linear(weight.shape[1], weight.shape[0])
    model.lm_head.weight.data = weight
    model.lm_head.bias.data = torch.zeros(VOCAB).index_fill(0, torch.tensor(5), value)
    return model


def test_an_impossible_token_gives_infinity() -> None:
    assert perplexity(with_bias(-math.inf), torch.tensor([0, 9, 5, 7])) == math.inf
    assert (
        perplexity(with_bias(1e5), torch.tensor([0, 9, 8, 7])) == math.inf
    )  # finite loss, but beyond float64 as a perplexity
    assert math.isfinite(perplexity(with_bias(-math.inf), torch.tensor([0, 9, 8, 7])))


IDS = torch.tensor([0, 9, 5, 7])


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ("", {"tokenizer": Letters()}, bs.BadBatch, "no tokens"),
        ("abc", {}, bs.BadOption, "tokenizer: None"),
        (torch.tensor([]), {}, bs.BadBatch, "no tokens"),
        (torch.zeros(0, dtype=torch.int64), {"bos": 0}, bs.BadBatch, "no tokens"),
        (torch.tensor([3]), {}, bs.BadBatch, "no token to predict"),
        ([], {}, bs.BadBatch, "there are none"),
        ([torch.tensor([[3], [4]])], {}, bs.BadBatch, "no token to predict"),
        ([torch.zeros(0, 4, dtype=torch.int64)], {}, bs.BadBatch, "is empty"),
        ([torch.tensor([1, 2, 3])], {}, bs.BadBatch, r"give \(B, T\)"),
        (
            [{"input_ids": IDS[None], "attention_mask": torch.zeros(1, 4)}],
            {},
            bs.BadBatch,
            "all padding",
        ),
        (
            [{"input_ids": IDS[None], "attention_mask": torch.tensor([[0, 1, 0, 1]])}],
            {},
            bs.BadBatch,
            "no token to predict",
        ),
        ([{"inputs_embeds": torch.zeros(1, 4, 64)}], {}, bs.BadBatch, "input_ids or labels"),
        (torch.tensor([0.5, 1.5]), {}, bs.BadBatch, "torch.float32"),
        (torch.tensor([1, VOCAB]), {}, bs.BadBatch, f"token {VOCAB} is not among the {VOCAB}"),
        (torch.tensor([1, -1]), {}, bs.BadBatch, "token -1"),
        (IDS, {"bos": VOCAB + 3}, bs.BadBatch, f"token {VOCAB + 3}"),
        (IDS, {"bos": -1}, bs.BadOption, "bos: -1"),
        (IDS, {"bos": True}, bs.BadOption, "bos: True"),
        (IDS, {"length": 1}, bs.BadOption, "length: 1"),
        (IDS, {"length": 0}, bs.BadOption, "length: 0"),
        (IDS, {"length": 2.5}, bs.BadOption, "length: 2.5"),
        (IDS, {"batch_size": 0}, bs.BadOption, "batch_size: 0"),
        ([IDS[None]], {"length": 4}, bs.BadOption, "data are batches"),
        ([IDS[None]], {"bos": 0}, bs.BadOption, "data are batches"),
        (5, {}, bs.BadBatch, "int is not iterable"),
    ],
)
def test_refusals(data: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = planted("llama")
    with untouched(model), pytest.raises(error, match=message):
        perplexity(model, data, **options)


@pytest.mark.parametrize(
    ("family", "allowed"),
    [("gpt2", False), ("opt", False), ("llama", True), ("falcon_alibi", True)],
)
def test_a_window_beyond_learned_positions_is_refused(family: str, allowed: bool) -> None:
    model = planted(family)
    ids = stream(600)
    if allowed:
        assert perplexity(model, ids, length=600) == pytest.approx(
            loop(model, [ids.tolist()]), rel=1e-5
        )
    else:
        assert perplexity(model, ids[:256], length=256) > 1
        with pytest.raises(bs.BadOption, match="length: 600 is more than the 256 positions"):
            perplexity(model, ids, length=600)


def test_nan_is_refused() -> None:
    model = with_bias(math.nan)
    with untouched(model), pytest.raises(bs.NonFiniteActivation, match="NaN at 3 of 3 tokens"):
        perplexity(model, IDS)


def test_models_that_have_no_perplexity() -> None:
    with pytest.raises(bs.UnsupportedModel, match=r"no logits.*AutoModelForCausalLM"):
        perplexity(planted("llama").model, IDS)
    with pytest.raises(bs.UnsupportedModel, match="top1_accuracy"):
        perplexity(planted_vit(), IDS)
    with pytest.raises(bs.UnsupportedModel, match="no adapter"):
        perplexity(nn.Linear(2, 2), IDS)


@pytest.mark.skipif(not STORIES.is_dir(), reason=ABSENT)
def test_a_trained_model_that_has_no_massive_activations() -> None:
    loaded = load_model(str(STORIES), device="cpu")
    model = loaded.model
    tokenizer = loaded.tokenizer
    text = (SHARED / "text" / "tinystories_200k.txt").read_text(encoding="utf-8")
    stories = re.split(r"\n\n(?=Once upon a time|One day, )", text)[1:31]
    rows = [tokenizer(story)["input_ids"][:512] for story in stories]
    assert all(row[0] == tokenizer.bos_token_id for row in rows)
    value = perplexity(model, [torch.tensor([row]) for row in rows])
    assert value == pytest.approx(loop(model, rows[:30]), rel=1e-6)
    assert math.log(value) == pytest.approx(
        1.315, abs=0.05
    )  # nats a token, as published for whole stories behind BOS

    windows = [
        [1, *tokenizer(text[:20_000], add_special_tokens=False)["input_ids"][at : at + 127]]
        for at in range(0, 20 * 127, 127)
    ]
    ids = torch.tensor(
        tokenizer(text[:20_000], add_special_tokens=False)["input_ids"][: 20 * 127 + 50]
    )
    assert perplexity(model, ids, length=128, bos=1) == pytest.approx(
        loop(model, windows), rel=1e-6
    )

    found = bs.detect(model, [torch.tensor([row[:60]]) for row in rows if len(row) >= 60])
    assert len(found.sites) == 0
    assert max(layer.ratio for layer in found.layers) < 30
    with pytest.raises(bs.NoSites, match="empty"):
        compare(model, lambda m: perplexity(m, ids), sites=found.sites)


# Top-1 accuracy


def labelled(model: Any, rows: int = 6) -> tuple[Tensor, Tensor]:
    """Images with labels of which every second one is what the model says."""
    pixels = images(rows)
    with torch.no_grad():
        said = torch.tensor([int(model(image[None])[0].argmax()) for image in pixels])
    return pixels, torch.where(torch.arange(rows) % 2 == 0, said, (said + 1) % 5)


def test_accuracy_counts_images_not_batches() -> None:
    model = planted_vit()
    pixels, labels = labelled(model)
    assert top1_accuracy(model, [(pixels, labels)]) == 0.5
    assert top1_accuracy(model, [(pixels[:1], labels[:1]), (pixels[1:], labels[1:])]) == 0.5
    assert (
        top1_accuracy(
            model, [(pixels[::2], labels[::2]), ({"pixel_values": pixels[1:2]}, labels[1:2])]
        )
        == 0.75
    )
    assert top1_accuracy(model, iter([[pixels[1::2], labels[1::2].int()]])) == 0.0


def test_accuracy_leaves_the_model_as_it_was() -> None:
    model = planted_vit(proj_drop_rate=0.5)
    pixels, labels = labelled(model)
    model.train()
    with untouched(model):
        assert top1_accuracy(model, [(pixels, labels)]) == 0.5


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are none"),
        ([images(2)], "a batch is a Tensor; give pairs"),
        ((images(2), torch.tensor([0, 1])), "a batch is a Tensor; give pairs"),
        ([(images(2), [0, 1])], "give pairs"),
        ([(images(2), torch.tensor([0]))], "one class index"),
        ([(images(2), torch.tensor([0.0, 1.0]))], "one class index"),
        (
            [(images(2), torch.tensor([0, 5]))],
            "labels reach from 0 to 5, but the model has 5 classes",
        ),
        ([(images(2), torch.tensor([-1, 0]))], "labels reach from -1"),
        ([(images(2)[:0], torch.zeros(0, dtype=torch.int64))], "is empty"),
        ([(images(2)[0], torch.tensor([0]))], "pixel_values"),
    ],
)
def test_accuracy_refuses(batches: Any, message: str) -> None:
    model = planted_vit()
    with untouched(model), pytest.raises(bs.BadBatch, match=message):
        top1_accuracy(model, batches)


def test_models_that_have_no_accuracy() -> None:
    pairs = [(images(2), torch.tensor([0, 1]))]
    with pytest.raises(bs.UnsupportedModel, match="perplexity"):
        top1_accuracy(planted("llama"), pairs)
    headless = planted_vit()
    headless.reset_classifier(0)
    with pytest.raises(bs.UnsupportedModel, match="num_classes=0"):
        top1_accuracy(headless, pairs)
    broken = planted_vit()
    broken.head.bias.data[0] = math.nan
    with pytest.raises(bs.NonFiniteActivation, match="NaN"):
        top1_accuracy(broken, pairs)


# The intervention table


@pytest.fixture(scope="module")
def found() -> bs.Sites:
    return bs.calibrate(planted("llama"), [tokens(4, 24, seed=1)])


def measure(model: Any) -> float:
    return perplexity(model, [tokens(4, 24, seed=7)])


def test_every_mode_as_if_patched_by_hand(found: bs.Sites) -> None:
    model = planted("llama")
    by_hand = {"original": measure(model)}
    for mode in ("set_zero", "set_mean", "zero_random"):
        bs.patch_model(model, mode, sites=found)
        by_hand[mode] = measure(model)
        bs.unpatch_model(model)
    with untouched(model, tokens()):
        table = compare(model, measure, [None, "set_zero", "set_mean", "zero_random"], sites=found)
    assert [row.label for row in table.rows] == list(by_hand)
    assert {label: table[label] for label in by_hand} == by_hand
    assert table[None] == by_hand["original"]
    assert table[bs.SetZero()] == by_hand["set_zero"]
    assert table["set_mean"] == pytest.approx(table[None], rel=1e-4)
    assert abs(math.log(table["set_zero"] / table[None])) > 0.02
    frame = table.to_pandas()
    assert frame["value"].to_dict() == by_hand
    assert frame.index.name == "mode"


def test_several_numbers_and_mode_objects(found: bs.Sites) -> None:
    model = planted("llama")
    layer = found.layers()[0]

    def evaluate(host: Any) -> dict[str, Any]:
        patches = bs.patches(host)
        return {
            "patches": len(patches),
            "layers": torch.tensor(len(patches[0].layers) if patches else 0),
        }

    modes = ["set_mean", bs.SetValue(5.0), bs.SetValue(6.0), bs.Noise(), None]
    table = compare(model, evaluate, modes, sites=found, layers="all")
    assert [row.label for row in table.rows] == [
        "set_mean",
        "set_value(value=5.0)",
        "set_value(value=6.0)",
        "noise",
        "original",
    ]
    every = {"patches": 1.0, "layers": float(len(found.layers()))}
    assert [row.values for row in table.rows] == [every] * 4 + [{"patches": 0.0, "layers": 0.0}]
    assert table[bs.SetValue(6.0)] == every
    assert table["set_value(value=5.0)"] == every
    with pytest.raises(bs.BadOption, match=r"'set_value' names 2 rows.*set_value\(value=5.0\)"):
        table["set_value"]
    with pytest.raises(bs.BadOption, match="'shuffle' names 0 rows"):
        table["shuffle"]
    assert (
        compare(model, evaluate, ["set_mean"], sites=found, layers=[layer])["set_mean"]["layers"]
        == 1
    )


def test_options_go_to_the_modes_that_have_them(found: bs.Sites) -> None:
    model = planted("llama")
    seen = []

    def evaluate(host: Any) -> float:
        seen.extend(patch.mode for patch in bs.patches(host))
        return 0.0

    table = compare(
        model, evaluate, ["set_zero", "set_value", "noise"], sites=found, value=3.0, scale=2.0
    )
    assert seen == [bs.SetZero(), bs.SetValue(3.0), bs.Noise(2.0)]
    assert table["set_value"] == 0.0
    for options, modes in (
        ({"value": 3.0}, [None, "set_zero"]),
        ({"seed": 1}, ["set_zero", bs.ZeroRandom()]),
    ):
        with pytest.raises(
            bs.BadOption, match=f"no mode given by name has '{next(iter(options))}'"
        ):
            compare(model, evaluate, modes, sites=found, **options)


def test_patches_that_are_there_stay(found: bs.Sites) -> None:
    model = planted("llama")
    bs.patch_model(model, "set_mean", sites=found)
    table = compare(model, lambda host: len(bs.patches(host)), [None, "set_zero"], sites=found)
    assert (table[None], table["set_zero"]) == (1, 2)
    assert [patch.mode for patch in bs.patches(model)] == [bs.SetMean()]


def test_an_exception_leaves_the_model_as_it_was(found: bs.Sites) -> None:
    model = planted("llama")

    def evaluate(host: Any) -> float:
        if bs.patches(host):
            raise RuntimeError("out of memory")
        return 1.0

    with untouched(model, tokens()), pytest.raises(RuntimeError, match="out of memory"):
        compare(model, evaluate, sites=found)


@pytest.mark.parametrize(
    ("modes", "options", "error", "message"),
    [
        ([None, "set_maen"], {}, bs.UnknownMode, "set_maen"),
        ([None, "set_value"], {}, bs.BadOption, "needs value="),
        ([None, "set_mean"], {"layers": [99]}, bs.LayerOutOfRange, "99"),
        ([None, "set_mean", "set_mean"], {}, bs.BadOption, "'set_mean' is there twice"),
        ([None, "original"], {}, bs.BadOption, "'original' is there twice"),
        ([], {}, bs.BadOption, "modes: "),
        ("set_mean", {}, bs.BadOption, "give a list"),
    ],
)
def test_what_cannot_be_applied_is_refused_before_anything_is_evaluated(
    found: bs.Sites, modes: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = planted("llama")
    calls = []
    with untouched(model), pytest.raises(error, match=message):
        compare(model, calls.append, modes, sites=found, **options)  # type: ignore[arg-type]
    assert calls == []


@pytest.mark.parametrize(
    ("result", "message"),
    [("good", "number"), (None, "number"), ({}, "empty dict"), (torch.zeros(2), "number")],
)
def test_evaluate_must_return_numbers(found: bs.Sites, result: Any, message: str) -> None:
    with pytest.raises(bs.BadOption, match=message):
        compare(planted("llama"), lambda _: result, sites=found)


def test_evaluate_must_return_the_same_names(found: bs.Sites) -> None:
    with pytest.raises(bs.BadOption, match="same names"):
        compare(planted("llama"), lambda host: {f"value_{len(bs.patches(host))}": 1.0}, sites=found)


def test_sites_that_are_not_given_are_looked_up_once(
    found: bs.Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def look_up(model: Any, host: Any) -> bs.Sites:
        calls.append(model)
        return found

    monkeypatch.setattr(defaults, "default_sites", look_up)
    model = planted("llama")
    table = compare(model, measure, [None, "set_zero", "set_mean"])
    assert calls == [model]
    assert table["set_zero"] == compare(model, measure, ["set_zero"], sites=found)["set_zero"]
    compare(model, measure, [None, bs.SetValue(0.0, channels=(1,), positions=(0,))], layers=[0])
    assert len(calls) == 1  # nothing there needs sites


def test_the_table_prints(found: bs.Sites) -> None:
    table: Comparison = compare(
        planted("llama"),
        lambda host: {"perplexity": math.inf if bs.patches(host) else 12.5, "top1": 0.8125},
        [None, "set_zero"],
        sites=found,
    )
    lines = [line.split() for line in str(table).splitlines() if line.split()]
    assert ["mode", "perplexity", "top1"] in lines
    assert ["original", "12.50", "81.25", "%"] in lines
    assert ["set_zero", "inf", "81.25", "%"] in lines

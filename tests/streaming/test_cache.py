"""SinkCache against dense attention written out by hand, in float64 and over several times the
window.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

import biassurgery as bs
from biassurgery.streaming.cache import SinkCache
from biassurgery.streaming.perplexity import streaming_perplexity
from biassurgery.streaming.rotation import Rotation
from biassurgery.surgery.positions import ShiftEdit
from tests.models import PAD_ID, planted, planted_vit, tokens

OLD = transformers.__version__.startswith("4.")
ROTARY = ("llama", "mistral", "mixtral", "falcon", "phi", "gpt_neox")
MOVABLE = ROTARY if OLD else (*ROTARY, "mpt")
PATHS = {"gpt_neox": "gpt_neox", "falcon": "transformer", "mpt": "transformer"}
LISTS = {"falcon": "h", "mpt": "blocks"}
WINDOW = 12
SINKS = 4


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def random_llama(seed: int = 0, **changes: Any) -> Any:
    """Two layers, grouped keys, in float64: nothing is planted, so that every token weighs."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "initializer_range": 0.5,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 49,
        "pad_token_id": 48,
    }
    return (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**options | changes)).eval().double()
    )


def words(rows: int, length: int, seed: int = 3, vocabulary: int = 48) -> Tensor:
    return torch.randint(
        1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def one_layer(family: str) -> Any:
    """A planted model with its first block only: its keys depend on their token alone, so a fresh
    run on the kept tokens is the truth.
    """
    model = planted(family)
    parent = model.get_submodule(PATHS.get(family, "model"))
    name = LISTS.get(family, "layers")
    setattr(parent, name, nn.ModuleList(list(getattr(parent, name))[:1]))
    setattr(model.config, "n_layers" if family == "mpt" else "num_hidden_layers", 1)
    return model


def stream(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """(B, T, V) logits, token by token."""
    logits = [
        model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
        for at in range(ids.shape[1])
    ]
    return torch.cat(logits, 1) if logits else torch.zeros(len(ids), 0, 1)


def kept(ids: Tensor, at: int, window: int, sinks: int) -> Tensor:
    """The tokens that the one at `at` sees."""
    seen = ids[:, : at + 1]
    return seen if at < window else torch.cat((seen[:, :sinks], seen[:, sinks - window :]), 1)


def by_hand(model: Any, ids: Tensor, window: int, sinks: int) -> Tensor:
    """(B, T, V) logits of a llama: unrotated keys in lists, evicted by hand, rotated by their place
    in the list; dense, float64.
    """
    body = model.model
    config = model.config
    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)

    def norm(weight: Tensor, x: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def rotated(x: Tensor, position: int) -> Tensor:
        pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(
            torch.ones_like(frequencies), position * frequencies
        )
        return torch.cat((pairs.real, pairs.imag), -1)

    cached: list[list[tuple[Tensor, Tensor]]] = [[] for _ in body.layers]
    logits = []
    for token in ids.T:
        hidden = body.embed_tokens(token)
        for layer, pairs in zip(body.layers, cached):
            attention = layer.self_attn
            x = norm(layer.input_layernorm.weight, hidden)
            query = attention.q_proj(x).view(-1, heads, size)
            pairs.append(
                (
                    attention.k_proj(x).view(-1, groups, size),
                    attention.v_proj(x).view(-1, groups, size),
                )
            )
            if len(pairs) > window:
                del pairs[sinks]
            keys = torch.stack(
                [rotated(key, place) for place, (key, _) in enumerate(pairs)], 2
            ).repeat_interleave(heads // groups, 1)
            values = torch.stack([value for _, value in pairs], 2).repeat_interleave(
                heads // groups, 1
            )
            scores = torch.einsum(
                "bhd,bhtd->bht", rotated(query, len(pairs) - 1), keys
            ) / math.sqrt(size)
            hidden = hidden + attention.o_proj(
                torch.einsum("bht,bhtd->bhd", scores.softmax(-1), values).flatten(1)
            )
            x = norm(layer.post_attention_layernorm.weight, hidden)
            hidden = hidden + layer.mlp.down_proj(
                F.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
            )
        logits.append(model.lm_head(norm(body.norm.weight, hidden)))
    return torch.stack(logits, 1)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# Numbers


@pytest.mark.parametrize("sinks", [0, 1, SINKS])
def test_a_stream_as_computed_by_hand(sinks: int) -> None:
    model = random_llama()
    ids = words(3, 6 * WINDOW)
    cache = SinkCache(model, WINDOW, sinks, attention_mask=torch.ones(3, 1))
    truth = by_hand(model, ids, WINDOW, sinks)
    found = stream(model, ids, cache)
    assert off(found, truth) < 1e-5
    whole = model(ids).logits
    assert off(found[:, :WINDOW], whole[:, :WINDOW]) < 1e-6
    assert off(found[:, WINDOW:], whole[:, WINDOW:]) > 0.05  # eviction matters
    assert (
        off(found[:, WINDOW:], by_hand(model, ids, WINDOW, sinks + 1)[:, WINDOW:]) > 0.05
    )  # and so does what is kept


@pytest.mark.parametrize("family", MOVABLE)
@pytest.mark.parametrize("sinks", [0, SINKS])
def test_one_layer_is_a_fresh_run_on_the_kept_tokens(family: str, sinks: int) -> None:
    model = one_layer(family)
    ids = tokens(2, 3 * WINDOW)
    found = stream(model, ids, SinkCache(model, WINDOW, sinks, attention_mask=torch.ones(2, 1)))
    for at in (0, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 3 * WINDOW - 1):
        assert off(found[:, at], model(kept(ids, at, WINDOW, sinks)).logits[:, -1]) < 1e-4, at


@pytest.mark.parametrize("family", MOVABLE)
def test_until_the_first_eviction_all_is_as_with_a_dynamic_cache(family: str) -> None:
    model = planted(family)
    ids = tokens(2, WINDOW)
    ours = SinkCache(model, WINDOW, attention_mask=torch.ones(2, 1))
    theirs = DynamicCache()
    for chunk in ids.split([5, 4, 1, 1, 1], 1):
        wanted = model(chunk, past_key_values=theirs, use_cache=True).logits
        assert torch.equal(model(chunk, past_key_values=ours, use_cache=True).logits, wanted)
    assert ours.get_seq_length() == WINDOW


def test_a_prompt_in_one_chunk_is_the_prompt_token_by_token() -> None:
    model = random_llama()
    ids = words(1, 3 * WINDOW)
    cache = SinkCache(model, WINDOW)
    first = model(ids[:, :WINDOW], past_key_values=cache).logits
    found = torch.cat((first, stream(model, ids[:, WINDOW:], cache)), 1)
    assert off(found, stream(model, ids, SinkCache(model, WINDOW))) < 1e-6


def test_nothing_drifts() -> None:
    model = one_layer("llama")
    ids = tokens(1, 1500, delimiter_at=None)
    cache = SinkCache(model, 6, 2)
    for at in range(1500):
        last = model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1]
    assert off(last, model(kept(ids, 1499, 6, 2)).logits[:, -1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = random_llama().to(dtype)
    ids = words(1, 5 * WINDOW)
    cache = SinkCache(model, WINDOW)
    assert (
        off(stream(model, ids, cache).double(), by_hand(model.double(), ids, WINDOW, SINKS)) < 0.2
    )
    assert cache.layers[0].keys is not None
    assert cache.layers[0].keys.dtype == dtype


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "falcon"])
def test_attention_implementations(family: str, implementation: str) -> None:
    model = planted(family)
    ids = tokens(1, 3 * WINDOW)
    wanted = stream(model, ids, SinkCache(model, WINDOW))
    other = type(model)._from_config(model.config, attn_implementation=implementation).eval()
    other.load_state_dict(model.state_dict())
    assert off(stream(other, ids, SinkCache(other, WINDOW)), wanted) < 1e-4


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_scaled_rotations(rope: str) -> None:
    scaling: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "yarn":
        scaling["original_max_position_embeddings"] = 64
    model = random_llama(
        num_hidden_layers=1, **({"rope_scaling": scaling} if OLD else {"rope_parameters": scaling})
    )
    ids = words(1, 3 * WINDOW)
    found = stream(model, ids, SinkCache(model, WINDOW))
    assert off(found[:, -1], model(kept(ids, 3 * WINDOW - 1, WINDOW, SINKS)).logits[:, -1]) < 1e-5
    assert (
        off(found[:, -1], by_hand(model, ids, WINDOW, SINKS)[:, -1]) > 1e-3
    )  # the scaling has an effect


def test_rotations_of_neighbouring_channels() -> None:
    torch.manual_seed(0)
    config = transformers.CohereConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.5,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=49,
        pad_token_id=48,
    )
    model: Any = transformers.CohereForCausalLM(config).eval().double()
    ids = words(1, 3 * WINDOW)
    cache = SinkCache(model, WINDOW)
    assert cache.layers[0].rotation.interleaved
    found = stream(model, ids, cache)
    assert off(found[:, -1], model(kept(ids, 3 * WINDOW - 1, WINDOW, SINKS)).logits[:, -1]) < 1e-5


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_is_a_product_of_complex_numbers(interleaved: bool) -> None:
    keys = torch.randn(2, 3, 5, 10, dtype=torch.float64)
    frequencies = torch.tensor([1.0, 0.3, 0.01])
    found = Rotation(frequencies, interleaved)(keys, (3, 10**6))
    for row, by in enumerate((3, 10**6)):
        a, b = (
            (keys[row, ..., 0:6:2], keys[row, ..., 1:6:2])
            if interleaved
            else (keys[row, ..., :3], keys[row, ..., 3:6])
        )
        angles = frequencies.double() * by
        turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
        want = (
            torch.view_as_real(turned).flatten(-2)
            if interleaved
            else torch.cat((turned.real, turned.imag), -1)
        )
        torch.testing.assert_close(found[row], torch.cat((want, keys[row, ..., 6:]), -1))


def test_positions_may_be_shifted() -> None:
    model = random_llama()
    ids = words(1, 3 * WINDOW)
    cache = SinkCache(model, WINDOW)
    wanted = stream(model, ids, SinkCache(model, WINDOW))
    edit = ShiftEdit(1, ("position_ids", 1))
    edit.attach(model.model.rotary_emb)
    assert off(stream(model, ids, cache), wanted) < 1e-5
    assert off(stream(model, ids, SinkCache(model, WINDOW)), wanted) < 1e-5


@pytest.mark.parametrize("transplant", [False, True])
def test_a_cache_for_a_model_with_explicit_biases(transplant: bool) -> None:
    model = planted("llama")
    ids = tokens(1, WINDOW)
    key_values = bs.calibrate_key_values(model, [tokens()])
    bs.patch_model(
        model, bs.Transplant(key_values) if transplant else bs.AttentionBias("kv", "normal")
    )
    theirs = stream(model, ids[:, 1:], DynamicCache())
    assert torch.equal(stream(model, ids[:, 1:], SinkCache(model, WINDOW)), theirs)


# Rows of a batch


def padded(ids: Tensor, padding: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows of the same length, of which each begins with so much padding, and their mask."""
    rows = [torch.cat((torch.full((p,), 48), row[: len(row) - p])) for p, row in zip(padding, ids)]
    return torch.stack(rows), torch.stack([torch.arange(ids.shape[1]) >= p for p in padding]).long()


@pytest.mark.parametrize("padding", [(0, 3, 7), (5, 5, 5), (8, 1, 0)])
def test_padded_rows_are_those_rows_alone(padding: tuple[int, ...]) -> None:
    model = random_llama()
    prompt = 10
    rest = 40
    ids, mask = padded(words(3, prompt + rest), padding)
    cache = SinkCache(model, WINDOW, attention_mask=mask[:, :prompt])
    found = [model(ids[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache).logits]
    found += [
        model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache).logits
        for at in range(prompt, prompt + rest)
    ]
    for row, p in enumerate(padding):
        alone = stream(model, ids[row : row + 1, p:], SinkCache(model, WINDOW))
        together = torch.cat(found, 1)[row : row + 1, p:]
        assert off(together, alone) < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "phi", "gpt_neox"])
def test_generate_with_padding(family: str) -> None:
    model = planted(family)
    ids = tokens(3, 10)
    padding = (0, 2, 5)
    rows = torch.stack(
        [torch.cat((torch.full((p,), PAD_ID), row[: 10 - p])) for p, row in zip(padding, ids)]
    )
    mask = (rows != PAD_ID).long()
    options: dict[str, Any] = {
        "max_new_tokens": 30,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": PAD_ID,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    together = model.generate(
        rows,
        attention_mask=mask,
        past_key_values=SinkCache(model, WINDOW, attention_mask=mask),
        **options,
    )
    for row, p in enumerate(padding):
        alone = model.generate(
            rows[row : row + 1, p:], past_key_values=SinkCache(model, WINDOW), **options
        )
        assert torch.equal(together.sequences[row, p:], alone.sequences[0])
        assert off(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0]) < 1e-3


def test_rows_can_change_places() -> None:
    model = random_llama()
    ids, mask = padded(words(3, 45), (0, 3, 7))
    for taken in (9, 14, 30):  # before eviction, while there is padding, and later
        caches = [SinkCache(model, WINDOW, attention_mask=mask) for _ in range(3)]
        for cache in caches:
            for at in range(taken):
                model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache)
        order = torch.tensor([2, 0, 0])
        caches[0].reorder_cache(order)
        caches[1].batch_select_indices(order)
        caches[2].batch_repeat_interleave(2)
        plain = SinkCache(model, WINDOW, attention_mask=mask)
        for at in range(taken + 12):
            wanted = model(
                ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=plain
            ).logits
            if at >= taken:
                now = ids[:, at : at + 1]
                then = mask[:, : at + 1]
                for cache in caches[:2]:
                    assert (
                        off(
                            model(
                                now[order], attention_mask=then[order], past_key_values=cache
                            ).logits,
                            wanted[order],
                        )
                        < 1e-6
                    )
                twice = model(
                    now.repeat_interleave(2, 0),
                    attention_mask=then.repeat_interleave(2, 0),
                    past_key_values=caches[2],
                )
                assert off(twice.logits, wanted.repeat_interleave(2, 0)) < 1e-6


# generate


@pytest.mark.parametrize("family", MOVABLE)
def test_greedy_generation_is_the_loop_by_hand(family: str) -> None:
    model = planted(family)
    ids = tokens(1, 8, delimiter_at=5)
    found = model.generate(
        ids,
        past_key_values=SinkCache(model, WINDOW),
        max_new_tokens=30,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    wanted = stream(model, found.sequences[:, :-1], SinkCache(model, WINDOW))[0, 7:]
    assert off(torch.cat(list(found.logits)), wanted) < 1e-4
    assert torch.equal(found.sequences[0, 8:], wanted.argmax(-1))


def test_sampling_and_a_prompt_beyond_the_window() -> None:
    model = random_llama()
    ids = words(1, 30)
    options: dict[str, Any] = {
        "max_new_tokens": 10,
        "do_sample": True,
        "eos_token_id": None,
        "use_cache": True,
    }
    torch.manual_seed(1)
    found = model.generate(
        ids, past_key_values=SinkCache(model, WINDOW), prefill_chunk_size=1, **options
    )
    cache = SinkCache(model, WINDOW)
    stream(model, ids[:, :-1], cache)
    torch.manual_seed(1)
    assert torch.equal(
        found, model.generate(ids, past_key_values=cache, **options)
    )  # goes on behind what is cached
    with pytest.raises(
        bs.BadBatch, match="30 tokens at once behind 0 cached ones, where the window holds 12"
    ):
        model.generate(ids, past_key_values=SinkCache(model, WINDOW), **options)


@pytest.mark.parametrize("window", [WINDOW, 40])
def test_beam_search(window: int) -> None:
    model = random_llama()
    ids = words(2, 8)
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {
        "max_new_tokens": 20,
        "num_beams": 3,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": mask,
    }
    found = model.generate(
        ids, past_key_values=SinkCache(model, window, attention_mask=mask), **options
    )
    assert found.shape == (2, 28)
    assert torch.equal(found, model.generate(ids, **options)) == (window == 40)


# The object


def test_copies_are_independent() -> None:
    model = random_llama()
    ids = words(1, 40)
    cache = SinkCache(model, WINDOW)
    stream(model, ids[:, :20], cache)
    copies = (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)))
    wanted = stream(model, ids[:, 20:], cache)
    for other in copies:
        assert other.get_seq_length() == 20
        assert torch.equal(stream(model, ids[:, 20:], other), wanted)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert off(stream(model, ids, cache)[:, 20:], wanted) < 1e-9


def test_what_it_says_of_itself() -> None:
    model = random_llama()
    cache: Any = SinkCache(model, WINDOW, 2)
    stream(model, words(1, 30), cache)
    assert len(cache) == 2
    for layer in (0, 1):
        assert cache.get_seq_length(layer) == 30
        assert cache.layers[layer].keys.shape[2] == cache.layers[layer].values.shape[2] == WINDOW
        assert (cache.get_max_cache_shape(layer) if OLD else cache.get_max_length(layer)) == WINDOW
    assert cache.is_sliding == [False, False]
    assert not cache.is_compileable
    with pytest.raises(bs.BadOption, match="crop: "):
        cache.crop(-1)


def test_making_one_leaves_the_model_as_it_was() -> None:
    model = random_llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    SinkCache(model, WINDOW)
    assert model.training
    assert model.model.layers[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Refusals


@pytest.mark.parametrize(
    ("window", "sinks", "message"),
    [
        (4, 4, "window: 4 leaves no room beside 4 sinks"),
        (3, 4, "window: 3"),
        (8, -1, "sinks: -1"),
        (0, 0, "window: 0"),
        (8.0, 4, "window: 8.0"),
        (True, 0, "window: True"),
        (8, 1.5, "sinks: 1.5"),
    ],
)
def test_numbers_that_do_not_fit(window: Any, sinks: Any, message: str) -> None:
    with pytest.raises(bs.BadOption, match=message):
        SinkCache(random_llama(), window, sinks)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", "learned positions"),
        ("opt", "learned positions"),
        ("falcon_alibi", "builds its ALiBi for the whole sequence"),
        *([("mpt", "the mask of MptForCausalLM does not have the size")] if OLD else []),
    ],
)
def test_families_whose_keys_cannot_move(family: str, message: str) -> None:
    with pytest.raises(bs.UnsupportedModel, match=message):
        SinkCache(planted(family), WINDOW)


def test_models_that_take_no_cache() -> None:
    with pytest.raises(bs.UnsupportedModel, match="no decoder"):
        SinkCache(planted_vit(), WINDOW)
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(bs.UnsupportedModel, match="change with the length"):
        SinkCache(
            random_llama(**({"rope_scaling": scaling} if OLD else {"rope_parameters": scaling})),
            WINDOW,
        )


def test_a_sliding_window_of_the_model_itself() -> None:
    model = planted("mistral")
    model.config.sliding_window = WINDOW
    with pytest.raises(bs.BadOption, match="window: 13 is more than the sliding_window"):
        SinkCache(model, WINDOW + 1)
    ids = tokens(1, 3 * WINDOW)
    found = stream(model, ids, SinkCache(model, WINDOW))
    model.config.sliding_window = None
    assert off(found, stream(model, ids, SinkCache(model, WINDOW))) < 1e-5


def test_rows_of_which_the_cache_was_not_told() -> None:
    model = random_llama()
    ids = words(3, 4)
    with pytest.raises(bs.BadBatch, match="attention_mask: not given"):
        model(ids, past_key_values=SinkCache(model, WINDOW))
    with pytest.raises(bs.BadBatch, match="2 rows and the model 3"):
        model(ids, past_key_values=SinkCache(model, WINDOW, attention_mask=torch.ones(2, 4)))


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[1, 1, 0]]),
        torch.tensor([[0, 1, 0, 1]]),
        torch.zeros(1, 3),
        torch.ones(3),
        torch.ones(1, 0),
        5,
    ],
)
def test_masks_that_are_not_padding_on_the_left(mask: Any) -> None:
    with pytest.raises(bs.BadOption, match="on the left only"):
        SinkCache(random_llama(), WINDOW, attention_mask=mask)


def test_padding_needs_room_and_a_mask_that_follows() -> None:
    mask = torch.tensor([[1] * 10, [0] * 9 + [1]])
    with pytest.raises(bs.BadOption, match="does not hold 9 tokens of padding and 4 sinks"):
        SinkCache(random_llama(), WINDOW, attention_mask=mask)
    if OLD:
        with pytest.raises(bs.UnsupportedModel, match="for rows with padding"):
            SinkCache(planted("falcon"), 2 * WINDOW, attention_mask=mask)
    else:
        SinkCache(planted("falcon"), 2 * WINDOW, attention_mask=mask)


@pytest.mark.parametrize("cached", [0, 11, 12, 20])
def test_chunks_that_would_evict(cached: int) -> None:
    model = random_llama()
    ids = words(1, 60)
    cache = SinkCache(model, WINDOW)
    stream(model, ids[:, :cached], cache)
    with pytest.raises(
        bs.BadBatch,
        match=rf"tokens at once behind {min(cached, WINDOW)} cached ones.*prefill_chunk_size=1",
    ):
        model(ids[:, cached : cached + 13 - min(cached, 11)], past_key_values=cache)
    assert cache.get_seq_length() == cached  # nothing was lost
    wanted = stream(model, ids[:, :30], SinkCache(model, WINDOW))[:, cached:]
    assert off(stream(model, ids[:, cached:30], cache), wanted) < 1e-9


# Perplexity


@pytest.mark.parametrize("skip", [0, 1, 20])
def test_perplexity_of_a_stream(skip: int) -> None:
    model = random_llama()
    ids = words(1, 40)[0]
    logits = by_hand(model, ids[None], WINDOW, SINKS)[0]
    losses = torch.stack(
        [-logits[at].log_softmax(-1)[ids[at + 1]] for at in range(39) if at + 1 >= skip]
    )
    found = streaming_perplexity(model, ids, SinkCache(model, WINDOW), skip=skip)
    assert found == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert streaming_perplexity(model.train(), ids[None], DynamicCache()) == pytest.approx(
        bs.perplexity(model, ids, length=40), rel=1e-5
    )
    assert model.training


def test_perplexity_refuses() -> None:
    model = random_llama()
    ids = words(1, 20)[0]
    full = SinkCache(model, WINDOW)
    stream(model, ids[None], full)
    for data, cache, skip, error, message in (
        (ids, full, 0, bs.BadOption, "new and empty cache"),
        (ids, None, 0, bs.BadOption, "new and empty cache"),
        (ids, DynamicCache(), -1, bs.BadOption, "skip: -1"),
        (ids, DynamicCache(), 20, bs.BadBatch, "no token to predict"),
        (ids[:1], DynamicCache(), 0, bs.BadBatch, "no token to predict"),
        (ids.view(2, 10), DynamicCache(), 0, bs.BadBatch, "one stream"),
        ("text", DynamicCache(), 0, bs.BadBatch, "str"),
        (ids + 100, DynamicCache(), 0, bs.BadBatch, "not among the 50"),
    ):
        with pytest.raises(error, match=message):
            streaming_perplexity(model, data, cache, skip=skip)  # type: ignore[arg-type]
    with pytest.raises(bs.UnsupportedModel, match="no logits"):
        streaming_perplexity(model.model, ids, DynamicCache())
    model.lm_head.weight[0] = math.nan
    with pytest.raises(bs.NonFiniteActivation, match="NaN at 19 of 19"):
        streaming_perplexity(model, ids, DynamicCache())

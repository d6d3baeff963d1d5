"""Situations in which people run models: every family is right in them, or refused.

Arguments that a forward hands down to its attention without their being for it, attention functions
of a user's own, and prompts of PEFT.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from tests import models
from tests.contract.cases import LENGTH
from tests.contract.running import accepts, assert_near
from tests.models import START_ID
from tests.state import untouched

IDS = models.tokens(2, LENGTH, delimiter_at=None)
MODES: dict[str, dict[str, Any]] = {
    "instrument": {},
    "attention_bias": {"kind": "kv", "init": "normal", "std": 1.0},
    "transplant": {},
}
# Their attention is not looked up by the name in a config.
NO_INTERFACE = ("falcon", "falcon_alibi", "mpt")
families = pytest.mark.parametrize("family", models.FAMILIES)


@contextmanager
def patched(model: Any, family: str, mode: str) -> Iterator[None]:
    options = dict(MODES[mode])
    if mode == "transplant":
        options["key_values"] = bs.calibrate_key_values(models.planted(family), IDS)
    torch.manual_seed(7)
    with bs.patched(model, mode, **options):
        yield


def run(model: Any, ids: Tensor, **arguments: Any) -> Any:
    with torch.no_grad():
        return model(ids, use_cache=False, **arguments)


def takes_others(model: Any) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def not_for_attention(model: Any, ids: Tensor) -> dict[str, Any]:
    """What the forward takes and its softmax does not go by."""
    given: dict[str, Any] = {"labels": ids}
    if takes_others(model):
        given["shift_labels"] = ids.roll(-1, 1)
        given["num_items_in_batch"] = torch.tensor(7)
        given["of_a_users_loss"] = torch.ones(ids.shape)  # no name of transformers'
    if accepts(model, "output_router_logits"):
        given["output_router_logits"] = True
    return given


@families
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_arguments_that_are_not_for_attention(family: str, implementation: str, mode: str) -> None:
    """The numbers are those without them, and the loss is the one that they ask for."""
    model = models.planted(family)
    if implementation == "eager" or model.config._attn_implementation != "eager":
        model.set_attn_implementation(implementation)
    ids = IDS[:, 1:] if mode == "transplant" else IDS
    given = not_for_attention(model, ids)
    plain = run(model, ids, **given)
    with patched(model, family, mode):
        wanted = run(model, ids).logits
        found = run(model, ids, **given)
        assert torch.equal(found.logits, wanted)
        if accepts(model, "logits_to_keep"):
            assert torch.equal(run(model, ids, logits_to_keep=3).logits, wanted[:, -3:])
    if mode == "instrument":
        assert_near(found.logits, plain.logits)
        assert_near(found.loss, plain.loss, 1e-5)
    else:
        assert not torch.equal(found.loss, plain.loss)
    assert torch.equal(run(model, ids, **given).loss, plain.loss)


def test_the_loss_is_the_one_of_shifted_labels() -> None:
    model = models.planted("llama")
    shifted = IDS.flip(1)
    with bs.patched(model, "instrument"):
        found = run(model, IDS, labels=IDS, shift_labels=shifted)
    wanted = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), shifted.flatten())
    torch.testing.assert_close(found.loss, wanted)


@pytest.mark.parametrize("family", [f for f in models.FAMILIES if f not in NO_INTERFACE])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_argument_that_reaches_the_softmax_is_honoured(family: str, implementation: str) -> None:
    """A bias of the logits from the caller: added where the host adds it, and else passed over."""
    model = models.planted(family)
    model.set_attn_implementation(implementation)
    bias = torch.randn(1, models.HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4))
    if not takes_others(model):
        with pytest.raises(TypeError):
            run(model, IDS, position_bias=bias)
        return
    plain = run(model, IDS, position_bias=bias).logits
    with bs.patched(model, "instrument"):
        assert_near(run(model, IDS, position_bias=bias).logits, plain)


def tempered(module: Any, query: Any, key: Any, value: Any, mask: Any, **others: Any) -> Any:
    """What a user adds: attention whose logits are halved."""
    return sdpa_attention_forward(module, query * 0.5, key, value, mask, **others)


AttentionInterface.register("of_a_user", tempered)
AttentionMaskInterface.register("of_a_user", sdpa_mask)


@families
def test_an_attention_function_of_a_users_own(family: str) -> None:
    """Refused by what would replace it; what looks at blocks only measures it as it runs."""
    model = models.planted(family)
    plain = run(model, IDS).logits
    try:
        model.set_attn_implementation("of_a_user")
    except (ValueError, AttributeError):
        assert family in NO_INTERFACE
        return
    own = run(model, IDS).logits
    if torch.equal(own, plain):  # the family does not ask transformers for its attention
        assert family in NO_INTERFACE
        return
    actions: dict[str, Callable[[], Any]] = {
        "record": lambda: bs.record(model, "sink_mass").__enter__(),
        "key values": lambda: bs.calibrate_key_values(model, IDS),
        "instrument": lambda: bs.patch_model(model, "instrument"),
        "bias": lambda: bs.patch_model(model, "attention_bias", kind="kv"),
    }
    with untouched(model, IDS):
        for action in actions.values():
            with pytest.raises(UnsupportedModel, match="none of transformers' own functions"):
                action()
    seen: list[Tensor] = []
    block = models.blocks(model, family)[models.LAYER]
    handle = block.register_forward_hook(
        lambda module, args, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    with bs.record(model, "block_output") as rec:
        run(model, IDS)
    handle.remove()
    assert torch.equal(rec["block_output"][models.LAYER], seen[0])


# What PEFT does not find in every config.
SIZES = {
    "token_dim": models.HIDDEN,
    "num_layers": models.LAYERS,
    "num_attention_heads": models.HEADS,
}


@families
def test_a_prompt_of_peft(family: str) -> None:
    """The model that runs reads virtual tokens; the one that would be measured does not."""
    base = models.planted(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **SIZES)
        model: Any = peft.get_peft_model(base, config).eval()
    sites = bs.calibrate(model.get_base_model(), IDS)
    assert {site.role for site in sites} == {"start"}
    for action in (
        lambda: bs.calibrate(model, IDS),
        lambda: bs.patch_model(model, "set_mean", sites=sites),
        lambda: bs.perplexity(model, IDS),
    ):
        with pytest.raises(UnsupportedModel, match=r"prompt \(PROMPT_TUNING\)"):
            action()
    with torch.no_grad():
        prompt = model.prompt_encoder["default"].embedding.weight
        prompt.copy_(model.get_base_model().get_input_embeddings().weight[[START_ID, 2, 3]])
        embeddings = model.get_base_model().get_input_embeddings()(IDS)
        batch = {"inputs_embeds": torch.cat([model.get_prompt(2), embeddings], 1)}
    measured = bs.calibrate(model.get_base_model(), batch)
    assert {site.role for site in measured} == {"start", "elsewhere"}

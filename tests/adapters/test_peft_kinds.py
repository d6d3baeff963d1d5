"""Every kind of PEFT adapter is measured as it runs, or refused; prompts above all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.errors import SurgeryError, UnsupportedModel
from tests import models
from tests.models import CHANNEL, LAYERS
from tests.state import output_of, untouched

IDS = models.tokens(rows=2, length=12)
VIRTUAL = 3
HOOKED = 2
TARGETS = {"target_modules": ["q_proj", "v_proj"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {"num_virtual_tokens": VIRTUAL},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": VIRTUAL, "num_tasks": 2},
    "P_TUNING": {"num_virtual_tokens": VIRTUAL},
    "PREFIX_TUNING": {"num_virtual_tokens": VIRTUAL},
    "CARTRIDGE": {"num_virtual_tokens": VIRTUAL},
    "CPT": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1] * 3, "cpt_tokens_type_mask": [1] * 3},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "ADALORA": {**TARGETS, "total_step": 10},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4]},
    "LN_TUNING": {},
    "SHADOW": {},
    "C3A": {**TARGETS, "block_size": 32},
    "WAVEFT": {**TARGETS, "n_frequency": 64},
    "ROAD": {**TARGETS, "group_size": 32},
    "SHIRA": {**TARGETS, "r": 4},
    "VBLORA": {**TARGETS, "vector_length": 32},
}
PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT")
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
REFUSED = {*PROMPTS, *PREFIXES, "POLY", "SHADOW"}
# X-LoRA is made of saved adapters, AdaMSS needs scikit-learn.
KINDS = [name for name in peft.PeftType.__members__ if name not in ("XLORA", "ADAMSS")]
MAPPING: Any = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING


def adapted(kind: str, **options: Any) -> Any:
    """A planted model under an adapter that is not nil, as after training."""
    config = MAPPING[peft.PeftType[kind]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"task_type": "CAUSAL_LM", **OPTIONS.get(kind, TARGETS), **options}
        model: Any = peft.get_peft_model(models.planted("llama"), config(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def called(model: Any, **arguments: Any) -> Tensor:
    """Logits of the PeftModel as its user calls it."""
    if "MULTITASK" in str(model.active_peft_config.peft_type):
        arguments["task_ids"] = torch.zeros(len(IDS), dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **arguments).logits


def hooked(model: Any, run: Callable[[], Any]) -> Tensor:
    """What a block in the middle returns in the first forward, by a plain hook."""
    seen: list[Tensor] = []
    block = model.get_base_model().model.layers[HOOKED]
    handle = block.register_forward_hook(
        lambda module, args, out: seen.append(out if torch.is_tensor(out) else out[0])
    )
    run()
    handle.remove()
    return seen[0]


def verbs(folder: Path) -> dict[str, Callable[[Any], Any]]:
    sites = bs.calibrate(models.planted("llama"), IDS)
    saved = bs.patch_model(models.planted("llama"), "set_mean", sites=sites)
    bs.save_patch(saved, folder)
    key_values = bs.calibrate_key_values(models.planted("llama"), IDS)
    return {
        "calibrate": lambda model: bs.calibrate(model, IDS),
        "detect": lambda model: bs.detect(model, IDS),
        "record": lambda model: bs.record(model, "block_output").__enter__(),
        "perplexity": lambda model: bs.perplexity(model, IDS),
        "compare": lambda model: bs.compare(model, lambda model: 0.0, ["set_zero"], sites=sites),
        "key values": lambda model: bs.calibrate_key_values(model, IDS),
        "registers": lambda model: bs.calibrate_registers(model, IDS),
        "patch": lambda model: bs.patch_model(model, "set_mean", sites=sites),
        "patch by default": lambda model: bs.patch_model(model, "set_mean"),
        "transplant": lambda model: bs.patch_model(model, "transplant", key_values=key_values),
        "load": lambda model: bs.load_patch(model, folder),
    }


@pytest.mark.parametrize("kind", [*PROMPTS, *PREFIXES])
def test_a_prompt_is_refused_by_every_verb(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    plain = called(model)
    for name, verb in verbs(tmp_path).items():
        with untouched(model), pytest.raises(UnsupportedModel, match=f"prompt \\({kind}") as raised:
            verb(model)
        assert "get_base_model()" in str(raised.value), name
        assert ("get_prompt" in str(raised.value)) == (kind in PROMPTS)
    assert torch.equal(called(model), plain)


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_advice_measures_the_model_with_its_prompt(kind: str) -> None:
    """What is massive is on a virtual token; the message's arguments make the base read it."""
    model = adapted(kind)
    tasks = (torch.zeros(2, dtype=torch.long),) if "MULTITASK" in kind else ()
    embedding = model.get_base_model().get_input_embeddings()
    with torch.no_grad():
        prompt = model.get_prompt(2, *tasks)
        batch = {"inputs_embeds": torch.cat([prompt, embedding(IDS)], 1)}
        base = model.get_base_model()
        with bs.record(base, "block_output") as rec:
            base(**batch, use_cache=False)
    assert rec["block_output"][HOOKED].shape[1] == VIRTUAL + IDS.shape[1]
    assert torch.equal(rec["block_output"][HOOKED], hooked(model, lambda: called(model)))
    largest = hooked(model, lambda: called(model)).abs().amax((0, 1)).argmax().item()
    assert {site.channel for site in bs.calibrate(base, batch)} == {largest}


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_the_base_is_served_when_it_is_passed(kind: str) -> None:
    """By itself, or as what runs now; what is patched on it acts under the prompt, and goes."""
    model = adapted(kind)
    plain = called(model)
    sites = bs.calibrate(models.planted("llama"), IDS)
    assert bs.calibrate(model.get_base_model(), IDS) == sites
    assert bs.calibrate(model.base_model, IDS) == sites
    with model.disable_adapter():
        assert bs.calibrate(model, IDS) == sites
        with bs.record(model, ("block_output", "sink_mass")) as rec:
            assert torch.equal(called(model), output_of(models.planted("llama"), IDS))
        assert rec["sink_mass"][0].shape[-1] == IDS.shape[1]
        bs.patch_model(model, "set_zero", sites=sites, layers=[HOOKED])
    assert len(bs.patches(model)) == 1
    gate = next(site.gate for site in sites if site.layer == HOOKED)

    def write(module: Any, args: Any, out: Any) -> None:
        channel = (out if torch.is_tensor(out) else out[0])[..., CHANNEL]
        channel[channel.abs() > gate] = 0

    patched = called(model)
    bs.unpatch_model(model)
    assert torch.equal(called(model), plain)
    handle = model.base_model.model.layers[HOOKED].register_forward_hook(write)
    assert torch.equal(called(model), patched)
    handle.remove()
    assert not torch.equal(patched, plain)


def test_adapters_that_see_the_whole_input_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        adapted("LORA").save_pretrained(tmp_path / name)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=models.HIDDEN,
        adapters={name: str(tmp_path / name) for name in ("one", "two")},
    )
    base: Any = models.planted("llama")
    base.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixture = peft.get_peft_model(base, config)
    for kind, model in (
        ("XLORA", mixture),
        ("POLY", adapted("POLY")),
        ("LORA", adapted("LORA", alora_invocation_tokens=[5, 6])),
    ):
        with pytest.raises(UnsupportedModel, match=rf"adapter \({kind}\).*unload"):
            bs.calibrate(model, IDS)
    assert bs.calibrate(adapted("POLY").unload(), IDS) == bs.calibrate(models.planted("llama"), IDS)


def test_the_tuner_inside_is_the_model_that_it_adapts() -> None:
    model = adapted("LORA")
    assert bs.calibrate(model.base_model, IDS) == bs.calibrate(model, IDS)


def test_adaption_prompts() -> None:
    """They stand in the attention of the model inside: measured and patched as they run."""
    model = adapted("ADAPTION_PROMPT")
    plain = called(model)
    assert (plain - output_of(models.planted("llama"), IDS)).abs().max() > 0.1
    attention = model.get_base_model().model.layers[-1].self_attn
    seen: list[Tensor] = []
    handle = attention.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with bs.record(model, ("attention_output", "block_output")) as rec:
        called(model)
    handle.remove()
    assert torch.equal(rec["attention_output"][LAYERS - 1], seen[-1])
    assert torch.equal(rec["block_output"][HOOKED], hooked(model, lambda: called(model)))
    with bs.patched(model, "instrument"):
        torch.testing.assert_close(called(model), plain, rtol=1e-4, atol=1e-4)
    # PEFT turns the queries that read its prompts by positions that it counts itself in a cache.
    with pytest.raises(UnsupportedModel, match="continues a cache"):
        bs.calibrate_key_values(model, IDS)
    assert torch.equal(called(model), plain)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_peft(kind: str) -> None:
    """Its blocks return what a plain hook sees when the PeftModel is called, or it is refused."""
    model = adapted(kind)
    if kind in REFUSED:
        with pytest.raises(SurgeryError, match=r"prompt|adapter"):
            bs.calibrate(model, IDS)
        return
    expected = hooked(model, lambda: called(model))
    seen: list[Tensor] = []
    with bs.record(model, "block_output") as rec:
        called(model)
    assert torch.equal(rec["block_output"][HOOKED], expected)
    bs.calibrate(model, IDS)
    seen.append(hooked(model, lambda: bs.calibrate(model, IDS)))
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-4)

"""What stands around a model, and what of it can be left out.

`torch.compile`, DataParallel, PEFT, and timm's `features_only=True`.

The model inside is what is patched and measured. That is right where the wrapper runs it as it is;
a PEFT adapter that puts a prompt in front of the text, or runs the model in another way of its own,
does not.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from biassurgery.adapters.libraries import is_of
from biassurgery.errors import UnsupportedModel

# Where the forward of a tuner that only calls the model inside is written; AdaLoRA's adds a term
# to the loss behind it.
_PLAIN_FORWARDS = ("torch.", "peft.tuners.tuners_utils", "peft.tuners.adalora.")


def unwrap(model: nn.Module) -> nn.Module:
    """The host itself inside `torch.compile`, (Distributed)DataParallel, PEFT or timm's getter."""
    inner = _inside(model)
    return model if inner is None else unwrap(inner)


def check_wrappers(model: nn.Module) -> None:
    """Refuse wrappers under which the model inside computes something else than by itself.

    Raises:
        UnsupportedModel: PEFT's prompts (`PROMPT_TUNING`, `PREFIX_TUNING`, ...), and its adapters
            that must see the whole input (`POLY`, `XLORA`, `SHADOW`, activated LoRA).
    """
    difference = _difference(model)
    if difference is not None:
        raise UnsupportedModel(f"model: {type(model).__name__} {difference}.")
    inner = _inside(model)
    if inner is not None:
        check_wrappers(inner)


def _inside(model: nn.Module) -> nn.Module | None:
    """What the outermost wrapper holds; None: there is none."""
    holder: Any = model
    inner = None
    if isinstance(model, nn.Module) and "_orig_mod" in model._modules:
        inner = holder._orig_mod
    elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = model.module
    elif is_of(model, "timm.models") and type(model).__name__ == "FeatureGetterNet":
        inner = model._modules.get("model")  # of which it calls forward_intermediates
    elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        inner = holder.get_base_model()
    elif is_of(model, "peft.tuners") and hasattr(model, "peft_config"):  # PeftModel.base_model
        inner = model._modules.get("model")
    return None if inner is model else inner


def _difference(model: nn.Module) -> str | None:
    """In which way a PeftModel, as it is set now, does not just run the model inside; advice."""
    holder: Any = model
    config = getattr(holder, "active_peft_config", None)
    if config is None or not getattr(holder, "has_active_enabled_adapter", True):
        return None
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        return _of_prompt(holder, kind)
    away = "model.unload() gives the model without it"
    if getattr(config, "alora_invocation_tokens", None):
        return (
            f"has an adapter ({kind}) that acts behind its invocation tokens only, which PEFT finds"
            f" before the model inside runs; {away}"
        )
    forward = getattr(type(holder.base_model), "forward", None)
    if not f"{getattr(forward, '__module__', '')}.".startswith(_PLAIN_FORWARDS):
        return (
            f"has an adapter ({kind}) that hands the model inside more than it is called with, and"
            f" the model by itself does not get that; {away}"
        )
    return None


def _of_prompt(model: Any, kind: str) -> str:
    """What PEFT puts in front of the text."""
    base = (
        "pass model.get_base_model() for the model without it (a patch of that acts under the"
        " prompt too)"
    )
    prompt = model.prompt_encoder[model.active_adapter]
    if any(is_of(prompt, f"peft.tuners.{name}") for name in ("prefix_tuning", "cartridge")):
        return (
            f"has a prompt ({kind}) of keys and values that no token has, in front of the text in"
            f" every layer, and what reads it is not what the model inside reads; {base}"
        )
    return (
        f"has a prompt ({kind}), virtual tokens in front of the text, which the model inside by"
        f" itself does not read; {base}, and to measure it with the prompt give that model"
        " {'inputs_embeds': torch.cat([model.get_prompt(batch_size), embeddings], 1)}"
    )

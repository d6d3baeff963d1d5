"""The format `sinks`: learned sink logits as a stock architecture that has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.interface import model_type
from biassurgery.adapters.registry import Host
from biassurgery.errors import BadOption, MissingPackage, UnsupportedModel
from biassurgery.exports.fitted_sinks import with_fitted_logits
from biassurgery.exports.formats import Format, applied_mode
from biassurgery.findings.key_values import KeyValues
from biassurgery.measure.reading import reading
from biassurgery.modes import Transplant
from biassurgery.patching import patches

SERVED = ("llama", "mistral")  # whose weights have the names and the arithmetic of GraniteSWA's
TOLERANCE = 1e-3  # of the largest logit
# Of a LLaMA config, what the other has by the same name.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)


class Sinks(Format):
    """A checkpoint of `GraniteSWAForCausalLM`: all layers full attention, a sink logit a head.

    Its attention runs eager, by flash or by flex attention. A sink has the value 0. vLLM has them
    from 0.29 on; 0.28 loads the folder and leaves them out, without a word.
    """

    name: ClassVar[str] = "sinks"
    text_only: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True

    def write(self, host: Host, folder: Path, key_values: KeyValues | None) -> None:
        if key_values is not None:
            raise BadOption(
                "key_values: a stock sink is a logit with the value 0, and what v' does would be"
                " lost; patch_model(model, 'transplant', key_values=...), and give batches= to"
                " fit logits to and to measure that on."
            )
        if self._is_learned(host):
            stock = _stock(host)
            _compare(host, stock)
        else:
            assert self.batches is not None  # it has been checked
            _stock_class()
            _check_served(host)
            with with_fitted_logits(host, self.batches):
                stock = _stock(host)
                _compare(host, stock)
        stock.save_pretrained(folder)

    def _is_learned(self, host: Host) -> bool:
        """Whether the model has sink logits; not: it has k', v', which logits are fitted to."""
        if any(isinstance(patch.mode, Transplant) for patch in patches(host.root)):
            applied_mode(host.root, Transplant.name, self.name, "one is enough")
            kind = "transplant"
        else:
            advice = "patch_model(model, 'attention_bias', kind='sink_logit') first"
            mode: Any = applied_mode(host.root, "attention_bias", self.name, advice)
            kind = mode.kind
            if kind not in ("sink_logit", "kv", "k"):
                raise BadOption(f"model: its bias is of kind {kind!r}, not 'sink_logit'; {advice}.")
        learned = kind == "sink_logit"
        if learned and self.batches is not None:
            raise BadOption(
                "batches: the model has sink logits, and nothing is to be fitted; leave batches="
                " out."
            )
        if not learned and self.batches is None:
            raise BadOption(
                f"model: {kind!r} has k' and v', and a stock sink is one logit a head with the"
                " value 0; give batches= (as the model reads them), to which logits are fitted,"
                " and on which it is measured what that loses."
            )
        return learned


def _stock(host: Host) -> Any:
    """The model as one of the stock class, with the same weights."""
    config_class, stock_class = _stock_class()
    head = _check_served(host)
    config: Any = host.root.config
    own = config_class(
        **{name: getattr(config, name) for name in _SAME},
        layer_types=["full_attention"] * config.num_hidden_layers,
        # No layer has one, but the class wants a number, and a server may cut the context to it.
        sliding_window=config.max_position_embeddings,
        attention_multiplier=head**-0.5,
        attention_bias=getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
        dtype=next(host.root.parameters()).dtype,
    )
    stock = stock_class._from_config(own, attn_implementation="eager").eval()
    stock.load_state_dict(_renamed(host), strict=True)
    return stock


def _stock_class() -> tuple[Any, Any]:
    try:
        from transformers import GraniteSWAConfig, GraniteSWAForCausalLM
    except ImportError as error:
        raise MissingPackage(
            "format: 'sinks' is a checkpoint of GraniteSWAForCausalLM, which this version of"
            " transformers does not have; install a newer one (5.15 brought it)."
        ) from error
    return GraniteSWAConfig, GraniteSWAForCausalLM


def _check_served(host: Host) -> int:
    """The channels of a head, of a model that the stock class can hold."""
    config: Any = getattr(host.root, "config", None)
    reason = _why_not(host, config)
    if reason:
        raise UnsupportedModel(
            f"model: {type(host.root).__name__} {reason}, which GraniteSWAForCausalLM has no place"
            " for."
        )
    return _head_of(config)


def _head_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _why_not(host: Host, config: Any) -> str:
    """What of a model the stock class cannot hold; empty: nothing."""
    if model_type(host.root) not in SERVED or not hasattr(host.root, "lm_head"):
        return f"is no causal language model of {' or '.join(SERVED)}"
    head = _head_of(config)
    if head * config.num_attention_heads != config.hidden_size:
        return f"has heads of {head} channels, whose sum is not its width"
    if host.adapter.attention_limits(host.model).get("sliding_window"):
        return "has a sliding window"
    return ""


def _renamed(host: Host) -> dict[str, Tensor]:
    """The model's weights by the names of the stock class."""
    parameter = "attention_bias_sink_logit.sink_logit"
    names = {f"self_attn.{parameter}": "self_attn.sinks"}
    state = {}
    for name, tensor in host.root.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = tensor.detach()
    missing = len(attentions(host)) - sum(name.endswith(".sinks") for name in state)
    if missing:
        raise BadOption(
            f"model: {missing} of its layers have no sink logit, and a stock sink cannot be"
            " without effect; patch all layers."
        )
    return state


def _compare(host: Host, stock: nn.Module) -> None:
    """Raise `UnsupportedModel` if the two do not say the same."""
    root: Any = host.root
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(root.config.vocab_size, (2, 16), generator=drawn)
    with reading(root):
        before = root(ids.to(next(root.parameters()).device)).logits.cpu().float()
        after = stock(ids).logits.float()
    error = ((after - before).abs().max() / before.abs().max()).item()
    if not error <= TOLERANCE:
        raise UnsupportedModel(
            f"model: as GraniteSWAForCausalLM its logits differ by {error:.2g} of the largest; it"
            " computes something that this class does not."
        )

"""What this library must know about a host model: its parts, how to run it, its tokens.

A method that most adapters can leave as it is has a default here or in `TextAdapter`; whatever is
peculiar to a host's library (names of arguments, where a config says what) is an adapter's
business, so that nothing else in this library has to look.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from biassurgery.adapters.arguments import call, parameters_of
from biassurgery.adapters.libraries import is_fsdp
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.attention import Attention

PADDING = -1
READS = {"text": "text", "image": "images", "audio": "sound"}

Positions = list[tuple[nn.Module, tuple[str, int]]]


class Adapter(ABC):
    """One family of host models.

    Subclass `TextAdapter` or `ImageAdapter`, then register it with `register_adapter`.

    A model of images and text has two towers; it is matched by an adapter of either modality, each
    of which says what its part is.

    Attributes:
        family: the name in messages and in the support table.
        modality: `text` models read token ids, `image` models pixels, `audio` models the features
            of sounds.
        entry: where each forward passes: `model`, whose arguments tell padding and positions; or
            `blocks`, the first of them, where the model has other ways in.
        ids: of text models: what the host's forward calls its token ids. In this library they are
            always `input_ids`.
        uniform: whether the keys of all layers are known to hold positions alike.
        remembered: attributes in which what makes positions keeps those of the last prompt.
    """

    family: ClassVar[str]
    modality: ClassVar[Literal["text", "image", "audio"]]
    entry: ClassVar[Literal["model", "blocks"]] = "model"
    ids: ClassVar[str] = "input_ids"
    uniform: ClassVar[bool] = False
    remembered: ClassVar[tuple[str, ...]] = ()

    # -- which model, and its parts

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether this adapter serves the model; must not import the model's library."""

    def part(self, model: nn.Module) -> nn.Module:
        """What of the model is operated on: one of its towers, or the whole.

        It is given to all methods below.
        """
        return model

    def body(self, model: nn.Module) -> nn.Module:
        """The model without its head, which can be called by itself."""
        return model

    def by_name(self, model: nn.Module) -> bool:
        """Whether this tower is meant only where it is named: it serves a model that writes text.

        It is given the whole model.
        """
        return False

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The transformer layers in order.

        The output of each (or its first element) is the residual stream (B, T, D).
        """

    @abstractmethod
    def width(self, model: nn.Module) -> int:
        """Channels of the residual stream."""

    def layout(self, model: nn.Module) -> str:
        """The axes of a block's output: B sequences, T tokens, D channels.

        In some models also S parallel streams, which are read as S * D channels.
        """
        return "BTD"

    def architecture(self, model: nn.Module) -> str:
        """What sites are keyed to; models with the same name and size can exchange them."""
        return self.family

    # -- its tokens, and how it is run

    @abstractmethod
    def roles(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the roles that a token of this model can have."""

    def behind(self, model: nn.Module) -> int:
        """How many tokens stand behind the patches of an image.

        Their role, one for all, is then the one behind `patch`.
        """
        return 0

    @abstractmethod
    def token_roles(
        self, model: nn.Module, batch: Mapping[str, Any], shape: tuple[int, int]
    ) -> Tensor:
        """(B, T) int64: index into `roles` for every token of a hidden state.

        `PADDING` for padding. It is on the batch's device.
        """

    def canonical(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of the host's own arguments under this library's names.

        `input_ids` (B, T), `pixel_values` (B, C, H, W) or `input_features` (B, mels, frames), the
        rest as it is.
        """
        return dict(batch)

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, under the host's names, of one forward on a canonical batch.

        Of the model or its body; no labels, and no cache.
        """
        return {name: value for name, value in batch.items() if name != "labels"}

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """One forward over all blocks, without cache and, if that saves work, without the head."""
        body = model if is_fsdp(model) else self.body(model)
        call(body, self.inputs(body, batch))

    def logits(self, model: nn.Module, output: Any) -> Tensor:
        """The logits in what the model returned.

        Raises:
            UnsupportedModel: there are none.
        """
        logits = output
        if isinstance(output, Mapping):
            logits = output.get("logits")
        elif not isinstance(output, Tensor):
            logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise UnsupportedModel(
                f"model: it returns {type(output).__name__}, which has no logits; load it with its"
                " head, for example with AutoModelForCausalLM or AutoModelForImageClassification."
            )
        return logits

    def vocabulary(self, model: nn.Module) -> int | None:
        """How many token ids the model knows; None: it reads none, or it is not known."""
        return None

    def reserved(self, model: nn.Module) -> set[int]:
        """Token ids that stand for something else than text: images, padding, an end."""
        return set()

    # -- its attention

    def causal(self, model: nn.Module) -> bool:
        """Whether a token sees none of those behind it."""
        return self.modality == "text"

    def attends(self, model: nn.Module, block: nn.Module) -> bool:
        """Whether the block has an attention at all.

        Some layers of hybrid models keep a recurrent state instead.
        """
        return True

    def only_with_images(self, model: nn.Module) -> tuple[int, ...]:
        """The blocks of a text model that attend to images, and do not run where there is none."""
        return ()

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        """The attention of a block, and how it gets to this library's core.

        Raises:
            UnsupportedModel: it cannot, or the adapter does not say.
        """
        raise UnsupportedModel(
            f"model: the adapter of {self.family} does not say where the attention of"
            f" {type(model).__name__} is; modes on attention need an adapter with attention()."
        )

    def attention_limits(self, model: nn.Module) -> dict[str, int]:
        """What keeps a query from seeing further than so many tokens, its own included.

        By the name that the host has for it; empty: nothing does.
        """
        return {}

    def attention_chunk(self, model: nn.Module) -> int | None:
        """Tokens of the chunks that sequences are cut into; None: they are not cut.

        No chunk sees another.
        """
        return None

    # -- its positions and its cache

    def positions(self, model: nn.Module) -> Positions:
        """What embeds positions: each module, with the name and place of them in its forward.

        Empty where positions are in the logits only (`alibi`).
        """
        raise UnsupportedModel(
            f"model: the adapter of {self.family} does not say where {type(model).__name__} takes"
            " its positions from; transplant needs an adapter with positions()."
        )

    def position_makers(self, model: nn.Module) -> list[nn.Module]:
        """What a forward passes on its way to the blocks and takes positions, outermost first.

        Each makes positions of its own, or leaves that to the next, where it is given none.
        """
        around = dict.fromkeys((model, self.body(model)))
        return [module for module in around if "position_ids" in parameters_of(module)]

    def nested(self, model: nn.Module) -> bool:
        """Whether the blocks are in a model that a larger one runs, which may make its positions.

        That of images and text is one.
        """
        return False

    def rotates(self, model: nn.Module) -> bool:
        """Whether positions turn queries and keys and do nothing else.

        Then a constant that is added to all positions changes nothing among tokens.
        """
        try:
            positions = self.positions(model)
        except UnsupportedModel:
            return False
        return bool(positions) and not any(isinstance(m, nn.Embedding) for m, _ in positions)

    def alibi(self, model: nn.Module, attention: nn.Module) -> Tensor | None:
        """(H,): how much the logit of a key grows with its position.

        None: positions are not in the logits.
        """
        return None

    def context(self, model: nn.Module) -> int | None:
        """Tokens of the longest sequence that the model was made for; None: not known."""
        return None

    def learned_positions(self, model: nn.Module) -> bool:
        """Whether positions are looked up in a table; beyond its end (`context`) there are none."""
        return False

    def recurrent(self, model: nn.Module) -> bool:
        """Whether a layer keeps a recurrent state.

        That does not tell how many tokens it has read.
        """
        return False

    def cache_arguments(self, model: nn.Module, cache: Any) -> dict[str, Any]:
        """The arguments of a forward that reads and fills a cache of keys and values.

        Raises:
            UnsupportedModel: the model takes no cache of transformers.
        """
        raise UnsupportedModel(
            f"model: {type(model).__name__} is no decoder of transformers, and only those take a"
            " cache."
        )

    def check_eviction(self, model: nn.Module, padded: bool) -> None:
        """Check that masks and ALiBi are made for the tokens that a cache still holds.

        Args:
            padded: whether rows begin with padding.

        Raises:
            UnsupportedModel: they are made for every token of the sequence, or it is not known.
        """
        raise UnsupportedModel(
            f"model: the adapter of {self.family} does not say whether the masks of"
            f" {type(model).__name__} follow a cache that evicts tokens; SinkCache needs an adapter"
            " with check_eviction()."
        )

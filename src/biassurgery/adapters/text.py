"""The base class of adapters of models that read token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.arguments import parameters_of, taken, takes_anything
from biassurgery.adapters.base import PADDING, Adapter
from biassurgery.errors import BadBatch, UnsupportedModel
from biassurgery.surgery.starts import first_tokens

START = 0  # the code of the role `start`
_ELSEWHERE = 1


class TextAdapter(Adapter):
    """Models of token ids with the roles `start` (first real token) and `elsewhere`."""

    modality = "text"

    def roles(self, model: nn.Module) -> tuple[str, ...]:
        return ("start", "elsewhere")

    def token_roles(
        self, model: nn.Module, batch: Mapping[str, Any], shape: tuple[int, int]
    ) -> Tensor:
        ids = batch.get("input_ids", batch.get("inputs_embeds"))
        if ids is None:
            raise BadBatch(
                f"batches: a batch has {sorted(batch)} but neither input_ids nor inputs_embeds; add"
                " input_ids (B, T) int64."
            )
        if tuple(ids.shape[:2]) != shape:
            raise BadBatch(
                f"batches: the tokens have shape {tuple(ids.shape[:2])} but the hidden states have"
                f" {shape}; tokens that the model adds by itself (soft prompts, meta tokens) have"
                " no known role."
            )
        mask = batch.get("attention_mask")
        if mask is None:
            real = torch.ones(shape, dtype=torch.bool, device=ids.device)
        elif mask.dim() == 2:
            real = mask.to(torch.bool)[:, -shape[1] :]
        else:
            raise BadBatch(
                f"batches: attention_mask has shape {tuple(mask.shape)}; give (B, T), 1 for real"
                " tokens and 0 for padding."
            )
        first = real & first_tokens(ids, batch, cached=0)
        return torch.where(real, torch.where(first, START, _ELSEWHERE), PADDING)

    def canonical(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"input_ids" if name == self.ids else name: value for name, value in batch.items()}

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """As in `Adapter`; a mask without padding is left out where the forward takes none.

        Raises:
            BadBatch: the forward does not take something that would matter.
            UnsupportedModel: it does not take token ids under the name that this adapter says.
        """
        arguments = super().inputs(model, batch)
        parameters = parameters_of(model)
        if "input_ids" in arguments and not (self.ids in parameters or takes_anything(parameters)):
            raise UnsupportedModel(
                f"model: the adapter of {self.family} says that token ids are called {self.ids!r},"
                f" but {type(model).__name__} takes {', '.join(parameters)}; set `ids` in the"
                " adapter."
            )
        return taken(
            model, {self.ids if n == "input_ids" else n: value for n, value in arguments.items()}
        )

    def logits(self, model: nn.Module, output: Any) -> Tensor:
        """As in `Adapter`; of a tuple, its first tensor."""
        if isinstance(output, tuple):
            output = next((item for item in output if isinstance(item, Tensor)), output)
        return super().logits(model, output)

    def vocabulary(self, model: nn.Module) -> int | None:
        """Rows of the table that `get_input_embeddings()` gives, where the model has that."""
        find: Any = getattr(model, "get_input_embeddings", None)
        table = None if find is None else find()
        return getattr(table, "num_embeddings", None)

    def context(self, model: nn.Module) -> int | None:
        """The rows of the table of positions, if `positions()` names one."""
        return min((table.num_embeddings for table in self._position_tables(model)), default=None)

    def learned_positions(self, model: nn.Module) -> bool:
        """Whether `positions()` names a table."""
        return bool(self._position_tables(model))

    def _position_tables(self, model: nn.Module) -> list[nn.Embedding]:
        try:
            modules = [module for module, _ in self.positions(model)]
        except UnsupportedModel:  # the adapter does not say
            return []
        return [module for module in modules if isinstance(module, nn.Embedding)]

"""Stands in for `tests/generation/test_utils.py`, which is not in the sdist."""

from __future__ import annotations

from typing import Any

import torch


class GenerationTesterMixin:
    """A few checks of generation in the place of those that are missing."""

    model_tester: Any
    all_generative_model_classes: tuple[Any, ...]

    def test_greedy_with_and_without_a_cache(self) -> None:
        for model, ids in self._models():
            cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
            whole = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
            assert cached.tolist() == whole.tolist()
            assert cached.shape[1] > ids.shape[1]

    def test_left_padding(self) -> None:
        for model, ids in self._models():
            padded = torch.cat([torch.zeros(len(ids), 3, dtype=ids.dtype), ids], 1)
            mask = torch.cat([torch.zeros(len(ids), 3, dtype=ids.dtype), torch.ones_like(ids)], 1)
            one = model.generate(ids, max_new_tokens=6, do_sample=False)
            other = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
            assert one.tolist() == other[:, 3:].tolist()

    def test_beams(self) -> None:
        for model, ids in self._models():
            beams = model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False)
            assert beams.shape[0] == ids.shape[0]

    def test_a_static_cache(self) -> None:
        for model, ids in self._models():
            dynamic = model.generate(ids, max_new_tokens=6, do_sample=False)
            static = model.generate(
                ids, max_new_tokens=6, do_sample=False, cache_implementation="static"
            )
            assert dynamic.tolist() == static.tolist()

    def _models(self) -> Any:
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            config.eos_token_id = None
            torch.manual_seed(0)
            model = model_class(config).eval()
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
            yield model, inputs["input_ids"]

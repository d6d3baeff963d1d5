"""Real language models for the tests of this folder, from the cache: loaded once a worker,
calibrated once a run.

No test fetches anything: `make test` and `make test-all` do before they begin, of SmolLM2 alone.
Numbers here are of dequantised GGUF weights, not of the published ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

import biassurgery as bs
from biassurgery.data.packaged import packaged_text, text_batches
from biassurgery.data.real_models import REAL_MODELS, model_folder

HERE = Path(__file__).parent
LENGTH = 256
HOW = {
    "smollm2": "`biassurgery fetch smollm2` (93 MB, Apache-2.0), or `make real-model`, gets it",
    "gemma3": "`biassurgery fetch gemma3 --accept-terms` (253 MB) gets it, under its terms of use",
}
# At the start, where no monkeypatched test has moved the cache.
FOLDERS = {name: model_folder(name) for name in REAL_MODELS}


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on Gemma is no part of `make test`, whoever has fetched it."""
    for item in items:
        if HERE in item.path.parents and "gemma3" in item.nodeid:
            item.add_marker(pytest.mark.long)


@dataclass(frozen=True)
class Real:
    """A real model, float32, with windows (N, LENGTH) of two texts.

    Attributes:
        start: the id of the token that is a constant start: BOS, or what begins a chat.
        calibration, evaluation: as the tokenizer makes them, BOS in front if it does so.
    """

    model: Any
    tokenizer: Any
    start: int
    calibration: Tensor
    evaluation: Tensor

    def started(self, rows: int, length: int) -> Tensor:
        """(rows, length) of the evaluation text behind the constant start token."""
        ids = self.evaluation[:, 1:].flatten()[: rows * (length - 1)].view(rows, length - 1)
        return torch.nn.functional.pad(ids, (1, 0), value=self.start)


def load(name: str) -> Real:
    from transformers import AutoModelForCausalLM

    from biassurgery.data.tokenizers import read_tokenizer

    if not FOLDERS[name].is_dir():
        pytest.skip(f"{REAL_MODELS[name].title} is not in {FOLDERS[name].parent}: {HOW[name]}")
    tokenizer: Any = read_tokenizer(FOLDERS[name], local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(FOLDERS[name], dtype=torch.float32).eval()
    calibration, evaluation = (
        torch.cat(text_batches(tokenizer, packaged_text(which), LENGTH))
        for which in ("calibration", "evaluation")
    )
    return Real(model, tokenizer, tokenizer.bos_token_id, calibration, evaluation)


@pytest.fixture(scope="session")
def loaded_smollm2() -> Real:
    return load("smollm2")


@pytest.fixture(scope="session")
def loaded_gemma3() -> Real:
    return load("gemma3")


@pytest.fixture
def smollm2(loaded_smollm2: Real) -> Iterator[Real]:
    """SmolLM2, which a test must leave without patches."""
    yield loaded_smollm2
    assert not bs.patches(loaded_smollm2.model)


@pytest.fixture
def gemma3(loaded_gemma3: Real) -> Iterator[Real]:
    yield loaded_gemma3
    assert not bs.patches(loaded_gemma3.model)


@pytest.fixture(params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest) -> Real:
    """Each of them."""
    return request.getfixturevalue(request.param)


def calibrated(name: str, real: Real, factory: pytest.TempPathFactory) -> bs.Sites:
    """Calibrated on eight windows of the calibration text, by the first worker that asks."""
    base = factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    file = folder / f"{name}.sites.safetensors"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            bs.calibrate(real.model, real.calibration[:8].split(4)).save(file)
    return bs.Sites.load(file)


@pytest.fixture(scope="session")
def smollm2_sites(loaded_smollm2: Real, tmp_path_factory: pytest.TempPathFactory) -> bs.Sites:
    return calibrated("smollm2", loaded_smollm2, tmp_path_factory)


@pytest.fixture(scope="session")
def gemma3_sites(loaded_gemma3: Real, tmp_path_factory: pytest.TempPathFactory) -> bs.Sites:
    return calibrated("gemma3", loaded_gemma3, tmp_path_factory)

"""What every test runs under: one thread, a fixed seed, its own environment, quiet libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import transformers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-faults",
        action="store_true",
        help="tests/surgery/test_faults.py: let every call fail, not a sample",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _same_every_time() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    # PEFT's BOFT leaves CXX=gcc behind where its extension did not build; a later test's process
    # that compiles would inherit it, and gcc links no C++ library.
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)

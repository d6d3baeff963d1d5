"""The checkpoint of the command line's tests."""

from tests.cli.conftest import llama as llama

"""Telling forwards apart that run in several threads at once."""

from __future__ import annotations

from threading import get_ident

import torch


def this_thread() -> int:
    """By what a module keeps the notes of one forward from those of another thread's.

    Compiled code keeps no notes between its calls, and cannot ask which thread runs it.
    """
    return 0 if torch.compiler.is_compiling() else get_ident()

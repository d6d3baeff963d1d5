"""Every refusal, a `SurgeryError` that names the argument, its value and the next step; warnings.

Each is also the builtin error that Python programs expect of such a case, so that
`except ValueError` around a call works as it does elsewhere.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

# This library; those that run a model; `with` blocks and imports.
_BETWEEN = {__name__.partition(".")[0], "torch", "transformers", "timm", "open_clip", "accelerate"}
_BETWEEN |= {"peft", "contextlib", "importlib"}


class SurgeryError(Exception):
    """Base of every error raised on purpose; the model is as it was before the call."""


class UnsupportedModel(SurgeryError, TypeError):
    """No adapter knows this model, or its structure cannot be operated on.

    It is the type that is wrong, not something that is still to be written, as NotImplementedError
    would say.
    """


class UnknownMode(SurgeryError, ValueError):
    """`mode` is neither a known name nor a mode object."""


class BadOption(SurgeryError, ValueError):
    """An option of a call has a value that cannot be used."""


class AlreadyPatched(SurgeryError, RuntimeError):
    """The same patch is on the model already."""


class ModelInUse(SurgeryError, RuntimeError):
    """Another thread is measuring the same model."""


class NotPatched(SurgeryError, RuntimeError):
    """The patch to be removed is not on the model."""


class CalibrationRequired(SurgeryError, ValueError):
    """No sites were given, none are published, and none could be calibrated."""


class NoSites(SurgeryError, ValueError):
    """The sites given are empty where a patch needs at least one."""


class Incompatible(SurgeryError, ValueError):
    """A finding (sites, means, ...) of another architecture, size or measurement."""


IncompatibleSites = Incompatible  # its name in version 0.1.0


class LayerOutOfRange(SurgeryError, IndexError):
    """A layer index that the model does not have, or one without sites."""


class LevelOverflow(SurgeryError, OverflowError):
    """A calibrated level is larger than the model's dtype can hold."""


class BadBatch(SurgeryError, ValueError):
    """Batches that cannot be measured: none, empty, all padding, or of an unexpected form."""


class NonFiniteActivation(SurgeryError, ArithmeticError):
    """NaN or infinity in a hidden state."""


class FileError(SurgeryError, OSError):
    """A file that cannot be read or written, or does not hold what it should."""


class RankFailed(SurgeryError, RuntimeError):
    """Another rank of `torch.distributed` has failed, or does not answer."""


class BatchTooSmall(SurgeryError, ValueError):
    """`shuffle` needs at least two sequences in a batch."""


class MissingPackage(SurgeryError, ImportError):
    """A package is not installed: one of an extra, or one that a saved patch was made with."""


def first_line(error: BaseException) -> str:
    """What an error says first, or its class if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that has called this library, however deep the call has come since.

    Where the library runs within a model's forward, that is the line that called the model.
    """
    frame = sys._getframe(1)
    while _is_between(frame) and frame.f_back is not None:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__") or "<string>",  # None: Python drops the warning
        frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _is_between(frame: FrameType) -> bool:
    """Whether a frame stands between a caller and what he has called."""
    name = frame.f_globals.get("__name__") or ""
    return name.partition(".")[0] in _BETWEEN

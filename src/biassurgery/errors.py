"""Every refusal of this library: a `SurgeryError` that names the argument, the value it had and the
next step.
"""

from __future__ import annotations


class SurgeryError(Exception):
    """Base of every error that biassurgery raises on purpose; the model is as it was before the
    call.
    """


class UnsupportedModel(SurgeryError):
    """No adapter knows this model, or its structure cannot be operated on."""


class UnknownMode(SurgeryError):
    """`mode` is neither a known name nor a mode object."""


class BadOption(SurgeryError):
    """An option of a call has a value that cannot be used."""


class AlreadyPatched(SurgeryError):
    """The same patch is on the model already."""


class NotPatched(SurgeryError):
    """The patch to be removed is not on the model."""


class CalibrationRequired(SurgeryError):
    """No sites were given, none are published, and none could be calibrated."""


class NoSites(SurgeryError):
    """The sites given are empty where a patch needs at least one."""


class IncompatibleSites(SurgeryError):
    """Sites of another architecture, size or measurement."""


class LayerOutOfRange(SurgeryError):
    """A layer index that the model does not have, or one without sites."""


class LevelOverflow(SurgeryError):
    """A calibrated level is larger than the model's dtype can hold."""


class BadBatch(SurgeryError):
    """Batches that cannot be measured: none, empty, all padding, or of an unexpected form."""


class NonFiniteActivation(SurgeryError):
    """NaN or infinity in a hidden state."""


class FileError(SurgeryError):
    """A file that cannot be read or written, or does not hold what it should."""


class BatchTooSmall(SurgeryError):
    """`shuffle` needs at least two sequences in a batch."""


class MissingPackage(SurgeryError):
    """A package that only an extra of this library installs is not there."""

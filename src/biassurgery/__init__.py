"""biassurgery: find, fix, remove or replace the implicit biases of a trained transformer.

The science: Sun et al. 2024, "Massive Activations in Large Language Models".
"""

from biassurgery.adapters.base import Adapter, ImageAdapter, TextAdapter
from biassurgery.adapters.registry import register_adapter
from biassurgery.calibrate import calibrate
from biassurgery.detect import Detection, detect
from biassurgery.errors import (
    AlreadyPatched,
    BadBatch,
    BadOption,
    BatchTooSmall,
    CalibrationRequired,
    FileError,
    IncompatibleSites,
    LayerOutOfRange,
    LevelOverflow,
    NonFiniteActivation,
    NoSites,
    NotPatched,
    SurgeryError,
    UnknownMode,
    UnsupportedModel,
)
from biassurgery.evaluate import Comparison, compare, perplexity, top1_accuracy
from biassurgery.modes import Mode, Noise, SetMean, SetValue, SetZero, Shuffle, ZeroRandom
from biassurgery.patching import Patch, patch_model, patched, patches, unpatch_model
from biassurgery.saving import load_patch, save_patch
from biassurgery.sites import Origin, Site, Sites
from biassurgery.support import Support, SupportMatrix, supported

__version__ = "0.1.0"

__all__ = [
    "Adapter", "AlreadyPatched", "BadBatch", "BadOption", "BatchTooSmall", "CalibrationRequired", "Comparison", "Detection",
    "FileError", "ImageAdapter", "IncompatibleSites", "LayerOutOfRange", "LevelOverflow", "Mode", "NoSites", "Noise",
    "NonFiniteActivation", "NotPatched", "Origin", "Patch", "SetMean", "SetValue", "SetZero", "Shuffle", "Site", "Sites", "Support",
    "SupportMatrix", "SurgeryError", "TextAdapter", "UnknownMode", "UnsupportedModel", "ZeroRandom", "calibrate", "compare",
    "detect", "load_patch", "patch_model", "patched", "patches", "perplexity", "register_adapter", "save_patch", "supported",
    "top1_accuracy", "unpatch_model",
]

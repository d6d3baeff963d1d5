"""biassurgery: find, fix, remove or replace the implicit biases of a trained transformer.

The science: Sun et al. 2024, "Massive Activations in Large Language Models".
"""

from typing import TYPE_CHECKING, Any

from biassurgery import plots
from biassurgery.adapters.base import Adapter
from biassurgery.adapters.image import ImageAdapter
from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.text import TextAdapter
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
    MissingPackage,
    NonFiniteActivation,
    NoSites,
    NotPatched,
    SurgeryError,
    UnknownMode,
    UnsupportedModel,
)
from biassurgery.evaluate import (
    Comparison,
    LinearHead,
    class_and_patch_features,
    compare,
    fit_linear_head,
    image_features,
    imagenet_prompts,
    knn_accuracy,
    linear_accuracy,
    perplexity,
    streaming_perplexity,
    top1_accuracy,
    zero_shot_accuracy,
    zero_shot_head,
)
from biassurgery.findings.key_values import KeyValues
from biassurgery.findings.register_means import MassiveRegister, RegisterMeans
from biassurgery.findings.register_neurons import RegisterNeurons
from biassurgery.findings.sites import Origin, Site, Sites
from biassurgery.measure.calibrate import calibrate
from biassurgery.measure.cls_attention import attention_by_role, cls_attention
from biassurgery.measure.detect import Detection, detect
from biassurgery.measure.key_values import calibrate_key_values
from biassurgery.measure.record import Record, record
from biassurgery.measure.register_neurons import find_register_neurons
from biassurgery.measure.registers import calibrate_registers
from biassurgery.modes import (
    AttentionBias,
    FixRegisters,
    Instrument,
    Mode,
    Noise,
    SetMean,
    SetValue,
    SetZero,
    Shuffle,
    TestTimeRegisters,
    Transplant,
    ZeroRandom,
)
from biassurgery.patching import Patch, patch_model, patched, patches, unpatch_model
from biassurgery.saving import load_patch, push_to_hub, save_patch
from biassurgery.support import Support, SupportMatrix, supported

if TYPE_CHECKING:
    from biassurgery.streaming.cache import SinkCache

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AlreadyPatched",
    "AttentionBias",
    "BadBatch",
    "BadOption",
    "BatchTooSmall",
    "CalibrationRequired",
    "Comparison",
    "Detection",
    "FileError",
    "FixRegisters",
    "ImageAdapter",
    "IncompatibleSites",
    "Instrument",
    "KeyValues",
    "LayerOutOfRange",
    "LevelOverflow",
    "LinearHead",
    "MassiveRegister",
    "MissingPackage",
    "Mode",
    "NoSites",
    "Noise",
    "NonFiniteActivation",
    "NotPatched",
    "Origin",
    "Patch",
    "Record",
    "RegisterMeans",
    "RegisterNeurons",
    "SetMean",
    "SetValue",
    "SetZero",
    "Shuffle",
    "SinkCache",
    "Site",
    "Sites",
    "Support",
    "SupportMatrix",
    "SurgeryError",
    "TestTimeRegisters",
    "TextAdapter",
    "Transplant",
    "UnknownMode",
    "UnsupportedModel",
    "ZeroRandom",
    "attention_by_role",
    "calibrate",
    "calibrate_key_values",
    "calibrate_registers",
    "class_and_patch_features",
    "cls_attention",
    "compare",
    "detect",
    "find_register_neurons",
    "fit_linear_head",
    "image_features",
    "imagenet_prompts",
    "knn_accuracy",
    "linear_accuracy",
    "load_patch",
    "patch_model",
    "patched",
    "patches",
    "perplexity",
    "plots",
    "push_to_hub",
    "record",
    "register_adapter",
    "save_patch",
    "streaming_perplexity",
    "supported",
    "top1_accuracy",
    "unpatch_model",
    "zero_shot_accuracy",
    "zero_shot_head",
]


def __getattr__(name: str) -> Any:
    if (
        name == "SinkCache"
    ):  # a class of transformers' kind: importing this library must not import that one
        from biassurgery.streaming.cache import SinkCache

        return SinkCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

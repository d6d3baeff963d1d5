"""biassurgery: find, fix, remove or replace the implicit biases of a trained transformer.

The science: Sun et al. 2024, "Massive Activations in Large Language Models".

Here are the everyday names. Errors are in `errors`, further evaluations in `evaluate`, the classes
of the modes in `modes`, figures in `plots`; what packages that extend this one need is in `extend`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from biassurgery import errors, evaluate, extend, modes, plots
from biassurgery.adapters.registry import register_adapter
from biassurgery.data.start import with_start
from biassurgery.errors import AlreadyPatched, SurgeryError
from biassurgery.evaluate import compare, perplexity, streaming_perplexity, top1_accuracy
from biassurgery.evaluate.diagnose import diagnose
from biassurgery.exports.write import export
from biassurgery.findings.diagnosis import Diagnosis
from biassurgery.findings.key_values import KeyValues
from biassurgery.findings.register_means import RegisterMeans
from biassurgery.findings.register_neurons import RegisterNeurons
from biassurgery.findings.site import Origin, Site
from biassurgery.findings.sites import Sites
from biassurgery.measure.calibrate import calibrate
from biassurgery.measure.cls_attention import attention_by_role, cls_attention
from biassurgery.measure.detect import Detection, detect
from biassurgery.measure.key_values import calibrate_key_values
from biassurgery.measure.ordinary import ordinary_tokens
from biassurgery.measure.record import Record, record
from biassurgery.measure.register_neurons import find_register_neurons
from biassurgery.measure.registers import calibrate_registers
from biassurgery.patching import Patch, patch_model, patched, patches, unpatch_model
from biassurgery.reports.report import report
from biassurgery.saving import load_patch, push_to_hub, save_patch
from biassurgery.support import supported

if TYPE_CHECKING:
    from biassurgery.streaming.cache import SinkCache

__version__ = "0.2.0"

__all__ = [
    "AlreadyPatched",
    "Detection",
    "Diagnosis",
    "KeyValues",
    "Origin",
    "Patch",
    "Record",
    "RegisterMeans",
    "RegisterNeurons",
    "SinkCache",
    "Site",
    "Sites",
    "SurgeryError",
    "attention_by_role",
    "calibrate",
    "calibrate_key_values",
    "calibrate_registers",
    "cls_attention",
    "compare",
    "detect",
    "diagnose",
    "errors",
    "evaluate",
    "export",
    "extend",
    "find_register_neurons",
    "load_patch",
    "modes",
    "ordinary_tokens",
    "patch_model",
    "patched",
    "patches",
    "perplexity",
    "plots",
    "push_to_hub",
    "record",
    "register_adapter",
    "report",
    "save_patch",
    "streaming_perplexity",
    "supported",
    "top1_accuracy",
    "unpatch_model",
    "with_start",
]

# Names of version 0.1.0 by the module that has them now; they go with version 0.3.
_MOVED = {
    "errors": "BadBatch BadOption BatchTooSmall CalibrationRequired FileError IncompatibleSites"
    " LayerOutOfRange LevelOverflow MissingPackage NoSites NonFiniteActivation NotPatched"
    " UnknownMode UnsupportedModel",
    "evaluate": "Comparison LinearHead class_and_patch_features fit_linear_head image_features"
    " imagenet_prompts knn_accuracy linear_accuracy zero_shot_accuracy zero_shot_head",
    "extend": "Adapter ImageAdapter Mode TextAdapter",
    "findings.register_means": "MassiveRegister",
    "modes": "AttentionBias FixRegisters Instrument Noise SetMean SetValue SetZero Shuffle"
    " TestTimeRegisters Transplant ZeroRandom",
    "support": "Support SupportMatrix",
}
_PLACES = {name: module for module, names in _MOVED.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name == "SinkCache":  # of transformers' kind, which importing this library must not import
        return import_module("biassurgery.streaming.cache").SinkCache
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = f"{__name__}.{_PLACES[name]}"
    errors.warn(
        f"{__name__}.{name} is {place}.{name} now; the old name goes with version 0.3.",
        DeprecationWarning,
    )
    return getattr(import_module(place), name)

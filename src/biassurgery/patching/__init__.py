"""Applying and removing patches: the only code that changes a model."""

from biassurgery.patching.applied import Patch, edits_by_layer, patches
from biassurgery.patching.patch import GivenSites, Model, patch_model, patched, unpatch_model
from biassurgery.patching.removing import remove

__all__ = [
    "GivenSites",
    "Model",
    "Patch",
    "edits_by_layer",
    "patch_model",
    "patched",
    "patches",
    "remove",
    "unpatch_model",
]

"""`save_patch` and `load_patch`: the patches of a model in a small folder, without the model."""

from biassurgery.saving.load import load_patch
from biassurgery.saving.save import push_to_hub, save_patch

__all__ = ["load_patch", "push_to_hub", "save_patch"]

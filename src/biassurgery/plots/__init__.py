"""The figures of Sun et al. 2024; each function returns a matplotlib `Figure`.

They are made without pyplot: `figure.savefig(path)`.

matplotlib is imported when a figure is made; it comes with the extra `report`.
"""

from biassurgery.plots.activations import activations_3d, magnitudes
from biassurgery.plots.attention import attention_logits, trajectory, value_updates
from biassurgery.plots.images import attention_maps, massive_positions
from biassurgery.plots.registers import register_attention, register_means

__all__ = [
    "activations_3d",
    "attention_logits",
    "attention_maps",
    "magnitudes",
    "massive_positions",
    "register_attention",
    "register_means",
    "trajectory",
    "value_updates",
]

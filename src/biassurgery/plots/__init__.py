"""The figures of Sun et al. 2024; each function returns a matplotlib `Figure`.

They are made without pyplot: `figure.savefig(path)`.

matplotlib is imported when a figure is made; it comes with the extra `report`.
"""

from biassurgery.plots.activations import activations_3d, magnitudes
from biassurgery.plots.attention import attention_logits, trajectory, value_updates
from biassurgery.plots.channels import outlier_features
from biassurgery.plots.images import attention_maps, massive_positions
from biassurgery.plots.life import value_life
from biassurgery.plots.registers import register_attention, register_means
from biassurgery.plots.sinks import sink_kinds
from biassurgery.plots.tables import carriers, interventions, magnitude_table, variation_table
from biassurgery.plots.training import training_curves

__all__ = [
    "activations_3d",
    "attention_logits",
    "attention_maps",
    "carriers",
    "interventions",
    "magnitude_table",
    "magnitudes",
    "massive_positions",
    "outlier_features",
    "register_attention",
    "register_means",
    "sink_kinds",
    "training_curves",
    "trajectory",
    "value_life",
    "value_updates",
    "variation_table",
]

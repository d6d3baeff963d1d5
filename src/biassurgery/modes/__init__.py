"""The modes of `patch_model`: one frozen dataclass each; a string is sugar for one of them."""

from biassurgery.modes.activations import Noise, SetMean, SetValue, SetZero, Shuffle, ZeroRandom
from biassurgery.modes.added_register import TestTimeRegisters
from biassurgery.modes.attention import AttentionBias, Instrument, Transplant
from biassurgery.modes.base import Layers, Mode
from biassurgery.modes.registers import FixRegisters
from biassurgery.modes.resolve import MODES, resolve_mode

__all__ = [
    "MODES",
    "AttentionBias",
    "FixRegisters",
    "Instrument",
    "Layers",
    "Mode",
    "Noise",
    "SetMean",
    "SetValue",
    "SetZero",
    "Shuffle",
    "TestTimeRegisters",
    "Transplant",
    "ZeroRandom",
    "resolve_mode",
]

"""The findings that a patch is made from: of files, else measured on packaged or given data."""

from __future__ import annotations

from typing import Any

from biassurgery.cli.inputs import Inputs
from biassurgery.cli.modes import Asked
from biassurgery.cli.options import Given
from biassurgery.findings.key_values import KeyValues
from biassurgery.findings.register_means import RegisterMeans
from biassurgery.findings.register_neurons import RegisterNeurons
from biassurgery.findings.sites import Sites
from biassurgery.modes import Mode, resolve_mode

_LENGTH = 512  # tokens of the windows of packaged text that key values are measured on, at most
_WINDOWS = 32
_IMAGES = 8  # a batch
_KINDS: dict[str, Any] = {
    "sites": Sites,
    "key_values": KeyValues,
    "means": RegisterMeans,
    "neurons": RegisterNeurons,
}


class Findings:
    """What modes need; each is measured once, if no file has it.

    Args:
        given: the files, which are read at once.

    Raises:
        FileError: a file that does not hold what it should.
    """

    def __init__(self, given: Given) -> None:
        self._given = given
        self._known: dict[str, Any] = {
            name: kind.load(path)
            for name, kind in _KINDS.items()
            if (path := getattr(given, name)) is not None
        }

    def mode(self, asked: Asked, inputs: Inputs, on_data: bool) -> Mode:
        """The mode that was asked for, with the finding that it needs.

        Args:
            asked: the mode.
            inputs: the model and data for it.
            on_data: whether to measure on these data; if not, as they are what is evaluated, on
                packaged ones.

        Raises:
            SurgeryError: it cannot be measured on this model, or the mode takes no such option.
        """
        if asked.needs is None:
            return resolve_mode(asked.name, asked.options)
        option, name = asked.needs
        return resolve_mode(asked.name, asked.options | {option: self.get(name, inputs, on_data)})

    def get(self, name: str, inputs: Inputs, on_data: bool) -> Any:
        """A finding by the name of its field in `Given`."""
        if name not in self._known:
            self._known[name] = (
                measured(name, inputs, inputs.batches) if on_data else _on_packaged(name, inputs)
            )
        return self._known[name]

    def source(self, name: str, otherwise: str = "measured") -> str:
        """The file that a finding is from, or what else to say of it."""
        path = getattr(self._given, name)
        return otherwise if path is None else str(path)


def _on_packaged(name: str, inputs: Inputs) -> Any:
    from biassurgery.modes.defaults import default_sites

    model = inputs.host.root
    if name == "sites":
        return default_sites(model, inputs.host, inputs.start)
    return measured(name, inputs, _packaged(inputs))


def _packaged(inputs: Inputs) -> Any:
    from biassurgery.data.packaged import packaged_pixels, packaged_text
    from biassurgery.data.reading import text_windows

    model = inputs.host.root
    if not inputs.reads_text:
        return packaged_pixels(model).split(_IMAGES)
    length = min(_LENGTH, inputs.data["length"])
    texts = [packaged_text("calibration")]
    rows = text_windows(model, inputs.tokenizer, texts, length, inputs.bos, inputs.start)
    return rows[:_WINDOWS].split(8)


def measured(name: str, inputs: Inputs, batches: Any, **options: Any) -> Any:
    """A finding, by the name of its field in `Given`, on some data; with options of its verb."""
    from biassurgery.measure.calibrate import calibrate
    from biassurgery.measure.key_values import calibrate_key_values
    from biassurgery.measure.register_neurons import find_register_neurons
    from biassurgery.measure.registers import calibrate_registers

    verbs: dict[str, Any] = {
        "sites": calibrate,
        "key_values": calibrate_key_values,
        "means": calibrate_registers,
        "neurons": find_register_neurons,
    }
    start = {"start": inputs.start} if name in ("sites", "key_values") else {}
    return verbs[name](inputs.host.root, batches, **start, **options)

"""The errors of the library: each is a `SurgeryError`, and the builtin error of its sort."""

from __future__ import annotations

import pickle

import pytest

import biassurgery as bs
from biassurgery import errors

BUILTIN = {
    "AlreadyPatched": RuntimeError,
    "BadBatch": ValueError,
    "BadOption": ValueError,
    "BatchTooSmall": ValueError,
    "CalibrationRequired": ValueError,
    "FileError": OSError,
    "Incompatible": ValueError,
    "LayerOutOfRange": IndexError,
    "LevelOverflow": OverflowError,
    "MissingPackage": ImportError,
    "ModelInUse": RuntimeError,
    "NoSites": ValueError,
    "NonFiniteActivation": ArithmeticError,
    "NotPatched": RuntimeError,
    "RankFailed": RuntimeError,
    "UnknownMode": ValueError,
    "UnsupportedModel": TypeError,
}


def test_all_of_them_are_here():
    kinds = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type)}
    assert kinds == BUILTIN.keys() | {"SurgeryError"}
    assert errors.IncompatibleSites is errors.Incompatible


@pytest.mark.parametrize("name", BUILTIN)
def test_each_is_a_surgery_error_and_a_builtin_one(name):
    kind = getattr(errors, name)
    assert issubclass(kind, bs.SurgeryError)
    assert issubclass(kind, BUILTIN[name])
    error = kind("sites: none; calibrate.")
    assert str(error) == "sites: none; calibrate."
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)


def test_a_refusal_is_caught_as_what_it_is(tmp_path):
    with pytest.raises(OSError, match="absent"):
        bs.Sites.load(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="Site"):
        bs.Sites([None])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"nn\.Module"):
        bs.patches(3)  # type: ignore[arg-type]


def test_a_refusal_inside_of_a_handler_is_not_wrapped_again(tmp_path):
    """A table without the columns is refused with their names, although a refusal of files is an
    OSError now, which the reader of tables handles.
    """
    from biassurgery.data.reading import image_files

    (tmp_path / "labels.csv").write_text("name,class\na.png,1\n")
    with pytest.raises(errors.FileError, match=r"it needs file and class_index") as raised:
        image_files(tmp_path, None)
    assert raised.value.__cause__ is None

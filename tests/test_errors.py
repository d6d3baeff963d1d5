"""The errors of the library."""

from __future__ import annotations

import biassurgery as bs


def test_every_error_is_a_surgery_error():
    errors = [
        kind
        for name in bs.__all__
        if isinstance(kind := getattr(bs, name), type) and issubclass(kind, Exception)
    ]
    assert len(errors) >= 14
    assert all(issubclass(kind, bs.SurgeryError) for kind in errors)

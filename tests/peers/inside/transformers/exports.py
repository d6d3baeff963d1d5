"""Stands in for `tests/exporters/test_export.py`, which is not in the sdist."""


class ExportTesterMixin:
    """No tests: exporting is not ours."""

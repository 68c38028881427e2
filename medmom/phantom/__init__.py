"""Synthetic CT scans of chest and abdomen, for the demo and the tests."""

from medmom.phantom.scan import LABELS, make_phantom, make_phantoms

__all__ = ["LABELS", "make_phantom", "make_phantoms"]

"""Models of nnU-Net v2, taken over as packages."""

from medmom.nnunet.importing import import_nnunet

__all__ = ["import_nnunet"]

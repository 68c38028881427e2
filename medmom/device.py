from __future__ import annotations

import re

import torch

from medmom.errors import MedmomError


def torch_device(name: str) -> torch.device:
    """Gives the device of that name.

    Args:
        name: ``auto`` (the GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        MedmomError: The name is no device, or the machine has no such device.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    asked = re.fullmatch(r"cuda(?::([0-9]+))?", name)
    if asked is None:
        raise MedmomError(f"--device {name}: choose auto, cpu, cuda or cuda:N.")
    if int(asked[1] or 0) >= available:
        raise MedmomError(f"--device {name}: this machine shows {available} GPUs to torch; choose cpu or auto.")
    return torch.device("cuda") if asked[1] is None else torch.device("cuda", int(asked[1]))

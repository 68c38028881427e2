"""Several networks as one: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Ensemble(nn.Module):
    """Mean of the softmax probabilities of several networks, which run one after the other.

    For M members f_m and a window x it gives 1/M sum_m softmax(f_m(x)), and needs the memory of the largest member
    and one sum. A member alone is an ensemble too: of probabilities, where the network itself would give logits.

    Args:
        members: In evaluation mode, with the same classes.
        channels: Place of each member's channels in those of a window; None: each takes all of them.

    Raises:
        ValueError: There is no member, or another number of places.

    Source:
        Lakshminarayanan, Pritzel and Blundell 2017, arXiv:1612.01474, section 2.4; an equal weight for each member.
    """

    def __init__(self, members: Sequence[nn.Module], channels: Sequence[slice] | None = None) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.channels = tuple(channels or [slice(None)] * len(members))
        if not members or len(self.channels) != len(members):
            raise ValueError(f"{len(members)} members with {len(self.channels)} places of their channels")

    def forward(self, windows: Tensor) -> Tensor:
        """Gives class probabilities, float32 (B, K, *patch), of windows (B, C, *patch)."""
        mean: Tensor | None = None
        for member, channels in zip(self.members, self.channels, strict=True):
            probabilities = member(windows[:, channels]).float().softmax(dim=1)
            mean = probabilities if mean is None else mean.add_(probabilities)
            # Not kept while the next member runs.
            del probabilities
        assert mean is not None
        return mean.div_(len(self.members))

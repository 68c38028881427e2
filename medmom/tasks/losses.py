from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses import DiceLoss
from monai.networks import one_hot
from torch import Tensor, nn
from torch.nn import functional

from medmom.labels import IGNORE


class DiceCrossEntropy(nn.Module):
    """Soft Dice loss plus cross-entropy, over the classes that are annotated in each case.

    Classes that are not annotated in a case are merged into its background: their probabilities are added up
    before the loss, so that the network may tell them apart without being corrected. Voxels with label 255 count
    nowhere. Of several outputs (deep supervision) output i weighs 1/2^i, the lowest next to nothing.

    Of two classes the softmax is a sigmoid of the difference of their logits. With ``smooth`` 1 and one output this
    is then the loss that is usual for one logit ``z``: binary cross-entropy plus
    ``1 - (2 sum p t + 1) / (sum p + sum t + 1)`` with ``p = sigmoid(z)`` over all pixels of the batch, where ``z`` is
    that difference and ``p > 1/2`` is the argmax.

    Args:
        dice_weight: Weight of the Dice loss.
        cross_entropy_weight: Weight of the cross-entropy.
        batch_dice: One Dice over all patches of the batch, steadier where a class is missing from most patches;
            False: one Dice a patch.
        smooth: Added to both sides of the Dice fraction.

    Source:
        Isensee et al. 2021, doi:10.1038/s41592-020-01008-z; merging after Fang and Yan 2020, arXiv:2001.00208. The
        loss of one logit is that of the code of Jha et al. 2023, arXiv:2303.07428.
    """

    def __init__(
        self,
        *,
        dice_weight: float = 1.0,
        cross_entropy_weight: float = 1.0,
        batch_dice: bool = True,
        smooth: float = 1e-5,
    ) -> None:
        super().__init__()
        self.dice_weight, self.cross_entropy_weight = dice_weight, cross_entropy_weight
        # Batch Dice sums over the batch first; "none" leaves one value a class (and a patch, without it).
        self.dice = DiceLoss(
            include_background=False, batch=batch_dice, smooth_nr=smooth, smooth_dr=smooth, reduction="none"
        )

    def forward(self, outputs: Tensor | Sequence[Tensor], label: Tensor, annotated: Tensor) -> Tensor:
        """Gives the loss of a batch.

        Args:
            outputs: Logits (B, K, *spatial), or a list of them from full to low resolution.
            label: Channel indices (B, 1, *spatial) of any type; 255 where a voxel does not count.
            annotated: Whether a class is annotated in a case, bool (B, K); the background is.

        Returns:
            A scalar; 0 where no voxel counts.
        """
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        weights = [0.5**i for i in range(len(outputs))]
        if len(outputs) > 1:
            # Not 0: every parameter then has a gradient, as distributed training expects.
            weights[-1] = 1e-6
        losses = [self._at_one_scale(logits, _shrunk(label, logits), annotated) for logits in outputs]
        total = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()
        return total / sum(weights)

    def _at_one_scale(self, logits: Tensor, label: Tensor, annotated: Tensor) -> Tensor:
        logits = merge_unannotated(logits.float(), annotated)
        counts = label != IGNORE
        target = torch.where(counts, label, 0).long()
        entropy = functional.cross_entropy(logits, target[:, 0], reduction="none")[:, None]
        entropy = (entropy * counts).sum() / counts.sum().clamp(min=1)
        probabilities = logits.softmax(dim=1) * counts
        dice = self.dice(probabilities, one_hot(target, logits.shape[1]) * counts).flatten(
            1 if not self.dice.batch else 0
        )
        seen = annotated[:, 1:].any(dim=0) if self.dice.batch else annotated[:, 1:]
        dice = (dice * seen).sum() / seen.sum().clamp(min=1)
        loss: Tensor = self.dice_weight * dice + self.cross_entropy_weight * entropy
        return loss


def merge_unannotated(logits: Tensor, annotated: Tensor) -> Tensor:
    """Adds the probability of classes that are not annotated in a case to its background.

    Args:
        logits: Shape (B, K, *spatial).
        annotated: Bool (B, K); the background must be True.

    Returns:
        Logits of the same shape, in which an unannotated class has probability 0.
    """
    if bool(annotated.all()):
        return logits
    shape = (*annotated.shape, *[1] * (logits.ndim - 2))
    seen = annotated.reshape(shape)
    lowest = torch.finfo(logits.dtype).min
    joined = seen.logical_not()
    joined[:, 0] = True
    background = logits.masked_fill(~joined, lowest).logsumexp(dim=1, keepdim=True)
    merged = logits.masked_fill(~seen, lowest)
    return torch.cat([background, merged[:, 1:]], dim=1)


def _shrunk(label: Tensor, logits: Tensor) -> Tensor:
    if label.shape[2:] == logits.shape[2:]:
        return label
    return functional.interpolate(label.float(), size=logits.shape[2:], mode="nearest-exact")

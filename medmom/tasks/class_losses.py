from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmom.errors import MedmomError


class ClassificationLoss(nn.Module):
    """Cross-entropy of whole images with soft targets: over all classes together, or of each class by itself.

    With target ``t`` of image i and class k, smoothing ``e``, K classes and class weights ``w`` (1 unless set):

    - exactly one class an image, ``p = softmax(logits)``:
      ``sum_ik w_k ((1 - e) t_ik + e / K) (-log p_ik) / sum_ik w_k t_ik``, for targets of 0 and 1 what torch's
      ``cross_entropy`` gives with ``weight`` and ``label_smoothing``;
    - any number of classes, ``p = sigmoid(logits)``, ``s_ik = (1 - e) t_ik + e / 2``:
      ``sum_ik w_k (-s_ik log p_ik - (1 - s_ik) log(1 - p_ik)) / sum_ik w_k``.

    Computed in single precision, whatever the network computes in.

    Args:
        label_smoothing: Share ``e`` of every target that is spread evenly over what an image could be, in [0, 1).

    Attributes:
        is_multilabel: Whether an image may be of any number of classes; set by the task.

    Raises:
        MedmomError: The smoothing lies outside its range.

    Source:
        Szegedy et al. 2016, arXiv:1512.00567, section 7 (smoothing).
    """

    weights: Tensor | None

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise MedmomError(f"loss.label_smoothing {label_smoothing}: give a number from 0 to below 1.")
        self.label_smoothing, self.is_multilabel = label_smoothing, False
        # Not saved: they belong to the images, not to the network.
        self.register_buffer("weights", None, persistent=False)

    def set_weights(self, weights: Tensor | Sequence[float] | None) -> None:
        """Lets some classes count more than others.

        Args:
            weights: By class, above 0; only their ratios matter. None: all the same.

        Raises:
            MedmomError: A weight is not a number above 0.
        """
        if weights is None:
            self.weights = None
            return
        weights = torch.as_tensor(weights, dtype=torch.float32).detach().clone()
        if weights.ndim != 1 or not bool((weights.isfinite() & (weights > 0)).all()):
            raise MedmomError(f"class weights {weights.tolist()}: give a number above 0 for each class.")
        self.weights = weights

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Gives the loss of a batch.

        Args:
            logits: Shape (B, K).
            target: Share of each class in each image, (B, K); 0 or 1 unless images are mixed. In sum 1 an image
                where it is of exactly one class.

        Returns:
            A scalar.
        """
        logits, target = logits.float(), target.float()
        weights = torch.ones_like(logits[0]) if self.weights is None else self.weights
        kept, rest = 1 - self.label_smoothing, self.label_smoothing
        if self.is_multilabel:
            smooth = kept * target + rest / 2
            entropy = functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
            return (weights * entropy).sum() / (weights.sum() * len(logits))
        smooth = kept * target + rest / target.shape[1]
        return -(weights * smooth * logits.log_softmax(dim=1)).sum() / (weights * target).sum()

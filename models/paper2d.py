"""The network of the paper that put momentum into a segmentation network, as far as it can be known."""

from medmom.models.momentum import MomentumStage
from medmom.models.transnetr import TransNetR

__all__ = ["Paper2D"]


class Paper2D(TransNetR):
    """TransNetR whose decoder's residual blocks carry momentum: a reconstruction of arXiv 2408.05692.

    Blocks that keep their shape run as ``v' = g v + (1 - g) f(x)``, ``x' = x + v'`` with ``f(x) = block(x) - x``, from
    zero velocity in every decoder stage. The first unit of a stage, which joins the upsampled features with the
    encoder's and halves their channels, is TransNetR's own. So with ``num_blocks = n`` momentum acts on n residual
    blocks at 1/8 of the image, n at 1/4 and n - 1 at 1/2.

    **Where a stage has one such block, nothing carries the velocity on**: zero velocity makes it
    ``x + (1 - g) f(x)``, a block with a weaker branch. TransNetR has one residual block a stage, so this is the
    whole of the default: at 1/8 and 1/4 a weaker branch, at 1/2 no change. Take ``num_blocks`` of 2 or more for
    velocity that is used, 3 for all three stages.

    With gate 0 this is ``TransNetR`` to the bit, with the same keys and parameters for every gate; what is said there
    on attention, sizes, encoder and ``load_torchvision`` holds here.

    Verified, from the abstract and secondary summaries; no code was published and the rest could not be read:

    - momentum within residual blocks, with the formula above (Sander et al.'s) and ``g`` a hyper-parameter;
    - TransNetR as a baseline; 2-D images, among them Kvasir-SEG.

    Reconstruction, to be read as ours:

    - TransNetR as the skeleton, the decoder as the place, and no momentum in the encoder or around the attention;
    - ``g = .9``, which Sander et al.'s package has in its examples;
    - velocity that starts at zero in each stage, a first unit without momentum, and ``f(x) = block(x) - x``: what
      Sander et al.'s own conversion of a residual network does;
    - attention over tokens, which TransNetR's code does not do, and the encoder's start.

    So the figures of the paper are not those of this network.

    Args:
        in_channels: Image channels.
        out_channels: Logits; one for a sigmoid, else classes with the background counted.
        num_blocks: Residual blocks in each decoder stage; the first at 1/2 has no momentum.
        gate: ``g``, how much of the velocity a block leaves in place, in [0, 1).

    Attributes:
        divisor: By axis, what an image's size must be a multiple of.
        arguments: Numbers with which ``Paper2D(**arguments)`` gives the same network anew.

    Raises:
        ValueError: A count is below 1, or the gate outside its range.

    Source:
        Biswas et al. 2024, arXiv 2408.05692; Sander et al. 2021, arXiv 2102.07870 (momentum); Jha et al. 2023,
        arXiv 2303.07428 (the skeleton).
    """

    def __init__(self, in_channels: int, out_channels: int, *, num_blocks: int = 1, gate: float = 0.9) -> None:
        super().__init__(in_channels, out_channels, num_blocks=num_blocks)
        self.arguments["gate"] = gate
        for stage in self.stages:
            stage.residual = MomentumStage(stage.get_submodule("residual.blocks").children(), gate, "ema")

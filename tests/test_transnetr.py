"""TransNetR against twins that share nothing with it but the weights."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medmom.models.transnetr import TransNetR

SIZE = (16, 256)


def network(*counts: int, num_blocks: int = 1) -> TransNetR:
    torch.manual_seed(0)
    made = TransNetR(*(counts or (3, 2)), num_blocks=num_blocks)
    shake(made)
    return made.eval()


def shake(module: nn.Module) -> None:
    """Normalisations as after training, so that none of their numbers may be forgotten."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                assert tensor is not None
                tensor.data.add_(torch.rand_like(tensor), alpha=0.3)


def images(batch: int = 2, size: tuple[int, int] = SIZE, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


class TwinBottleneck(nn.Module):
    """torchvision's bottleneck: the stride in the 3 x 3 convolution, no biases, a projected shortcut where needed."""

    def __init__(self, before: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if before != 4 * planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return functional.relu(self.bn3(self.conv3(y)) + shortcut)


class TwinResNet50(nn.Module):
    """torchvision's ResNet-50, its names and its order of layers, written down anew; gives the four taps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        before = 64
        for number, (planes, depth) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
            blocks = []
            for block in range(depth):
                blocks.append(TwinBottleneck(before, planes, 2 if number > 1 and block == 0 else 1))
                before = 4 * planes
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.fc = nn.Linear(2048, 1000)

    def forward(self, image: Tensor) -> list[Tensor]:
        taps = [functional.relu(self.bn1(self.conv1(image)))]
        x = functional.max_pool2d(taps[0], 3, 2, 1)
        for number in (1, 2, 3):
            x = self.get_submodule(f"layer{number}")(x)
            taps.append(x)
        return taps


@pytest.fixture(scope="module")
def torchvision_state() -> dict[str, Tensor]:
    torch.manual_seed(2)
    twin = TwinResNet50()
    shake(twin)
    return twin.state_dict()


def test_twin_has_the_layout_of_torchvision(torchvision_state: dict[str, Tensor]) -> None:
    shapes = {key: tuple(value.shape) for key, value in torchvision_state.items()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["layer3.5.conv2.weight"] == (256, 256, 3, 3)
    assert shapes["layer4.2.bn3.running_var"] == (2048,)
    assert len(shapes) == 320
    # torchvision states 25 557 032 parameters; the rest are the running statistics and their counts.
    learned = [key for key in shapes if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert sum(torchvision_state[key].numel() for key in learned) == 25_557_032


def test_torchvision_weights_give_torchvision_features(torchvision_state: dict[str, Tensor]) -> None:
    ours, twin = network(), TwinResNet50().eval()
    twin.load_state_dict(torchvision_state)
    ours.load_torchvision(torchvision_state)
    image = images(size=(64, 96))
    with torch.no_grad():
        features, expected = ours.encoder(image), twin(image)
    assert [tuple(f.shape[1:]) for f in features] == [(64, 32, 48), (256, 16, 24), (512, 8, 12), (1024, 4, 6)]
    for feature, tap in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, tap, rtol=1e-5, atol=1e-5 * float(tap.abs().max()))


def test_file_without_last_layers_and_counts_is_enough(torchvision_state: dict[str, Tensor]) -> None:
    ours = network()
    left_out = ("layer4.", "fc.")
    state = {k: v for k, v in torchvision_state.items() if not k.startswith(left_out) and "num_batches" not in k}
    ours.load_torchvision(state)
    assert all(torch.equal(ours.encoder.state_dict()[key], value) for key, value in state.items())


def removed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != "layer3.5.bn3.running_var"}


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


def grey(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "conv1.weight": state["conv1.weight"][:, :1]}


def deeper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "layer3.6.conv1.weight": state["layer3.5.conv1.weight"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (removed, r"encoder: layer3\.5\.bn3\.running_var is missing\. Give the state_dict of torchvision's resnet50"),
        (prefixed, r"conv1\.weight is missing, bn1\.weight is missing, .* and \d+ faults more"),
        (grey, r"conv1\.weight has shape \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)\. .* 3 image channels"),
        (deeper, r"layer3\.6\.conv1\.weight is unknown"),
    ],
)
def test_other_weights_are_refused_by_name_and_change_nothing(
    change: Any, message: str, torchvision_state: dict[str, Tensor]
) -> None:
    ours = network()
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ours.load_torchvision(change(torchvision_state))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


class Twin:
    """TransNetR from its description, in functions of the weights; attention written out, tokens cut by one reshape."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv_norm(self, x: Tensor, name: str) -> Tensor:
        s = self.state
        x = functional.conv2d(x, s[f"{name}.conv.weight"], s[f"{name}.conv.bias"], padding="same")
        mean, var = s[f"{name}.norm.running_mean"], s[f"{name}.norm.running_var"]
        return functional.batch_norm(x, mean, var, s[f"{name}.norm.weight"], s[f"{name}.norm.bias"])

    def residual(self, x: Tensor, name: str) -> Tensor:
        branch = self.conv_norm(act(self.conv_norm(x, f"{name}.first")), f"{name}.second")
        return act(branch + self.conv_norm(x, f"{name}.shortcut"))

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}weight"].T + self.state[f"{name}bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return normed * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attention(self, tokens: Tensor, name: str) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], 4, -1).transpose(1, 2)

        query, key, value = map(heads, self.linear(tokens, f"{name}.in_proj_").chunk(3, dim=-1))
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return self.linear((weights @ value).transpose(1, 2).flatten(2), f"{name}.out_proj.")

    def transformer(self, tokens: Tensor, name: str) -> Tensor:
        for number in range(2):
            layer = f"{name}.layers.{number}"
            tokens = self.norm(tokens + self.attention(tokens, f"{layer}.self_attn"), f"{layer}.norm1")
            inner = functional.relu(self.linear(tokens, f"{layer}.linear1."))
            tokens = self.norm(tokens + self.linear(inner, f"{layer}.linear2."), f"{layer}.norm2")
        return tokens

    def residual_transformer(self, x: Tensor, name: str, width: int) -> Tensor:
        y = act(self.conv_norm(x, f"{name}.entry.fuse"))
        # The original's cut: pixels in their order in memory, so many to a token. At a width of 256 it is ours.
        tokens = self.transformer(y.reshape(len(y), -1, width), f"{name}.entry.transformer")
        y = self.conv_norm(tokens.reshape(y.shape), f"{name}.entry.project")
        return self.residual(act(y + self.conv_norm(x, f"{name}.entry.shortcut")), f"{name}.residual.blocks.0")

    def decode(self, taps: list[Tensor]) -> Tensor:
        half, quarter, eighth, x = [act(self.conv_norm(tap, f"reduce.{i}")) for i, tap in enumerate(taps)]
        x = self.residual_transformer(torch.cat([double(x), eighth], 1), "stages.0", 64)
        x = self.residual_transformer(torch.cat([double(x), quarter], 1), "stages.1", 256)
        x = self.residual(torch.cat([double(x), half], 1), "stages.2.entry")
        return functional.conv2d(double(x), self.state["head.weight"], self.state["head.bias"])


def act(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


def double(x: Tensor) -> Tensor:
    """Bilinear, corners on corners."""
    for axis in (2, 3):
        edge = x.shape[axis]
        place = torch.arange(2 * edge, dtype=x.dtype) * (edge - 1) / (2 * edge - 1)
        lower = place.long().clamp(max=max(0, edge - 2))
        shape = [-1 if i == axis else 1 for i in range(4)]
        share = (place - lower).reshape(shape)
        upper = (lower + 1).clamp(max=edge - 1)
        x = x.index_select(axis, lower) * (1 - share) + x.index_select(axis, upper) * share
    return x


@pytest.mark.parametrize("size", [SIZE, (48, 256)])
def test_logits_are_those_of_the_description(size: tuple[int, int]) -> None:
    ours = network().double()
    image = images(size=size).double()
    with torch.no_grad():
        expected = Twin(ours.state_dict()).decode(ours.encoder(image))
        torch.testing.assert_close(ours(image), expected, rtol=1e-9, atol=1e-9)


def test_there_are_1024_tokens_of_64_and_256_values_at_256_x_256() -> None:
    ours = network()
    seen = []
    for stage in ours.stages[:2]:
        stage.entry.transformer = nn.Identity()  # type: ignore[union-attr]
        stage.entry.transformer.register_forward_hook(lambda *args: seen.append(tuple(args[1][0].shape)))  # type: ignore[union-attr]
    with torch.no_grad():
        ours(images(1, (256, 256)))
    assert seen == [(1, 1024, 64), (1, 1024, 256)]


def test_token_covers_the_same_pixels_of_a_wider_image() -> None:
    block = network().stages[0].entry
    x = torch.randn(1, 128, 4, 64, requires_grad=True)
    block.fuse = nn.AvgPool2d(1)  # type: ignore[union-attr]
    tokens: list[Tensor] = []
    block.transformer.register_forward_pre_hook(lambda _, given: tokens.append(given[0]))  # type: ignore[union-attr]
    block.project = nn.Conv2d(128, 64, 1)  # type: ignore[union-attr]
    block(x)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(tokens[0][0, 1].sum(), x)
    rows, columns = gradient[0, 0].nonzero(as_tuple=True)
    assert set(rows.tolist()) == {0, 1}
    assert set(columns.tolist()) == set(range(32, 64))


@pytest.mark.parametrize("grad", [True, False])
def test_logits_do_not_depend_on_batch_mates(grad: bool) -> None:
    ours = network()
    image = images(3)
    with torch.set_grad_enabled(grad):
        together, alone = ours(image), ours(image[:1])
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5 * float(alone.detach().abs().max()))


def test_tokens_of_an_image_attend_to_each_other() -> None:
    ours = network()
    image = images(1, (16, 1024)).requires_grad_()
    (gradient,) = torch.autograd.grad(ours(image)[..., 0].sum(), image)
    # From one end to the other, further than the convolutions see.
    assert gradient[..., -16:].abs().max() > 0


def test_logits_have_the_image_size_and_the_classes() -> None:
    ours = network(1, 4)
    assert ours(images(1, (32, 512), channels=1)).shape == (1, 4, 32, 512)
    assert ours.train()(images(channels=1)).shape == (2, 4, 16, 256)


def test_parameters_are_the_original_without_its_unused_layer() -> None:
    ours = network(3, 1)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in ours.named_children()}
    stages = [sum(p.numel() for p in stage.parameters()) for stage in ours.stages]
    assert counts["encoder"] == 8_543_296
    assert [round(count / 1e6, 2) for count in stages] == [0.73, 2.80, 0.12]
    assert sum(counts.values()) == 12_304_705
    # With the fourth layer of a ResNet-50 these are the published 27.27 M.
    assert round((sum(counts.values()) + 14_964_736) / 1e6, 2) == 27.27
    assert not [name for name, _ in ours.named_modules() if "layer4" in name]


def test_every_parameter_has_a_gradient() -> None:
    ours = network(num_blocks=2).train()
    ours(images()).square().sum().backward()
    for key, parameter in ours.named_parameters():
        # A bias before a normalisation is taken out again by it.
        if not key.endswith("conv.bias"):
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 1e-6, key


def test_image_is_left_alone() -> None:
    image = images()
    before = image.clone()
    network()(image)
    assert torch.equal(image, before)


def test_arguments_rebuild_the_network_through_json() -> None:
    ours = network(1, 3, num_blocks=2)
    again = type(ours)(**json.loads(json.dumps(ours.arguments))).eval()
    assert again.arguments == ours.arguments == {"in_channels": 1, "out_channels": 3, "num_blocks": 2}
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(images(channels=1)), ours(images(channels=1)))


def test_blocks_are_counted_by_decoder_stage() -> None:
    keys = network(num_blocks=3).state_dict()
    blocks = [{key.split(".")[4] for key in keys if key.startswith(f"stages.{s}.residual.blocks")} for s in range(3)]
    assert [len(numbers) for numbers in blocks] == [3, 3, 2]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((96, 90), "^96 x 90 is not divisible by 16 x 256; the next size is 96 x 256.$"),
        ((250, 512), "^250 x 512 is not divisible by 16 x 256; the next size is 256 x 512.$"),
        ((0, 256), "^0 x 256 is not divisible by 16 x 256; the next size is 16 x 256.$"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_illegal_size_is_refused_with_the_next_legal_one(size: tuple[int, int], message: str, training: bool) -> None:
    ours = network().train(training)
    assert ours.divisor == (16, 256)
    with pytest.raises(ValueError, match=message):
        ours(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("shape", [(1, 1, *SIZE), (3, *SIZE), (1, 3, *SIZE, 16)])
def test_other_channels_or_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"has shape \(.*the network takes \(batch, 3, x, y\)"):
        network()(torch.zeros(shape))


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "num_blocks"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be 1 or more"):
        TransNetR(**{"in_channels": 3, "out_channels": 1, name: 0})

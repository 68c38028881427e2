"""Every rule takes the steps of the packages that have it: 60 of them in double precision, in two groups."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from medmom import optim

pytestmark = [
    pytest.mark.peers,
    # Of the peers: a call of torch that was renamed, and several groups.
    pytest.mark.filterwarnings("ignore:This overload of add_", "ignore:More than one param group"),
]

STEPS = 60
SHAPES = [(4, 3), (5,), (2, 3, 3, 3), (1,), (), (3, 2, 2, 2, 2)]
ALONE = {"AdaMomentum", "LowRankAdam", "LowRankHeavyBall", "ScheduleFreePolyak"}
"""Rules that no package on the index has: naive twins stand in their own tests."""

FOUND: list[tuple[str, str, str, float, str]] = []
"""Rule, peer, options, largest difference, tolerance, in the order in which they were compared."""

Options = dict[str, Any]


class Peer(NamedTuple):
    """A rule of ours beside one of another package.

    Attributes:
        rule: Ours.
        path: Theirs, as module and name.
        options: Of ours, one comparison each.
        translate: From our options to theirs.
        relative: Tolerance of the difference to the largest parameter.
        single: Whether all parameters must be in one group.
    """

    rule: str
    path: str
    options: list[Options]
    translate: Callable[[Options], Options] = dict
    relative: float = 1e-12
    single: bool = False


def renamed(_: dict[str, Any] | None = None, /, **names: str) -> Callable[[Options], Options]:
    """Options under other names, after what stands in the first argument."""
    return lambda options: {**(_ or {}), **{names.get(name, name): value for name, value in options.items()}}


def ramp(step: int) -> float:
    """Warm-up over twelve steps, as the schedule-free packages have it built in."""
    return min(1.0, (step + 1) / 12)


def schedule_free(options: Options) -> Options:
    theirs = {k: v for k, v in options.items() if k not in ("schedule", "weights")}
    return {**theirs, "warmup_steps": 12} if "schedule" in options else theirs


def equal_betas(options: Options) -> Options:
    # torch's AdamW decays unless told not to.
    theirs = {k: v for k, v in options.items() if k not in ("beta", "decoupled")}
    return {"weight_decay": 0.0, **theirs, "betas": (options["beta"],) * 2}


def qhoptim_decay(options: Options) -> Options:
    kind = "direct" if options.get("decoupled") else "grad"
    return {**{k: v for k, v in options.items() if k != "decoupled"}, "weight_decay_type": kind}


def quasi(**changes: Any) -> list[Options]:
    """With both kinds of decay and without."""
    return [changes, *({**changes, "weight_decay": 0.1, "decoupled": decoupled} for decoupled in (False, True))]


def decayed(*options: Options) -> list[Options]:
    """Each with and without weight decay."""
    return [{**one, **decay} for one in options for decay in ({}, {"weight_decay": 0.1})]


HEAVY = decayed({"lr": 0.05, "momentum": 0.9}, {"lr": 0.05, "momentum": 0.9, "nesterov": True})
EQUAL = {"lr": 0.01, "beta": 0.95}
SIGNUM = decayed({"lr": 0.01, "momentum": 0.9})
LION = decayed({"lr": 0.01, "betas": (0.9, 0.99)}, {"lr": 0.01, "betas": (0.95, 0.9)})
QHM = [*quasi(lr=0.5, momentum=0.9, nu=0.7), {"lr": 0.3, "momentum": 0.999, "nu": 1.0}]
QHADAM = [*quasi(lr=0.01, betas=(0.9, 0.99), nus=(0.7, 1.0)), {"lr": 0.01, "betas": (0.995, 0.999), "nus": (0.8, 0.9)}]
QHADAM = [{"decoupled": False, **one} for one in QHADAM]
FSGDM = decayed(
    {"total_steps": STEPS, "lr": 0.02, "stages": 10}, {"total_steps": 200, "lr": 0.1, "stages": 7, "gain": 0.5}
)
MOMO = [
    *decayed({"lr": 0.5}, {"lr": 0.5, "bias_correction": True}),
    {"lr": 0.5, "lower_bound": 0.3, "momentum": 0.5},
]
ONLINE: Options = {"online_lower_bound": True, "lower_bound": -5.0}
MOMO_ONLINE = decayed({"lr": 0.5, **ONLINE}, {"lr": 0.3, "bias_correction": True, **ONLINE})
MOMO_ADAM = [
    *decayed({"lr": 0.05}, {"lr": 0.05, "betas": (0.8, 0.95)}),
    {"lr": 0.05, "weight_decay": 0.1, "divide": False},
]
MOMO_ADAM_ONLINE = decayed({"lr": 0.05, **ONLINE})
BOUND = {"lower_bound": "lb", "online_lower_bound": "use_fstar"}
OFFICIAL: Options = {"weights": "lr_max_squared"}
FREE_SGD = decayed({"lr": 0.5, **OFFICIAL}, {"lr": 0.5, "momentum": 0.7, "schedule": ramp, **OFFICIAL})
FREE_ADAM = decayed({"lr": 0.05, **OFFICIAL}, {"lr": 0.05, "betas": (0.95, 0.99), "schedule": ramp, **OFFICIAL})

PEERS = [
    Peer("HeavyBall", "torch.optim.SGD", HEAVY),
    Peer("EqualBetaAdam", "torch.optim.AdamW", decayed(EQUAL), equal_betas),
    Peer("EqualBetaAdam", "torch.optim.Adam", decayed({**EQUAL, "decoupled": False}), equal_betas),
    Peer("SignSGD", "pytorch_optimizer.SignSGD", decayed({"lr": 0.01}), renamed({"momentum": 0.0})),
    Peer("Signum", "pytorch_optimizer.SignSGD", SIGNUM),
    Peer("Lion", "lion_pytorch.Lion", LION),
    Peer("Lion", "pytorch_optimizer.Lion", LION),
    Peer("QHM", "qhoptim.pyt.QHM", QHM, qhoptim_decay),
    Peer("QHM", "pytorch_optimizer.QHM", QHM, renamed(decoupled="weight_decouple")),
    Peer("QHAdam", "qhoptim.pyt.QHAdam", QHADAM, renamed(decoupled="decouple_weight_decay")),
    # It keeps the weights of its averages in single precision.
    Peer("QHAdam", "pytorch_optimizer.QHAdam", QHADAM, renamed(decoupled="weight_decouple"), relative=1e-6),
    Peer(
        "FSGDM",
        "fsgdm.FSGDM",
        FSGDM,
        renamed({"weight_decay": 0.0}, total_steps="sigma", scale="c_scaling", gain="v_coefficient", stages="n_stages"),
    ),
    Peer("MoMo", "momo.Momo", MOMO, renamed(momentum="beta", **BOUND)),
    # It moves the bound once for each group: with two of them there is another rule.
    Peer("MoMo", "momo.Momo", MOMO_ONLINE, renamed(momentum="beta", **BOUND), single=True),
    Peer("MoMoAdam", "momo.MomoAdam", MOMO_ADAM, renamed(**BOUND)),
    Peer("MoMoAdam", "momo.MomoAdam", MOMO_ADAM_ONLINE, renamed(**BOUND), single=True),
    Peer("ScheduleFreeSGD", "schedulefree.SGDScheduleFree", FREE_SGD, schedule_free),
    Peer("ScheduleFreeSGD", "pytorch_optimizer.ScheduleFreeSGD", FREE_SGD, schedule_free),
    Peer("ScheduleFreeAdamW", "schedulefree.AdamWScheduleFree", FREE_ADAM, schedule_free),
    # It adds 1e-15 under the root, which gradients near 0 feel.
    Peer("ScheduleFreeAdamW", "pytorch_optimizer.ScheduleFreeAdamW", FREE_ADAM, schedule_free, relative=1e-6),
]
EVERY = [
    pytest.param(peer, options, id=f"{peer.rule}-{peer.path}-{number}")
    for peer in PEERS
    for number, options in enumerate(peer.options)
]


def make() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


def noisy_bowl(params: list[nn.Parameter], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    noise = [torch.rand(p.shape, generator=generator, dtype=p.dtype) for p in params]
    losses = [((p - n) ** 2 * (0.5 + n)).sum() for p, n in zip(params, noise, strict=True)]
    return 0.2 + torch.stack(losses).sum() / 8


def groups_of(params: list[nn.Parameter], options: Options, *, single: bool) -> list[dict[str, Any]]:
    """Two groups, the second with half the learning rate and another decay; one where there may be but one."""
    if single:
        return [{"params": params}]
    other = {"lr": options["lr"] / 2, **({"weight_decay": 0.3} if "weight_decay" in options else {})}
    return [{"params": params[:2]}, {"params": params[2:], **other}]


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Some peers start a state in torch's default type."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def points(optimizer: Any, params: list[nn.Parameter], step: int, *, needs_loss: bool) -> list[Tensor]:
    """Where a step leads: the next training point, and every ten steps also the point to evaluate at."""
    # Each optimizer has gradients of its own: some peers overwrite them.
    optimizer.zero_grad()
    loss = noisy_bowl(params, step)
    torch.autograd.backward(loss)
    optimizer.step(**({"loss": loss} if needs_loss else {}))
    seen = [p.detach().clone() for p in params]
    if hasattr(optimizer, "eval") and step % 10 == 9:
        optimizer.eval()
        seen += [p.detach().clone() for p in params]
        optimizer.train()
    return seen


def spelt(options: Options) -> str:
    words = {k: getattr(v, "__name__", v) for k, v in options.items()}
    return ", ".join(f"{name} {value}" for name, value in words.items())


@pytest.mark.parametrize(("peer", "options"), EVERY)
def test_sixty_steps_equal_those_of_the_peer(peer: Peer, options: Options) -> None:
    module, _, name = peer.path.rpartition(".")
    pytest.importorskip(module)
    with double_precision():
        ours, theirs = make(), make()
        rule = getattr(optim, peer.rule)(groups_of(ours, options, single=peer.single), **options)
        others = groups_of(theirs, options, single=peer.single)
        other = getattr(import_module(module), name)(others, **peer.translate(options))
        worst, largest = 0.0, 0.0
        for both in (rule, other):
            getattr(both, "train", lambda: None)()
        for step in range(STEPS):
            found = points(rule, ours, step, needs_loss=rule.needs_loss)
            expected = points(other, theirs, step, needs_loss=rule.needs_loss)
            for a, b in zip(found, expected, strict=True):
                worst, largest = max(worst, (a - b).abs().max().item()), max(largest, b.abs().max().item())
    FOUND.append((peer.rule, peer.path, spelt(options), worst, f"{peer.relative * largest:.0e}"))
    assert worst <= peer.relative * largest
    moved = max((a - b).abs().max().item() for a, b in zip(ours, make(), strict=True))
    assert moved > 0.05, "equal, but for want of steps"


def test_every_rule_has_a_peer_or_a_twin() -> None:
    assert {peer.rule for peer in PEERS} | ALONE == set(optim.__all__)


def test_table_of_differences_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    if not FOUND:
        pytest.skip("nothing was compared")
    with capsys.disabled():
        print("\n\n| rule | peer | options | largest difference | tolerance |\n| --- | --- | --- | --- | --- |")
        for rule, path, options, worst, tolerance in FOUND:
            print(f"| {rule} | {path} | {options} | {worst:.1e} | {tolerance} |")

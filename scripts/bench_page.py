# mypy: disable-error-code="no-untyped-call"
"""Options that the benchmarks share, and the pages they write."""

import os
import platform
import shlex
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from bench_measure import PRECISIONS


class Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults beside every option, the description as it was written."""


def make_parser(description: str, *, device: str, amp: str) -> ArgumentParser:
    """Parser with the options that every benchmark has.

    Args:
        description: What is measured, with examples.
        device: Default of ``--device``.
        amp: Default of ``--amp``.
    """
    parser = ArgumentParser(description=description, formatter_class=Formatter)
    parser.add_argument("--device", default=device, help="cpu, cuda or cuda:N")
    parser.add_argument("--amp", choices=list(PRECISIONS), default=amp, help="autocast of the forward pass")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 leaves torch its own choice")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="gets benchmarks/*.md and images/*.png; docs fits"
    )
    return parser


def ready(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Options as given; the threads are set, and ``device`` is one that is there."""
    options = parser.parse_args(argv)
    try:
        options.device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device {options.device}: choose cpu, cuda or cuda:N.")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine shows no GPU to torch; --device cpu runs a small size.")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def page_head(title: str, script: str, argv: Sequence[str], options: Namespace, packages: Sequence[str]) -> str:
    """Title, command, versions, device.

    Args:
        title: Of the page.
        script: Name of the file that was run.
        argv: Its arguments; ``--out`` is left out, it changes no figure.
        options: The same, read.
        packages: Whose versions matter; one that is absent is named as such.
    """
    command = shlex.join(["python", f"scripts/{script}", *_without_out(argv)])
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", *packages))
    amp = "fp32" if options.amp == "off" else f"autocast {options.amp}"
    return f"# {title}\n\n```\n{command}\n```\n\n{versions}. {device_name(options.device)}, {amp}."


def _without_out(argv: Sequence[str]) -> list[str]:
    words: list[str] = []
    skip = False
    for word in argv:
        if not skip and word != "--out" and not word.startswith("--out="):
            words.append(word)
        skip = word == "--out"
    return words


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    """The device in words; of a CPU its model, cores and threads, of a GPU the settings of cuDNN too."""
    if device.type == "cuda":
        cudnn = torch.backends.cudnn
        return (
            f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {cudnn.version()} "
            f"(benchmark {cudnn.benchmark}, deterministic {cudnn.deterministic}, TF32 {cudnn.allow_tf32})"
        )
    return f"CPU {_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def reason(error: Exception) -> str:
    """Why something failed, in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed ({error.name})"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def write_page(out: Path, name: str, parts: Sequence[str]) -> Path:
    """Writes ``benchmarks/NAME.md`` and gives its path; parts are set apart by empty lines."""
    path = out / "benchmarks" / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def image_path(out: Path, name: str) -> Path:
    """Where the image of a page goes: ``images/NAME.png``; the folder is made."""
    path = out / "images" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

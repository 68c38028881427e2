"""Nothing that is read can run code, and predict speaks to nobody."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import save_image, save_tiny
from tiny_run import tiny_recipe

from medmom.errors import MedmomError
from medmom.train import resume, train

FOLDERS = ("medmom", "models", "optim", "scripts", "tests")
FILES = {
    str(path.relative_to(ROOT)): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "__pycache__" not in path.parts and not any(parent.is_symlink() for parent in path.parents)
}

# Modules that run what they read, or that speak to a network. Tests make bad files with some of them.
FORBIDDEN = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "runpy"}
FORBIDDEN |= {"requests", "urllib", "urllib3", "http", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib", "socket"}
FORBIDDEN |= {"huggingface_hub", "wandb", "mlflow", "sentry_sdk"}

# Functions that run a text, a file or a shell, under any name they are imported by.
NEVER = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pty.spawn", "code.interact"}
NEVER |= {"subprocess.getoutput", "subprocess.getstatusoutput", "shutil.unpack_archive", "logging.config.listen"}
NEVER |= {f"{module}.{name}" for module in ("pickle", "dill", "cloudpickle", "marshal") for name in ("load", "loads")}
NEVER |= {"pickle.Unpickler", "dill.Unpickler", "joblib.load", "shelve.open", "runpy.run_path", "runpy.run_module"}
NEVER |= {f"yaml.{kind}_load{all_}" for kind in ("full", "unsafe") for all_ in ("", "_all")}
NEVER |= {"yaml.load", "yaml.load_all", "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader"}
NEVER |= {
    "pandas.read_pickle",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "torch.export.load",
}
NEVER |= {"torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file", "nibabel.load_pickle"}

# Readers that are safe with one option alone, which must stand in the call.
OPTION = {
    "torch.load": ("weights_only", "True"),
    "numpy.load": ("allow_pickle", "False"),
    "load_from_checkpoint": ("weights_only", "True"),
}
OTHER_NAMES = {"torch.serialization.load": "torch.load", "numpy.lib.npyio.load": "numpy.load"}
DYNAMIC = {f"{module}.?" for module in ("torch", "torch.serialization", "numpy", "os", "yaml", "shutil", "subprocess")}

ALLOWED = {
    # The pages' own examples are run, as their readers would.
    "tests/test_readme.py": {"exec", "compile"},
    "tests/test_transfer.py": {"exec", "compile", "os.system"},
    # What a bad file would run, were it read.
    "tests/test_checkpoint.py": {"eval", "os.system"},
    # Calls to the system that fail on request are replaced by their names.
    "tests/test_paths.py": {"getattr of os"},
    "tests/write_faults.py": {"getattr of os"},
    # What goes to the workers of a data loader is pickled by torch.
    "tests/test_albumented.py": {"pickle.loads"},
    "tests/test_class_module.py": {"pickle.loads"},
}


class Reader:
    """Follows names of one source through imports and assignments to what they stand for."""

    def __init__(self, source: str) -> None:
        self.nodes = list(ast.walk(ast.parse(source)))
        self.meaning: dict[str, str] = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.meaning[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom):
                self.meaning |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in self.nodes:
            if isinstance(node, ast.Assign) and (target := self.name(node.value)):
                names = [name.id for name in node.targets if isinstance(name, ast.Name)]
                self.meaning |= {name: target for name in names if name != target}

    def modules(self) -> Iterator[str]:
        """Everything that is imported, by import or by name."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Call) and self.name(node.func) == "importlib.import_module":
                yield from (text(argument) for argument in node.args[:1])

    def name(self, node: ast.AST) -> str:
        """The dotted name that an expression stands for; empty where it is none."""
        if isinstance(node, ast.Name):
            found = self.meaning.get(node.id, node.id)
        elif isinstance(node, ast.Attribute):
            found = f"{self.name(node.value) or '?'}.{node.attr}"
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute | ast.Call | ast.Name):
            found = f"{self.dictionary(node.value)}.{text(node.slice)}" if self.dictionary(node.value) else ""
        elif isinstance(node, ast.Call) and self.name(node.func) == "getattr" and len(node.args) > 1:
            found = f"{self.name(node.args[0])}.{text(node.args[1])}"
        elif isinstance(node, ast.Call) and self.name(node.func) in ("importlib.import_module", "__import__"):
            found = text(node.args[0]) if node.args else ""
        else:
            found = ""
        found = found.removeprefix("builtins.").removeprefix("__builtins__.")
        return OTHER_NAMES.get(found, found)

    def dictionary(self, node: ast.AST) -> str:
        """The module whose names ``vars(module)`` or ``module.__dict__`` gives; else empty."""
        if isinstance(node, ast.Call) and self.name(node.func) == "vars" and node.args:
            return self.name(node.args[0])
        return self.name(node.value) if isinstance(node, ast.Attribute) and node.attr == "__dict__" else ""


def text(node: ast.AST) -> str:
    """A literal text; ``?`` for what is only known when it runs."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "?"


def unsafe_parts(source: str, *, is_test: bool = False) -> set[str]:
    """Names of what could run code that is read, start a shell or speak to a network, of one source."""
    reader = Reader(source)
    modules = set(reader.modules())
    roots = {module.split(".")[0] for module in modules}
    found = set() if is_test else FORBIDDEN & roots
    found |= {module for module in modules if module in NEVER or module.endswith(".*")}
    called = {id(node.func): node for node in reader.nodes if isinstance(node, ast.Call)}
    for node in reader.nodes:
        if isinstance(node, ast.Call):
            found |= unsafe_call(reader, node)
        if not isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript):
            continue
        name = reader.name(node)
        if name in NEVER:
            found.add(name)
        if name in DYNAMIC:
            found.add(f"getattr of {name.removesuffix('.?')}")
        key = name if name in OPTION else name.split(".")[-1]
        if key in OPTION and not is_safe_call(called.get(id(node)), *OPTION[key]) and is_loaded(node):
            found.add(name)
        if name.endswith((".extractall", ".extract")) and roots & {"zipfile", "tarfile", "shutil"}:
            found.add(name)
    return found


def is_loaded(node: ast.AST) -> bool:
    """Whether the name is used, not set: a function of one's own may be called so."""
    return not isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)


def is_safe_call(call: ast.Call | None, option: str, value: str) -> bool:
    return call is not None and {word.arg: ast.unparse(word.value) for word in call.keywords}.get(option) == value


def unsafe_call(reader: Reader, call: ast.Call) -> set[str]:
    """Shells, and trainers that go on from a checkpoint without saying that it holds weights alone."""
    options = {word.arg: ast.unparse(word.value) for word in call.keywords}
    found = set()
    if options.get("shell", "False") != "False":
        found.add("shell=True")
    trains = isinstance(call.func, ast.Attribute) and call.func.attr in ("fit", "validate", "test", "predict")
    if trains and "ckpt_path" in options and options.get("weights_only") != "True":
        found.add("ckpt_path without weights_only=True")
    if reader.name(call.func) == "import_module" or options.get("allow_pickle", "False") != "False":
        found.add("allow_pickle" if "allow_pickle" in options else "import_module")
    return found


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("import urllib.request", "urllib"),
        ("import importlib\nm = importlib.import_module('dill')", "dill"),
        ("from pickle import *", "pickle.*"),
        ("import torch\ntorch.load(path)", "torch.load"),
        ("import torch\ntorch.load(path, weights_only=False)", "torch.load"),
        ("import torch\ntorch.load(path, weights_only=flag)", "torch.load"),
        ("import torch\ntorch.load(path, **options)", "torch.load"),
        ("import torch as t\nt.load(path)", "torch.load"),
        ("from torch import load\nload(path)", "torch.load"),
        ("from torch import load as read\nread(path)", "torch.load"),
        ("from torch.serialization import load\nload(path)", "torch.load"),
        ("import torch\nread = torch.load\nread(path)", "torch.load"),
        ("import torch\nlist(map(torch.load, paths))", "torch.load"),
        ("import torch\ngetattr(torch, 'load')(path)", "torch.load"),
        ("import torch\ngetattr(torch, name)(path)", "getattr of torch"),
        ("import torch\nvars(torch)['load'](path)", "torch.load"),
        ("import torch\ntorch.__dict__['load'](path)", "torch.load"),
        ("import torch\ntorch.jit.load(path)", "torch.jit.load"),
        ("import numpy as np\nnp.load(path)", "numpy.load"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "numpy.load"),
        ("import numpy as np\nread(path, allow_pickle=True)", "allow_pickle"),
        ("from numpy import load\nload(path)", "numpy.load"),
        ("Task.load_from_checkpoint(path)", "Task.load_from_checkpoint"),
        ("trainer.fit(task, ckpt_path=path)", "ckpt_path without weights_only=True"),
        ("eval('1')", "eval"),
        ("run = exec\nrun(text)", "exec"),
        ("import builtins\nbuiltins.eval(text)", "eval"),
        ("list(map(eval, texts))", "eval"),
        ("compile(text, 'a', 'exec')", "compile"),
        ("import yaml\nyaml.load(text, Loader=yaml.SafeLoader)", "yaml.load"),
        ("import yaml\nyaml.full_load(text)", "yaml.full_load"),
        ("from yaml import unsafe_load as read\nread(text)", "yaml.unsafe_load"),
        ("from yaml import FullLoader", "yaml.FullLoader"),
        ("import tarfile\ntarfile.open(path).extractall(folder)", "?.extractall"),
        ("from zipfile import ZipFile\nwith ZipFile(p) as z:\n    z.extractall()", "z.extractall"),
        ("import shutil\nshutil.unpack_archive(path)", "shutil.unpack_archive"),
        ("import os\nos.system('ls')", "os.system"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell=True"),
    ],
)
def test_unsafe_source_is_found(source: str, part: str) -> None:
    assert part in unsafe_parts(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, map_location='cpu', weights_only=True)",
        "from torch import load\nload(path, weights_only=True)",
        "import numpy as np\nnp.load(path, mmap_mode='r', allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "import nibabel as nib\nnib.load(path)",
        "import re, torch\nre.compile('a')\ntorch.compile(network)\nnetwork.eval()",
        "def load(path):\n    return path\nload(1)",
        "import subprocess\nsubprocess.run(['ls'], check=True)",
        "trainer.fit(task, ckpt_path=path, weights_only=True)",
        "from medmom import models\ngetattr(models, name)",
    ],
)
def test_safe_source_passes(source: str) -> None:
    assert unsafe_parts(source) == set()


def test_every_folder_is_looked_at() -> None:
    assert {name.split("/")[0] for name in FILES} == set(FOLDERS)
    assert "medmom/callbacks.py" in FILES


@pytest.mark.parametrize("name", [name for name in FILES if name != "tests/test_safety.py"])
def test_nothing_unsafe_is_called(name: str) -> None:
    found = unsafe_parts(FILES[name].read_text(encoding="utf-8"), is_test=name.startswith("tests/"))
    assert found == ALLOWED.get(name, set())


class Attack:
    """What pickle would run when it is read: it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_checkpoint_that_would_run_code_is_not_resumed(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, epochs=1), tmp_path / "run", device="cpu", quiet=True)
    last = tmp_path / "run" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    torch.save({**state, "extra": Attack(tmp_path / "attacked")}, last)
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(MedmomError, match=r"last\.ckpt: not a sound checkpoint; delete it") as caught:
        resume(tmp_path / "run", device="cpu", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "attacked").exists()


# Audit hooks see what C code of Python opens as well; what was tried is written down, in case it was caught.
BLOCKED = """
import sys
def hook(event, arguments):
    if event.startswith("socket.") or event in ("urllib.Request", "http.client.connect"):
        with open({tried!r}, "a") as file:
            print(event, arguments[1:], file=file)
        raise OSError("the network is blocked")
sys.addaudithook(hook)
from medmom.cli import main
main(sys.argv[1:])
"""


def run_blocked(tmp_path: Path, home: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command without network, with nothing in the environment but a home."""
    environment = {"PATH": os.environ["PATH"], "HOME": home, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    code = BLOCKED.format(tried=str(tmp_path / "tried"))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("home", ["empty", "unwritable"])
def test_predict_works_without_network_and_leaves_the_home_alone(home: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    for number in range(2):
        save_image(tmp_path / "in" / f"{number}.nii.gz", seed=number)
    (tmp_path / "home").mkdir()
    # A home below a device can be made by nobody, not even by root.
    place = str(tmp_path / "home") if home == "empty" else "/dev/null/home"
    done = run_blocked(tmp_path, place, "predict", model, tmp_path / "in", "--out", tmp_path / "out", "--quiet")
    assert not (tmp_path / "tried").exists(), (tmp_path / "tried").read_text()
    assert done.returncode == 0, done.stderr
    # MONAI imports Matplotlib, which says where its cache goes.
    assert all("matplotlib" in line.lower() for line in done.stderr.splitlines()), done.stderr
    for number in range(2):
        assert np.asarray(nib.load(tmp_path / "out" / f"{number}.nii.gz").dataobj).shape == (12, 10, 8)
    assert {path.name for path in (tmp_path / "home").glob("*/*")} <= {"matplotlib"}
    assert {path.name for path in tmp_path.iterdir()} == {"home", "in", "model", "out"}


def test_blocked_network_is_noticed(tmp_path: Path) -> None:
    code = BLOCKED.format(tried=str(tmp_path / "tried")).replace(
        "from medmom.cli import main", "import _socket\n_socket.socket()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the network is blocked" in done.stderr
    assert "socket.__new__" in (tmp_path / "tried").read_text()

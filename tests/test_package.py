"""The layers as a package: a wheel, installed beside torch alone, outside the checkout."""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

import norms

ROOT = Path(__file__).parents[1]

USE = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from torch import nn
import smallbatch

assert smallbatch.__version__ == VERSION
for library in ("norms", "models", "training", "numpy", "timm", "hydra"):
    try:
        __import__(library)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{library} is there")

def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2)),
    )

for name in smallbatch.names():
    try:
        scheme = smallbatch.build(name, batch_size=2)
    except ValueError as error:
        print(error)
        continue
    smallbatch.conversion(network(), scheme)
    try:
        model = smallbatch.convert(network(), scheme)
    except ValueError as error:
        print(error)
        continue
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(2, 3, 9, 9)), torch.tensor([0, 1])).backward()
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    x = torch.randn(4, 3, 9, 9)
    torch.testing.assert_close(smallbatch.fold(model)(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    print(name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without network from a copy, since a build leaves folders in the source."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("norms", "training"):
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=without)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(source / "dist"), str(source))
    [made] = (source / "dist").glob("*.whl")
    return made


def pip(command: str, *args: str) -> None:
    own = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *own, *args], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def requirements(name: str) -> Iterator[str]:
    """The distributions that an installed one needs, itself included; extras aside."""
    yield name
    for line in distribution(name).requires or []:
        needed, _, marker = line.partition(";")
        child = re.match(r"[\w.-]+", needed)
        if child and "extra ==" not in marker and installed(child[0]):
            yield from requirements(child[0])


def installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except ModuleNotFoundError:  # of another system or Python
        return False


def test_the_wheel_holds_the_layers_alone(wheel):
    """So that nothing of it comes before the folders of a checkout."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(n).decode() for n in names if n.endswith("/METADATA")]
    assert {n.partition("/")[0] for n in names} == {
        "smallbatch",
        f"smallbatch-{norms.__version__}.dist-info",
    }
    assert {Path(n).name for n in names if n.startswith("smallbatch/")} == {
        file.name for file in (ROOT / "norms").glob("*.py")
    }
    needed = re.findall(r"^Requires-Dist: (.*)$", metadata, re.M)
    assert [line for line in needed if "extra ==" not in line] == ["torch>=2.11"]


def test_it_converts_trains_and_folds_beside_torch_alone(wheel, tmp_path):
    beside, place = tmp_path / "torch_alone", tmp_path / "installed"
    beside.mkdir()
    for name in set(requirements("torch")):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (beside / top).exists():
                (beside / top).symlink_to(found.locate_file(top))
    pip("install", "--target", str(place), str(wheel))
    program = tmp_path / "use.py"
    program.write_text(USE.replace("VERSION", repr(norms.__version__)))
    warnings = ["-W", "error", "-W", "ignore:Failed to initialize NumPy"]  # of PyTorch alone
    done = subprocess.run(
        [sys.executable, "-I", "-S", *warnings, str(program), str(place), str(beside)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    wrapped = [line for line in said if "timm" in line]
    assert wrapped == [
        f"norm={name}: wraps a layer of timm, which is missing; pip install timm"
        for name in ("evonorm_b0", "evonorm_s0", "frn")
    ]
    blocks = [line for line in said if "has no residual block" in line]
    refused = ["evonorm_b0", "evonorm_s0", "frn", "nf", "xbn"]
    assert [line.split(":")[0] for line in blocks] == ["norm=nf", "norm=xbn"]
    assert sorted([*said, *refused]) == sorted([*norms.names(), *wrapped, *blocks])

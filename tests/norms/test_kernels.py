"""The kernels for a GPU, without one: interpreted, and compiled."""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from norms import moments

FILE = Path(__file__).with_name("interpreted.py")
TRITON = importlib.util.find_spec("triton")  # PyTorch comes without for some systems


def test_systems_without_triton_have_no_kernels():
    assert (moments._triton() is None) == (TRITON is None)


@pytest.mark.skipif(TRITON is None, reason="no Triton for this system")
def test_interpreted():
    """In a process of its own: Triton must be imported anew."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", str(FILE)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=FILE.parents[2],
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]


SIZES = "n parts C L K N S rows count area dn dc dp xn xc xp"
# Tiles and options. Triton compiles a size of 1 as a constant.
MABN = dict(OWN=100, FREE=1000, MOMENTUM=0.98, EPS=1e-5, W=13, P=16, R=8, B=16)
BCN = dict(RATE=0.1, EPS=1e-5, BN_EPS=1e-5, P=4, B=8)
ONES = dict(N=1, S=1, area=1)
KERNELS = [
    ("kernels._moments", dict(P=32, B=4, CENTERED=True)),
    ("kernels._moments", dict(P=4, B=32, CENTERED=False)),
    ("kernels._pool", dict(R=8, B=16)),
    ("kernels._sums", dict(P=32, B=4, CENTERED=True, rows=0)),
    ("kernels._sums", dict(P=4, B=32, CENTERED=False)),
    ("kernels._combine", dict(P=32, B=4, GRADIENT=True, SHIFT=False)),
    ("kernels._combine", dict(P=4, B=32, GRADIENT=False, SHIFT=True)),
    ("number_kernels._mabn_forward", MABN),
    ("number_kernels._mabn_forward", MABN | dict(W=1, P=1, rows=1)),
    ("number_kernels._mabn_backward", MABN),
    ("number_kernels._mabn_backward", MABN | dict(W=1, P=1, rows=1, n=1)),
    ("number_kernels._bcn_forward", BCN | dict(ESTIMATED=True)),
    ("number_kernels._bcn_forward", BCN | ONES | dict(ESTIMATED=True, count=1)),
    ("number_kernels._bcn_forward", BCN | dict(ESTIMATED=False)),
    ("number_kernels._bcn_backward", BCN | dict(THROUGH=True)),
    ("number_kernels._bcn_backward", BCN | ONES | dict(THROUGH=True)),
    ("number_kernels._bcn_backward", BCN | dict(THROUGH=False)),
]


@pytest.mark.skipif(TRITON is None, reason="no Triton for this system")
@pytest.mark.parametrize("number", ["fp32", "fp64"])
@pytest.mark.parametrize(("kernel", "constants"), KERNELS)
def test_compiled(kernel, constants, number, tmp_path, monkeypatch):
    """For a card of compute capability 9.0: as far as one gets without it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, name = kernel.split(".")
    function = getattr(importlib.import_module(f"norms.{module}"), name)
    constants = constants | {"ACC": getattr(triton.language, number.replace("fp", "float"))}
    names = list(inspect.signature(function.fn).parameters)
    constants = {k: v for k, v in constants.items() if k in names}
    types = {"own": "*i1", "tracked": "*i64"} | dict.fromkeys(SIZES.split(), "i32")
    signature = {n: "constexpr" if n in constants else types.get(n, f"*{number}") for n in names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "ld.global" in compiled.asm["ptx"]

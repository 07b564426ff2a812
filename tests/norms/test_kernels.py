"""The kernels for a GPU, without one: Triton must be imported anew to be interpreted."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from norms import moments

FILE = Path(__file__).with_name("interpreted.py")


def test_interpreted():
    if not importlib.util.find_spec("triton"):  # PyTorch comes without for this system
        assert moments._triton() is None
        return
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", str(FILE)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=FILE.parents[2],
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]

"""Every command of README, CONTRIBUTING and docs/: run where a test can, composed and checked where
it needs a GPU, a cluster, a download or hours. A command that this file does not know fails."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import norms
from tests.data.folders import noise
from tests.processes import Forked
from training import config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINE = re.compile(r"^    ((?:python|make|tensorboard|torchrun|pip|bash) (?:.*\\\n)*.*)$", re.M)


def commands(*starts):
    found = []
    for page in PAGES:
        for text in LINE.findall(page.read_text()):
            words = shlex.split(text.replace("\\\n", " "), comments=True)
            if any(words[: len(start.split())] == start.split() for start in starts):
                found.append(pytest.param(words, id=" ".join(words)[:90]))
    return found


KNOWN = ("make", "tensorboard", "torchrun", "pip install", "python train.py")
SCRIPTS = ("plan", "study", "table", "export", "evaluate", "probe", "prepare_imagenet")


def test_no_command_is_left_out():
    known = commands(*KNOWN, *(f"python scripts/{name}.py" for name in SCRIPTS))
    assert len(known) > 25
    assert len(known) == sum(len(LINE.findall(page.read_text())) for page in PAGES)


@pytest.mark.parametrize("words", commands("make"))
def test_make_has_the_target(words):
    made = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("words", commands("pip install"))
def test_what_is_installed_is_this_folder(words):
    assert words == ["pip", "install", "."]  # which tests/test_package.py does


@pytest.fixture
def folder(tmp_path):
    return noise(tmp_path / "images", " ".join("abcdefghij"), train=2, test=1)


def is_run(words):
    text = " ".join(words)
    return not re.search(r"imagenet|resnet50|timm|densenet|launcher=|cifar10_table", text)


def ends(words):
    """With the first and the last value of every list, for time."""
    return [re.sub(r"=([^,\[]+),.*,", r"=\1,", word) for word in words]


@pytest.mark.parametrize("words", commands("python train.py", "torchrun"))
def test_training(words, train, folder):
    words = [w for w in words[words.index("train.py") + 1 :] if w != "..."]
    if "data=cifar10" in words:  # which would be downloaded
        words += [f"data.root={folder}", "protocol.sgd_batch=4", "protocol=ghost"]
    if is_run(words):
        done = train(*ends(words), "recipe.epochs=1")
        assert done.status == 0, done.err
        assert "--help" in words or list(done.runs.glob("*/*/result.json"))
        return
    words = [w.replace("PATH", str(folder)) for w in words if not w.startswith("-")]
    sweep = OverridesParser.create().parse_overrides(words)
    for combination in BasicSweeper.split_arguments(sweep, None)[0]:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose("config", combination, return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
            config.check(cfg)
        assert cfg.norm.name in norms.names()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """runs/mine of two runs."""
    place = tmp_path_factory.mktemp("trained")
    keys = [f"runtime.runs={place / 'runs'}", "recipe.updates=9", "probe=batch_statistics"]
    keys += ["runtime.threads=1", "norm=bn,gn", "batch=2", "study=mine"]
    process = Forked(["-m", *keys])
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    return place


@pytest.fixture
def study(trained, tmp_path, monkeypatch):
    """The same in the test's own folder."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "mine"


@pytest.mark.parametrize("words", commands(*(f"python scripts/{name}.py" for name in SCRIPTS[:-1])))
def test_scripts(words, study, monkeypatch, capfd):
    run = str(next(study.glob("bn-b2-s0*")))
    values = {"RUN": run, "RUN...": run, "runs/STUDY": "runs/mine"}
    words = [values.get(word, word) for word in words[1:] if word != "--watch"]  # forever
    if words[0].endswith("plan.py"):
        words = [words[0], "batch=2", "seed=0", *ends(words[1:])]  # a part of what a preset has
        words += ["--speed", "1000"]  # which it would measure
    monkeypatch.setattr(sys, "argv", words)
    status = None
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    assert not status, capfd.readouterr().err


@pytest.mark.parametrize("words", commands("tensorboard"))
def test_tensorboard(words, study):
    binary = Path(sys.executable).with_name("tensorboard")
    subprocess.run([binary, "--inspect", *words[1:]], check=True, capture_output=True)


@pytest.mark.parametrize("words", commands("python scripts/prepare_imagenet.py"))
def test_preparing_imagenet_takes_these_words(words):
    """The script itself: tests/scripts/test_prepare_imagenet.py."""
    shown = subprocess.run(
        [sys.executable, words[1], "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(word in shown.stdout for word in words if word.startswith("--"))


def test_the_example_trains(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "smallbatch", norms)
    monkeypatch.setattr(sys, "argv", ["own_network.py", "--steps", "2"])
    runpy.run_path(str(ROOT / "examples" / "own_network.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["bn", "gn", "ws_gn", "bcn", "mabn"]


def test_the_code_of_the_library_page(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "smallbatch", norms)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S)
    exec(compile(code, "library.md", "exec"), {})
    assert "BatchNorm2d" in capsys.readouterr().out

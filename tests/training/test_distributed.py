"""Several processes, as torchrun starts them, against one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from torch.optim.swa_utils import update_bn

import data
from tests.processes import Forked, fork_ranks, free_port
from tests.training.test_step import PLAN, batches, network, recipe
from training import distributed, evaluation
from training.protocol import Plan
from training.restore import configuration
from training.restore import network as network_of
from training.step import Step

ROOT = Path(__file__).parent.parent.parent
SMALL = ["data.train_fraction=0.2", "runtime.threads=1", "study=s"]


def words(runs: Path, *args: str) -> list[str]:
    sweep = any("," in x for x in args)
    return [*(["-m"] if sweep else []), *SMALL, f"runtime.runs={runs}", *args]


TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def launch(runs: Path, *args: str, by: list[str] = TWO) -> subprocess.Popen[str]:
    """The command in an interpreter of its own, or by torchrun in two."""
    return subprocess.Popen(
        [sys.executable, *by, str(ROOT / "train.py"), *words(runs, *args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"},
    )


def run(processes: int, runs: Path, *args: str) -> tuple[int, str, str]:
    """The command in so many processes: the first status that is not 0, and what they all said."""
    command = words(runs, *args)
    started = fork_ranks(processes, command) if processes > 1 else [Forked(command)]
    said = [process.communicate() for process in started]
    out, err = ("".join(texts) for texts in zip(*said, strict=True))
    return next((p.returncode for p in started if p.returncode), 0), out, err


def folder(runs: Path, name: str = "") -> Path:
    [found] = (runs / "s").glob(f"{name}*/")
    return found


def checkpoint(runs: Path, name: str = "") -> dict:
    return torch.load(folder(runs, name) / "last.pt", weights_only=True)


def result(runs: Path, name: str = "") -> dict:
    return json.loads((folder(runs, name) / "result.json").read_text())


def until(condition, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


GHOST = ["norm=bn,gn,ws_gn,pws", "batch=4", "protocol=ghost", "protocol.sgd_batch=24"]
GHOST.append("recipe.updates=5")  # later a rounding error may turn a ReLU around


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Runs of a single process."""
    runs = tmp_path_factory.mktemp("one")
    status, _, err = run(1, runs, *GHOST)
    assert status == 0, err
    return runs


@pytest.mark.parametrize(
    ("processes", "norms"), [(2, ["bn", "gn", "ws_gn", "pws"]), (3, ["bn", "gn"])]
)
def test_processes_share_an_sgd_batch(one, tmp_path, processes, norms):
    """Without batch statistics, and with those of a process's own batches, many processes compute
    what one computes under `ghost`."""
    many = tmp_path / "many"
    status, out, err = run(processes, many, f"norm={','.join(norms)}", *GHOST[1:])
    assert status == 0, err
    assert "error" not in err
    assert out.count("top-1") == len(norms), out  # said once
    assert f"on each of {processes} devices, one forward pass" in out
    for norm in norms:
        ours, theirs = checkpoint(one, f"{norm}-"), checkpoint(many, f"{norm}-")
        assert "others" not in ours
        assert len(theirs["others"]) == processes - 1
        for key, value in ours["model"].items():
            if "running_" not in key and "num_batches" not in key:
                torch.testing.assert_close(value, theirs["model"][key], rtol=1e-4, atol=1e-5)
        ours, theirs = result(one, f"{norm}-"), result(many, f"{norm}-")
        assert theirs["devices"] == processes
        assert (ours["sgd_batch_size"], ours["learning_rate"], ours["updates"]) == (
            theirs["sgd_batch_size"],
            theirs["learning_rate"],
            theirs["updates"],
        )
        if norm != "bn":  # evaluation counts every test image once, 359 of them
            assert theirs["test_loss"] == pytest.approx(ours["test_loss"], rel=1e-4)
            assert theirs["top1"] == pytest.approx(ours["top1"], abs=0.6)


def test_each_process_has_its_own_running_statistics(tmp_path):
    args = ["norm=bn", "batch=4", "recipe.updates=6", "data.train_fraction=0.1"]
    for rule in ("first", "mean"):
        runs = tmp_path / rule
        status, _, err = run(2, runs, *args, f"protocol.running_statistics={rule}")
        assert status == 0, err
        state = checkpoint(runs)
        [other] = state["others"]
        counts = [v for k, v in state["model"].items() if k.endswith("num_batches_tracked")]
        assert counts
        assert all(count == 6 for count in counts)
        for key, value in other["buffers"].items():
            if "running_" in key:
                assert torch.equal(value, state["model"][key]) == (rule == "mean"), key
    names = [folder(tmp_path / rule).name for rule in ("first", "mean")]
    assert len(set(names)) == 2
    assert result(tmp_path / "first")["sgd_batch_size"] == 8  # direct: a batch on each device


LONG = ["norm=mabn", "batch=4", "recipe.epochs=2", "runtime.log_every=5"]


def test_a_lost_process_ends_the_run_and_the_same_command_goes_on(tmp_path):
    status, _, err = run(2, tmp_path / "undisturbed", *LONG)
    assert status == 0, err

    runs = tmp_path / "disturbed"
    command = [*LONG, "checkpoint.every_updates=10"]
    process = launch(runs, *command)
    until(lambda: list(runs.glob("s/*/last.pt")), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {_environment(int(pid)).get("RANK"): int(pid) for pid in children}
    os.kill(ranks["1"], signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, err
    assert "process 0 of 2: lost another process of this run" in said[0]
    assert "the same command goes on from the last checkpoint" in said[0]

    (folder(runs) / "progress.json").unlink()
    process = launch(runs, *command)
    until(lambda: (folder(runs) / "progress.json").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "interrupted; the same command goes on from here, after update" in err

    status, out, err = run(2, runs, *command)
    assert status == 0, err
    assert "goes on after update" in out
    ours, theirs = checkpoint(tmp_path / "undisturbed"), checkpoint(runs)
    assert all(torch.equal(value, theirs["model"][key]) for key, value in ours["model"].items())
    [ours], [theirs] = ours["others"], theirs["others"]
    assert all(torch.equal(value, theirs["buffers"][key]) for key, value in ours["buffers"].items())

    status, _, err = run(1, runs, *LONG, f"name={folder(runs).name}")
    assert status == 1
    assert "devices is 2 there and absent here" in err


def test_three_processes_go_on_bit_for_bit():
    """Where the order in which gradients are added up could change a bit."""
    for process in fork_ranks(3, [], ROOT / "tests" / "training" / "going_on.py"):
        _, err = process.communicate()
        assert process.returncode == 0, err
        assert "Warning" not in err


class Unused(torch.nn.Module):
    """A linear layer, and one that nothing comes to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = torch.nn.Linear(64, 3), torch.nn.Linear(64, 3)

    def forward(self, x):
        return self.used(x.flatten(1))


def test_an_unused_parameter_has_no_gradient_in_company_either(monkeypatch):
    """So no weight decay takes anything from it. A group of one process, which averages nothing, in
    two passes an update."""
    alone, together = Unused(), Unused()
    steps = [Step(alone, PLAN, recipe())]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with monkeypatch.context() as several:
            several.setattr(distributed, "world_size", lambda: 2)
            plan = Plan(batch=4, sgd_batch=16, devices=2, micro_batch=4, lr=0.1)
            steps.append(Step(together, plan, recipe()))
            for images, labels in batches(3):
                for step in steps:
                    step(images, labels, 0.1)
    finally:
        dist.destroy_process_group()
    assert alone.unused.weight.grad is None
    assert together.unused.weight.grad is None
    for key, value in Unused().state_dict().items():
        assert torch.equal(together.state_dict()[key], alone.state_dict()[key]), key
        assert torch.equal(together.state_dict()[key], value) == key.startswith("unused"), key


def _environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(x.decode().split("=", 1) for x in pairs if b"=" in x)


def test_mistakes_are_told_once(tmp_path):
    process = launch(tmp_path, "norm=gn", "protocol=ghost", "protocol.sgd_batch=31")
    _, err = process.communicate()
    assert process.returncode == 1
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, err
    assert "protocol.sgd_batch=31: expected a multiple of batch=32 times 2 devices" in said[0]


PARTNERS = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a whole number from 1; torchrun sets"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected a whole number from 1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: needs RANK as well"),
        ({"RANK": "1"}, "RANK=1: expected less than WORLD_SIZE=1"),
        (PARTNERS | {"RANK": "2"}, "RANK=2: expected less than WORLD_SIZE=2"),
        (PARTNERS | {"MASTER_ADDR": ""}, "WORLD_SIZE=2: needs MASTER_ADDR as well"),
        (PARTNERS | {"MASTER_PORT": "http"}, "MASTER_PORT=http: expected a whole number from 0"),
    ],
)
def test_variables_that_nobody_sets(train, monkeypatch, variables, told):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused = train("norm=gn")
    assert refused.status == 2
    assert refused.err.startswith(f"error: {told}")
    assert len(refused.err.splitlines()) == 1


def test_an_empty_variable_is_none(monkeypatch):
    for name in PARTNERS:
        monkeypatch.setenv(name, "")
    distributed.check_environment()
    assert (distributed.world_size(), distributed.rank(), distributed.local_rank()) == (1, 0, 0)


def test_a_process_says_for_whom_it_waits(tmp_path):
    port = free_port()
    command = [sys.executable, str(ROOT / "train.py"), f"runtime.runs={tmp_path}"]
    environment = os.environ | PARTNERS | {"MASTER_PORT": port}
    waiting = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    line = waiting.stderr.readline()
    waiting.terminate()
    waiting.communicate()
    assert line.startswith(f"process 0 of 2 waits for the others at 127.0.0.1:{port}, for 0:30:00")
    assert waiting.returncode == -signal.SIGTERM


def test_launchers_are_not_for_torchrun(train, monkeypatch):
    for name, value in PARTNERS.items():
        monkeypatch.setenv(name, value)
    refused = train("-m", "hydra/launcher=pool", "seed=0,1")
    assert refused.status == 1
    assert refused.err.startswith("error: hydra/launcher=pool: 2 processes were started for each")
    assert not refused.runs.exists()


def test_submitit_starts_the_processes_of_a_run(tmp_path):
    args = ["hydra/launcher=submitit_local", "devices=2", "norm=gn,ln", "recipe.updates=3"]
    process = launch(tmp_path, *args, "batch=4", by=[])
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert [result(tmp_path, x)["devices"] for x in ("gn", "ln")] == [2, 2]


def test_devices_are_those_that_there_are(train):
    outcome = train("devices=3")
    assert outcome.status == 1
    assert "devices=3: 1 process started this run; expected torchrun" in outcome.err


def test_a_checkpoint_of_another_number_of_processes_is_refused():
    model = torch.nn.Linear(2, 2)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        recipe = compose("config").recipe
    step = Step(model, Plan(batch=2, sgd_batch=4, devices=2, micro_batch=2, lr=0.1), recipe)
    with pytest.raises(ValueError, match="devices=2: the checkpoint is of 1 processes"):
        step.load_state_dict({})


def test_each_process_gets_its_own_buffers_back(monkeypatch):
    """Those of the network and of its moving average; the rest is the same in all of them."""
    step = Step(network("bn"), PLAN, recipe(ema=0.5))
    for images, labels in batches(2):
        step(images, labels, 0.1)
    first = step.state_dict()
    own = {**step.rng(), "buffers": {}, "ema": {}}
    for part, values in (("model", own["buffers"]), ("ema", own["ema"])):
        values |= {k: v + 1 for k, v in first[part].items() if "running_" in k}
    assert own["ema"]
    state = first | {"others": [own]}
    plan = Plan(batch=4, sgd_batch=16, devices=2, micro_batch=4, lr=0.1)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        again = Step(network("bn"), plan, recipe(ema=0.5))
        again.load_state_dict(state)
        for part, model in (("model", again.model), ("ema", again.eval_model)):
            for key, value in model.state_dict().items():
                there = first[part][key] + (rank if "running_" in key else 0)
                assert torch.equal(value, there), (rank, part, key)


def test_statistics_for_evaluation_are_those_of_all_processes(tmp_path):
    """Each estimates over its own images, all evaluate by the mean; the frozen tail begins with it
    and stays the same everywhere."""
    by = ["evaluation.statistics=precise", "evaluation.batches=6", "evaluation.batch_size=20"]
    args = ["norm=bn", "batch=4", "recipe.epochs=2", *by]
    for name, keys in {"precise": [], "frozen": ["recipe.freeze_statistics=1"]}.items():
        status, _, err = run(2, tmp_path / name, *args, *keys)
        assert status == 0, err
    state, [other] = checkpoint(tmp_path / "frozen"), checkpoint(tmp_path / "frozen")["others"]
    for key, value in other["buffers"].items():
        assert torch.equal(value, state["model"][key]), key

    path = folder(tmp_path / "precise")
    cfg = configuration(path)
    plan = Plan(4, 8, 2, 4, 0.1)
    source = data.resolve(cfg.data, 8, cfg.recipe)
    found = []
    for rank in (0, 1):
        where = torch.device("cpu")
        loader = data.load(
            *(source, cfg.data, cfg.recipe, 8, cfg.seed, where), rank=rank, world_size=2
        )
        _, model = network_of(cfg, plan, 10, 1)
        model.load_state_dict(torch.load(path / "last.pt", weights_only=True)["model"])
        for layer in evaluation.batch_norms(model):
            layer.batch_size = None
        seen = torch.cat([images for images, _ in loader.train(0)])
        update_bn(seen[:60].split(20), model)
        found.append(model)
    for ours, theirs in zip(found[0].buffers(), found[1].buffers(), strict=True):
        if ours.is_floating_point():
            ours.add_(theirs).div_(2)
    whole = data.load(source, cfg.data, cfg.recipe, 8, cfg.seed, torch.device("cpu"))
    expected = evaluation.evaluate(found[0], whole.test(500))
    made = result(tmp_path / "precise")
    assert made["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-5)
    assert made["evaluation"]["statistics"] == "precise"

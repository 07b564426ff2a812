"""hydra/launcher=pool: the runs of a sweep on one machine, each in a process of its own.

A queue of places, which are GPUs (`runs_per_gpu` times each) or shares of the CPU: a run takes one,
sees only that GPU and its share of the CPU threads, and writes what it says into its own log.txt. A
failing or killed run takes nobody with it. A signal that stops the launcher stops all of them; when
it is killed they stop as well, since each watches the pipe from it. The same command then goes on.
"""

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress, TaskID

from training.cli import GRACE_SECONDS, WORKER, Report
from training.config import search_path
from training.files import read, write
from training.progress import columns, console, log
from training.study import Cell, cells, state

MOST = 1024  # threads or runs


@dataclass
class Worker:
    """A run in its process."""

    cell: Cell
    index: int
    place: str
    process: subprocess.Popen[bytes]
    task: TaskID


class PoolLauncher(Launcher):
    """Hydra makes one from configs/hydra/launcher/pool.yaml, which explains the arguments."""

    def __init__(
        self,
        workers: int | None = None,
        gpus: Sequence[int | str] | None = None,
        runs_per_gpu: int = 1,
        threads: int | None = None,
    ):
        for key, value in dict(workers=workers, runs_per_gpu=runs_per_gpu, threads=threads).items():
            if value is not None and (type(value) is not int or not 1 <= value <= MOST):
                above = f" to {MOST}" if type(value) is int and value > MOST else ""
                expected = f"expected a whole number from 1{above}"
                raise ValueError(f"hydra.launcher.{key}={value}: {expected}")
        if gpus is not None and (isinstance(gpus, str) or not isinstance(gpus, Sequence)):
            raise ValueError(f"hydra.launcher.gpus={gpus}: expected a list, such as [0,2] or []")
        self.workers, self.gpus = workers, gpus
        self.runs_per_gpu, self.threads = runs_per_gpu, threads

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.script = inspect.getfile(task_function)
        self.config = config

    def places(self) -> list[str]:
        """What CUDA_VISIBLE_DEVICES is for each of the runs at a time; "" without a GPU."""
        device = str(self.config.device)
        gpus = self.gpus
        if device == "cpu":
            gpus = []
        elif device.startswith("cuda:"):
            raise ValueError(f"device={device}: pool chooses; name GPUs with hydra.launcher.gpus")
        elif gpus is None:
            import torch

            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            count = torch.cuda.device_count()
            gpus = visible if count and visible[0] else range(count)
        # The first run on every GPU before the second on one.
        places = [str(gpu) for _ in range(self.runs_per_gpu) for gpu in gpus]
        return places or [""] * (self.workers or cores())

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        self.listings: dict[str, Any] = {}
        """Of images that finished runs saw, by the keys that name them."""
        found = search_path(self.config.hydra)
        todo = list(enumerate(cells([[*found, *overrides] for overrides in job_overrides])))
        returns = {index: done for index, cell in todo if (done := self.skip(cell))}
        todo = [(index, cell) for index, cell in todo if index not in returns]
        if not todo:
            return [returns[index] for index in sorted(returns)]
        free = self.places()
        self.threads_per_run = self.threads or max(1, cores() // len(free))
        log.info(
            f"{len(todo)} runs, {len(free)} at a time, CPU threads of each: {self.threads_per_run}"
            + (f"; GPUs {', '.join(dict.fromkeys(free))}" if free[0] else "")
        )
        working: list[Worker] = []
        with Progress(
            *columns("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        ) as self.board:
            count, over = len(todo), 0
            everything = self.board.add_task("study", total=count, text=f"0/{count} runs")
            try:
                while todo or working:
                    while todo and free:
                        index, cell = todo.pop(0)
                        working.append(self.start(cell, index, free.pop(0)))
                    time.sleep(0.2)
                    for worker in list(working):
                        if worker.process.poll() is None:
                            self.show(worker)
                            continue
                        working.remove(worker)
                        free.append(worker.place)
                        returns[worker.index] = self.end(worker)
                        over += 1
                        self.board.update(everything, completed=over, text=f"{over}/{count} runs")
            except KeyboardInterrupt as interrupt:
                self.stop(working)
                interrupt.add_note("the same command goes on with these runs, as said of each")
                raise
            finally:
                for worker in working:  # whatever else ended the launcher
                    close(worker.process)
        return [returns[index] for index in sorted(returns)]

    def skip(self, cell: Cell) -> JobReturn | None:
        """What a run has left that is over already, without a process for it."""
        from training.run import differences

        now = state(cell.folder).name
        over = now in ("finished", "diverged")
        if not over or cell.cfg.overwrite or differences(cell.folder, cell.cfg):
            return None  # a process will refuse it, or start it again
        if self.data_differ(cell):
            return None
        log.info(f"{cell.folder}: {now} already, skipped")
        return self.completed(cell)

    def data_differ(self, cell: Cell) -> bool:
        """Whether the images that a run saw are others by now, or cannot be found."""
        if cell.cfg.data.get("root") is None:
            return False
        import data  # with torch, which other studies do without
        from training import dataset

        key = OmegaConf.to_yaml(cell.cfg.data, resolve=True) + str(cell.cfg.recipe.crop)
        try:
            if key not in self.listings:
                self.listings[key] = data.resolve(cell.cfg.data, 1, cell.cfg.recipe).listing
            return bool(dataset.compare(cell.folder, cell.cfg, self.listings[key]))
        except (ValueError, OSError):
            return True

    def start(self, cell: Cell, index: int, place: str) -> Worker:
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / "error.txt").unlink(missing_ok=True)  # of an earlier attempt
        environment = os.environ | {WORKER: "pool", "OMP_NUM_THREADS": str(self.threads_per_run)}
        overrides = list(cell.overrides)
        if place:
            environment["CUDA_VISIBLE_DEVICES"] = place
            overrides.append("device=cuda")  # rather than auto, which would be content without
        with open(cell.folder / "log.txt", "ab") as output:
            process = subprocess.Popen(
                [sys.executable, self.script, *overrides],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # Ctrl-C on the terminal reaches the launcher alone
            )
        task = self.board.add_task(f"  {cell.folder.name}", total=None, text="starting")
        return Worker(cell, index, place, process, task)

    def show(self, worker: Worker) -> None:
        if console.is_terminal:
            now = state(worker.cell.folder)
            text = f"{now.update}/{now.updates} updates" if now.updates else "starting"
            total = now.updates or None
            self.board.update(worker.task, completed=now.update, total=total, text=text)

    def end(self, worker: Worker) -> JobReturn:
        """What a run whose process is over has left, and a line about it."""
        self.board.remove_task(worker.task)
        close(worker.process)
        cell, code = worker.cell, worker.process.returncode
        before = state(cell.folder).name
        over = before in ("finished", "diverged")
        if code < 0 and not over and before != "failed":
            name = signal.Signals(-code).name
            why = f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
            write(cell.folder / "error.txt", f"{why}; it can go on from its last checkpoint\n")
        now = state(cell.folder)
        if code > 0 or (code < 0 and not over):
            last = last_line(cell.folder / "log.txt").removeprefix("error: ")
            return self.failed(cell, now.text if now.name == "failed" else last)
        log.info(
            f"{cell.folder}: {now.name} {now.text}" if over else last_line(cell.folder / "log.txt")
        )
        return self.completed(cell)

    def stop(self, working: list[Worker]) -> None:
        """End what still runs: with a checkpoint if that takes no longer than `GRACE_SECONDS`. A
        line of each says what came of it."""
        for worker in working:
            worker.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in working:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            folder, code = worker.cell.folder, worker.process.returncode
            if code == 128 + signal.SIGTERM:
                log.info(f"{folder}: {last_line(folder / 'log.txt')}")
            elif code == -signal.SIGTERM and state(folder).name in ("waiting", "interrupted"):
                log.info(f"{folder}: interrupted while it started; nothing is lost")
            else:  # by itself, or not in time
                self.end(worker)

    def failed(self, cell: Cell, reason: str) -> JobReturn:
        """Counted and said, so that nothing is left for Hydra to raise."""
        Report.failed(cell.overrides, reason, f" ({cell.folder / 'log.txt'})")
        return JobReturn(overrides=cell.overrides, status=JobStatus.COMPLETED, _return_value=None)

    def completed(self, cell: Cell) -> JobReturn:
        file = cell.folder / "result.json"
        top1 = read(file, "top1")["top1"] if file.exists() else None
        return JobReturn(overrides=cell.overrides, status=JobStatus.COMPLETED, _return_value=top1)


def close(process: subprocess.Popen[bytes]) -> None:
    """The pipe to it, at which it stops."""
    if process.stdin:
        process.stdin.close()


def last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

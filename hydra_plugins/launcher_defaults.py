"""What the launchers of other packages need to know of this project, in place of their defaults.

Their option names stay (`hydra/launcher=submitit_slurm`), and Hydra does not allow a file of such a
name in configs/. Their keys can be given as ever (`hydra.launcher.partition=gpu`).
"""

from contextlib import suppress
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin


def options() -> dict[str, Any]:
    """Of those that are installed."""
    logs = "${runtime.runs}/${study}/.submitit/%j"  # what each run says
    processes: Any = "${devices}"  # of each run, on one machine unless other keys are given
    found: dict[str, Any] = {}
    with suppress(ModuleNotFoundError):
        from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

        found["submitit_local"] = LocalQueueConf(
            submitit_folder=logs, timeout_min=24 * 60, tasks_per_node=processes
        )
        # A run that is preempted or comes to its time limit is queued again, up to 100 times, and
        # finds its checkpoint.
        found["submitit_slurm"] = SlurmQueueConf(
            submitit_folder=logs,
            name="${study}",
            tasks_per_node=processes,
            timeout_min=4 * 60,
            max_num_timeout=100,
        )
    with suppress(ModuleNotFoundError):
        from hydra_plugins.hydra_ray_launcher._config import RayConf, RayLauncherConf

        here = {"address": None, "include_dashboard": False}
        run = {"num_cpus": 1, "num_gpus": 0, "max_calls": 1}  # a fresh process for every run
        found["ray"] = RayLauncherConf(ray=RayConf(init=here, remote=run))
    return found


class LauncherDefaults(SearchPathPlugin):
    """Hydra calls this when it has imported all plug-ins and before it composes anything."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for name, node in options().items():
            ConfigStore.instance().store(group="hydra/launcher", name=name, node=node)

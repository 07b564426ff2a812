"""TensorBoard: a run's curves, hyper-parameters and result in its folder, a study's table, figures
and curves in the folder `table` beside its runs.

Scalars shows what it finds. HParams, the table of all runs, and Custom Scalars, charts that overlay
runs, must be told what to show. Every run says the same, of which TensorBoard takes one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from training.distributed import rank_zero_only

SCALARS = {  # column of metrics.csv: tag
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "train_top1": "accuracy/train",
    "test_top1": "accuracy/test",
    "test_top5": "accuracy/test_top5",
    "learning_rate": "run/learning_rate",
    "images_per_second": "run/images_per_second",
}
RESULTS = {  # key of result.json, with the tag result/<key>: column of HParams
    "top1": "top-1 (%)",
    "best_top1": "best top-1 (%)",
    "test_loss": "test loss",
    "images_per_second": "images/s",
    "peak_memory_bytes": "peak memory (bytes)",
}
# What changes within a study: HParams shows these columns, the others when asked to.
CHANGING = ("norm", "batch_size", "sgd_batch_size", "learning_rate", "seed")
CHARTS = {  # category of Custom Scalars: chart: its tags
    "accuracy": {
        "test accuracy (%)": ["accuracy/test"],
        "training and test accuracy (%)": ["accuracy/train", "accuracy/test"],
    },
    "loss": {
        "training loss, every few updates": ["loss/update"],
        "training and test loss, every epoch": ["loss/train", "loss/test"],
    },
    "run": {
        "learning rate": ["run/learning_rate"],
        "images/s": ["run/images_per_second"],
    },
}


def writer(folder: Path, start: int, suffix: str = "") -> SummaryWriter:
    """Of a new event file. Whatever the older ones in its folder hold from step `start` on is
    hidden."""
    return SummaryWriter(folder, purge_step=start, filename_suffix=suffix)


def add_hparams(events: SummaryWriter, kind: str, content: dict[str, Any]) -> None:
    """One of the three things that HParams wants to know. `SummaryWriter.add_hparams` says all of
    them at once, in a folder of their own: not what an unfinished or a diverged run was told."""
    metadata = hparams.create_summary_metadata(HParamsPluginData(**{kind: content}))
    value = {"tag": f"_hparams_/{kind}", "tensor": hparams.NULL_TENSOR, "metadata": metadata}
    events._get_file_writer().add_summary(Summary(value=[value]))


class TensorBoard:
    """Writes against the number of updates, from `start` on; what an interrupted attempt wrote
    behind that point is hidden."""

    @rank_zero_only
    def __init__(self, folder: Path, start: int, hyperparameters: dict[str, Any]):
        self.events = writer(folder, start + 1)
        texts = {k for k, value in hyperparameters.items() if isinstance(value, str)}
        columns = [
            {
                "name": key,
                "type": "DATA_TYPE_STRING" if key in texts else "DATA_TYPE_FLOAT64",
                "differs": key in CHANGING,
            }
            for key in hyperparameters
        ]
        metrics = [
            {"name": {"tag": f"result/{key}"}, "display_name": name}
            for key, name in RESULTS.items()
        ]
        values = {
            key: {"string_value" if key in texts else "number_value": value}
            for key, value in hyperparameters.items()
        }
        add_hparams(self.events, "experiment", {"hparam_infos": columns, "metric_infos": metrics})
        add_hparams(self.events, "session_start_info", {"hparams": values})
        # Custom Scalars reads a tag as a pattern that matches the beginning of a tag.
        overlays = {
            category: {
                chart: ["Multiline", [f"{tag}$" for tag in tags]] for chart, tags in charts.items()
            }
            for category, charts in CHARTS.items()
        }
        self.events.add_custom_scalars(overlays)

    @rank_zero_only
    def loss(self, update: int, value: float) -> None:
        self.events.add_scalar("loss/update", value, update)

    @rank_zero_only
    def epoch(self, row: dict[str, Any]) -> None:
        probed = {column: column for column in row if column.startswith("probe/")}
        for column, tag in (SCALARS | probed).items():
            if row[column] != "":
                self.events.add_scalar(tag, row[column], row["update"])
        self.events.flush()

    @rank_zero_only
    def finish(self, result: dict[str, Any]) -> None:
        """The figures that `result.json` is about to hold, and how the run ended.

        They stand one step behind the last update: if the machine stops before `result.json` is
        there, the next attempt hides them and writes its own.
        """
        for key in RESULTS:
            if result[key] is not None:
                self.events.add_scalar(f"result/{key}", result[key], result["updates"] + 1)
        status = "STATUS_FAILURE" if result["status"] == "diverged" else "STATUS_SUCCESS"
        add_hparams(self.events, "session_end_info", {"status": status})

    @rank_zero_only
    def close(self) -> None:
        self.events.close()


Curve = Mapping[int, tuple[float, float]]
"""x -> (mean, standard deviation)."""


def summarize(
    study: Path,
    markdown: str,
    pictures: Mapping[str, Path],
    curves: Mapping[str, Mapping[str, Curve]] | None = None,
) -> None:
    """Write what a study came to into `<study>/table/`, in place of what stood there: its table as
    a text, its figures (titles and PNG files) as images.

    `curves`: title -> scheme -> curve, a chart each in Custom Scalars with a line and a band for
    each scheme, such as accuracy against batch size. A scheme is a run of its own, named
    `<study>/table/<scheme>`, since TensorBoard gives colours to runs. Raises `ValueError` if a run
    has the folder's name.
    """
    from PIL import Image

    folder, curves = study / "table", curves or {}
    if (folder / ".hydra").exists():
        raise ValueError(f"{folder}: a run has this name, where TensorBoard's table would stand")
    former = list(folder.glob("**/events.out.tfevents.*.table"))
    events = writer(folder, 0, ".table")
    # Pictures have a tab of their own; in a text TensorBoard shows none.
    without = re.sub(r"^!\[.*\]\(.*\)$", "", markdown, flags=re.MULTILINE)
    events.add_text("table", without)
    for title, file in pictures.items():
        with Image.open(file) as picture:
            width, height = picture.size
        image = {"width": width, "height": height, "encoded_image_string": file.read_bytes()}
        events._get_file_writer().add_summary(Summary(value=[{"tag": title, "image": image}]))
    # TensorBoard finds the run, and so the colour, of a line behind the first parenthesis.
    tags = {title: f"{study.name}: {re.sub('[()]', '', title)}" for title in curves}
    if curves:
        bands = {
            k: ["Margin", [f"{tag}/mean", f"{tag}/low", f"{tag}/high"]] for k, tag in tags.items()
        }
        events.add_custom_scalars({study.name: bands})
    events.close()
    for scheme in dict.fromkeys(scheme for lines in curves.values() for scheme in lines):
        events = writer(folder / scheme, 0, ".table")
        for title, lines in curves.items():
            for x, (mean, deviation) in sorted(lines.get(scheme, {}).items()):
                events.add_scalar(f"{tags[title]}/mean", mean, x)
                events.add_scalar(f"{tags[title]}/low", mean - deviation, x)
                events.add_scalar(f"{tags[title]}/high", mean + deviation, x)
        events.close()
    for file in former:  # only now, so that there is always one
        file.unlink(missing_ok=True)
        if not any(file.parent.iterdir()):
            file.parent.rmdir()

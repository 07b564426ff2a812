"""TensorBoard: a run's curves, hyper-parameters and result in its folder, a study's table, figures
and curves in the folder `table` beside its runs.

Scalars shows what it finds. HParams, the table of all runs, and Custom Scalars, charts that overlay
runs, must be told what to show. Every run says the same, of which TensorBoard takes one.
"""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.text import metadata as text
from tensorboard.summary.writer.event_file_writer import EventFileWriter

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


class Events:
    """A new event file. Whatever the older ones in its folder hold from step `start` on is hidden.

    The writer has a thread of its own and writes when it likes, at least every two minutes.
    """

    def __init__(self, folder: Path, start: int, suffix: str = ""):
        self.file = EventFileWriter(str(folder), filename_suffix=suffix)
        self.write(start, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, **content: Any) -> None:
        self.file.add_event(Event(wall_time=time.time(), step=step, **content))

    def add(self, step: int, tag: str, **value: Any) -> None:
        self.write(step, summary={"value": [{"tag": tag, **value}]})

    def scalar(self, step: int, tag: str, value: float) -> None:
        self.add(step, tag, simple_value=value)

    def text(self, tag: str, content: str | bytes, metadata: Any) -> None:
        data = content.encode() if isinstance(content, str) else content
        tensor = TensorProto(dtype="DT_STRING", string_val=[data], tensor_shape={})
        self.add(0, tag, tensor=tensor, metadata=metadata)

    def charts(self, categories: Mapping[str, Mapping[str, Any]]) -> None:
        """The layout of Custom Scalars."""
        layout = Layout(
            category=[
                {"title": category, "chart": [{"title": k, **v} for k, v in charts.items()]}
                for category, charts in categories.items()
            ]
        )
        metadata = custom_scalar.create_summary_metadata()
        self.text(custom_scalar.CONFIG_SUMMARY_TAG, layout.SerializeToString(), metadata)

    def hparams(self, kind: str, content: dict[str, Any]) -> None:
        """One of the three things that HParams wants to know."""
        metadata = hparams.create_summary_metadata(HParamsPluginData(**{kind: content}))
        self.add(0, f"_hparams_/{kind}", tensor=hparams.NULL_TENSOR, metadata=metadata)


class TensorBoard:
    """Writes against the number of updates, from `start` on; what an interrupted attempt wrote
    behind that point is hidden."""

    @rank_zero_only
    def __init__(self, folder: Path, start: int, hyperparameters: dict[str, Any]):
        self.events = Events(folder, start + 1)
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
        self.events.hparams("experiment", {"hparam_infos": columns, "metric_infos": metrics})
        self.events.hparams("session_start_info", {"hparams": values})
        # Custom Scalars reads a tag as a pattern that matches the beginning of a tag.
        overlays = {
            category: {
                chart: {"multiline": {"tag": [f"{tag}$" for tag in tags]}}
                for chart, tags in charts.items()
            }
            for category, charts in CHARTS.items()
        }
        self.events.charts(overlays)

    @rank_zero_only
    def loss(self, update: int, value: float) -> None:
        self.events.scalar(update, "loss/update", value)

    @rank_zero_only
    def epoch(self, row: dict[str, Any]) -> None:
        probed = {column: column for column in row if column.startswith("probe/")}
        for column, tag in (SCALARS | probed).items():
            if row[column] != "":
                self.events.scalar(row["update"], tag, row[column])
        self.events.file.flush()

    @rank_zero_only
    def finish(self, result: dict[str, Any]) -> None:
        """The figures that `result.json` is about to hold, and how the run ended.

        They stand one step behind the last update: if the machine stops before `result.json` is
        there, the next attempt hides them and writes its own.
        """
        for key in RESULTS:
            if result[key] is not None:
                self.events.scalar(result["updates"] + 1, f"result/{key}", result[key])
        status = "STATUS_FAILURE" if result["status"] == "diverged" else "STATUS_SUCCESS"
        self.events.hparams("session_end_info", {"status": status})

    @rank_zero_only
    def close(self) -> None:
        self.events.file.close()


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
    events = Events(folder, 0, ".table")
    # Pictures have a tab of their own; in a text TensorBoard shows none.
    without = re.sub(r"^!\[.*\]\(.*\)$", "", markdown, flags=re.MULTILINE)
    events.text("table", without, text.create_summary_metadata("", ""))
    for title, file in pictures.items():
        with Image.open(file) as picture:
            width, height = picture.size
        image = {"width": width, "height": height, "encoded_image_string": file.read_bytes()}
        events.add(0, title, image=image)
    # TensorBoard finds the run, and so the colour, of a line behind the first parenthesis.
    tags = {title: f"{study.name}: {re.sub('[()]', '', title)}" for title in curves}
    if curves:
        series = {
            title: {"value": f"{tag}/mean", "lower": f"{tag}/low", "upper": f"{tag}/high"}
            for title, tag in tags.items()
        }
        events.charts({study.name: {k: {"margin": {"series": [v]}} for k, v in series.items()}})
    events.file.close()
    for scheme in dict.fromkeys(scheme for lines in curves.values() for scheme in lines):
        events = Events(folder / scheme, 0, ".table")
        for title, lines in curves.items():
            for x, (mean, deviation) in sorted(lines.get(scheme, {}).items()):
                events.scalar(x, f"{tags[title]}/mean", mean)
                events.scalar(x, f"{tags[title]}/low", mean - deviation)
                events.scalar(x, f"{tags[title]}/high", mean + deviation)
        events.file.close()
    for file in former:  # only now, so that there is always one
        file.unlink(missing_ok=True)
        if not any(file.parent.iterdir()):
            file.parent.rmdir()

"""TensorBoard: the curves of a run and its hyper-parameters, in the run's own event file."""

from pathlib import Path
from typing import Any

SCALARS = {  # column of metrics.csv: tag
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "train_top1": "accuracy/train",
    "test_top1": "accuracy/test",
    "test_top5": "accuracy/test_top5",
    "learning_rate": "run/learning_rate",
    "images_per_second": "run/images_per_second",
}
METRICS = ("accuracy/test", "loss/test", "run/images_per_second")


class TensorBoard:
    """Writes against the number of updates, from `start` on; what an interrupted attempt wrote
    behind that point is hidden."""

    def __init__(self, folder: Path, start: int, hyperparameters: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder), purge_step=start + 1)
        # `SummaryWriter.add_hparams` would make a second run beside this one.
        for summary in hparams(hyperparameters, dict.fromkeys(METRICS)):
            self.writer._get_file_writer().add_summary(summary)

    def loss(self, update: int, value: float) -> None:
        self.writer.add_scalar("loss/update", value, update)

    def epoch(self, row: dict[str, Any]) -> None:
        probed = {column: column for column in row if column.startswith("probe/")}
        for column, tag in (SCALARS | probed).items():
            if row[column] != "":
                self.writer.add_scalar(tag, row[column], row["update"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()

"""A peer of benchmarks/process.py: the training of benchmarks/plain.py as Lightning's documentation
writes it.

    python -m benchmarks.lightning_peer DATA --model resnet8 --batch 2 --epochs 2 --workers 1

The `Trainer` has its defaults (logs, a checkpoint after every epoch) but for one device, no
progress bar, which costs it time at every step, and no validation before the training, which the
others do not do either.
"""

import time
from typing import Any

import lightning as L
from torch import Tensor, nn

from benchmarks.plain import arguments, line, loaders, network, optimization


class Classifier(L.LightningModule):
    def __init__(self, args: Any, updates: int):
        super().__init__()
        self.args, self.updates = args, updates
        self.model = network(args)
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        output = self.model(images)
        loss = self.criterion(output, labels)
        right = (output.argmax(1) == labels).float().mean()
        self.log_dict({"loss": loss, "train": right}, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        right = (self.model(images).argmax(1) == labels).float().mean()
        self.log("test", right, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        optimizer, schedule = optimization(self.model, self.args, self.updates)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_epoch_start(self) -> None:
        self.start = time.perf_counter()

    def on_validation_epoch_start(self) -> None:  # within the epoch of training, at its end
        self.took = time.perf_counter() - self.start

    def on_train_epoch_end(self) -> None:
        found = {key: value.item() for key, value in self.trainer.callback_metrics.items()}
        speed = self.args.batch * self.trainer.num_training_batches / self.took
        loss, train, test = found["loss_epoch"], found["train_epoch"], found["test"]
        print(line(self.current_epoch, loss, train, test, speed))


def main() -> None:
    args = arguments()
    train_loader, test_loader = loaders(args)
    trainer = L.Trainer(
        max_epochs=args.epochs, devices=1, enable_progress_bar=False, num_sanity_val_steps=0
    )
    trainer.fit(Classifier(args, args.epochs * len(train_loader)), train_loader, test_loader)


if __name__ == "__main__":
    main()

"""A peer of benchmarks/process.py: one training as the reference scripts of torchvision and timm
write it. PIL images from folders, a `DataLoader` with workers, a loss and an accuracy fetched from
the device at every step, all images evaluated after every epoch.

    python -m benchmarks.plain DATA --model resnet8 --batch 2 --epochs 2 --workers 1 --threads 1

benchmarks/lightning_peer.py trains with the same data, network and optimizer.
"""

import argparse
import time
from pathlib import Path

import torch
import torchvision.transforms as T
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import models
import norms


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="resnet8")
    for key, default in dict(batch=2, epochs=2, workers=1, threads=1).items():
        parser.add_argument(f"--{key}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def loaders(args: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    normalize = [T.ToTensor(), T.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))]
    augment = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *normalize])
    train = ImageFolder(str(args.data / "train"), augment)
    test = ImageFolder(str(args.data / "test"), T.Compose(normalize))
    return (
        DataLoader(train, args.batch, shuffle=True, num_workers=args.workers, drop_last=True),
        DataLoader(test, 500, num_workers=args.workers),
    )


def network(args: argparse.Namespace) -> nn.Module:
    scheme = norms.build("bn")  # whole batches: plain convolutions and PyTorch's own batch norm
    classes = len(list((args.data / "train").iterdir()))
    return models.build(args.model, scheme=scheme, num_classes=classes)


def optimization(
    model: nn.Module, args: argparse.Namespace, updates: int
) -> tuple[torch.optim.SGD, CosineAnnealingLR]:
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1 * args.batch / 128, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    return optimizer, CosineAnnealingLR(optimizer, updates)


def line(epoch: int, loss: float, train: float, test: float, speed: float) -> str:
    """What is said of an epoch; `train` and `test` are the parts that were right."""
    right = f"train {100 * train:.2f} %, test {100 * test:.2f} %"
    return f"epoch {epoch + 1}: loss {loss:.3f}, {right}, {speed:.0f} images/s"


def main() -> None:
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader, test_loader = loaders(args)
    model = network(args).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer, schedule = optimization(model, args, args.epochs * len(train_loader))
    for epoch in range(args.epochs):
        model.train()
        loss_sum, right, seen, start = 0.0, 0, 0, time.perf_counter()
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)
            output = model(images)
            loss = criterion(output, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(labels)
            right += (output.argmax(1) == labels).sum().item()
            seen += len(labels)
        speed = seen / (time.perf_counter() - start)
        model.eval()
        correct, tested = 0, 0
        with torch.no_grad():
            for images, labels in test_loader:
                output = model(images.to(device))
                correct += (output.argmax(1) == labels.to(device)).sum().item()
                tested += len(labels)
        print(line(epoch, loss_sum / seen, right / seen, correct / tested, speed))
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "plain.pt")


if __name__ == "__main__":
    main()

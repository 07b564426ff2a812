"""How batches become optimizer steps."""

from dataclasses import dataclass

from training.schema import Config, Recipe


@dataclass(frozen=True)
class Plan:
    """What a protocol comes to for one run."""

    batch: int
    """Images that share statistics."""
    sgd_batch: int
    """Images per optimizer step, over all devices."""
    devices: int
    micro_batch: int
    """Images per forward pass on one device."""
    lr: float
    """Learning rate after scaling to the SGD batch."""

    @property
    def per_device_batch(self) -> int:
        """Images per optimizer step on one device."""
        return self.sgd_batch // self.devices


def count_updates(recipe: Recipe, per_epoch: int) -> int:
    """Optimizer steps of a run."""
    return recipe.updates or (recipe.epochs or 0) * per_epoch


def plan(cfg: Config) -> Plan:
    """The protocol's two numbers and the learning rate, or `ValueError` where they do not fit."""
    batch, recipe, devices = cfg.batch, cfg.recipe, cfg.devices
    if cfg.protocol.name == "direct" and cfg.protocol.sgd_batch:
        raise ValueError(
            f"protocol.sgd_batch={cfg.protocol.sgd_batch}: with protocol=direct every batch is a "
            f"step; expected null, or protocol=ghost or accumulate"
        )
    sgd_batch = cfg.protocol.sgd_batch or batch * devices
    micro_batch = cfg.protocol.micro_batch
    if sgd_batch % (batch * devices):
        raise ValueError(
            f"protocol.sgd_batch={sgd_batch}: expected a multiple of batch={batch}"
            + (f" times {devices} devices" if devices > 1 else "")
        )
    per_device = sgd_batch // devices
    if micro_batch == cfg.protocol.sgd_batch:
        micro_batch = per_device
    if micro_batch % batch or per_device % micro_batch:
        raise ValueError(
            f"protocol.micro_batch={micro_batch}: expected a multiple of batch={batch} that "
            f"divides the {per_device} images of an optimizer step on one device"
        )
    for key, alpha in (("mixup", recipe.mixup), ("cutmix", recipe.cutmix)):
        if alpha and per_device % 2:
            raise ValueError(
                f"recipe.{key}={alpha}: mixes the images of an optimizer step on one device "
                f"in pairs, and there are {per_device}; expected an even number"
            )
    return Plan(batch, sgd_batch, devices, micro_batch, recipe.lr * sgd_batch / recipe.lr_batch)

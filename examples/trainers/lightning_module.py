"""PyTorch Lightning: `configure_optimizers` returns the tower; LearningRateMonitor shows the learned lr.

    python examples/trainers/lightning_module.py

`LevelsMonitor` logs all levels. Everything else is as with any optimizer: clipping (hypergradients are made of the
clipped gradients), accumulated batches, checkpoints.
"""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hyperopt_ext as hx


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> hx.HyperOptimizer:
        opt = hx.auto(self.parameters(), "adamw")
        opt.unscales = False  # Lightning divides by the loss scale, which it asks for where it clips in mixed precision
        return opt


class LevelsMonitor(lightning.Callback):
    """Logs the hyperparameters of all levels, as often as the trainer logs: "optimizer0/group0/level0/lr", ..."""

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        if trainer.logger is None or trainer.global_step % trainer.log_every_n_steps:
            return
        values = {
            f"optimizer{i}/group{group}/level{k}/{name}": value.mean().item()
            for i, opt in enumerate(trainer.optimizers)
            for group in range(len(opt.param_groups))
            for k, level in enumerate(opt.hyperparameters(group))
            for name, value in level.items()
        }
        trainer.logger.log_metrics(values, trainer.global_step)


def data(rows: int = 4096) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 16, generator=generator)
    y = (x[:, :4].sum(1, keepdim=True)).sin() + 0.1 * torch.randn(rows, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True, generator=generator)


def main() -> None:
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_epochs=5,
        accelerator="auto",
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        log_every_n_steps=10,
        logger=CSVLogger("lightning_logs"),
        callbacks=[LearningRateMonitor("step"), LevelsMonitor()],
    )
    trainer.fit(Model(), data())
    print(f"loss {trainer.callback_metrics['loss']:.4f}, learned lr {trainer.optimizers[0].param_groups[0]['lr']:.5f}")
    print(f"all levels over time: {trainer.logger.log_dir}/metrics.csv")


if __name__ == "__main__":
    main()

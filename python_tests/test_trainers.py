"""PyTorch Lightning, Hugging Face's Trainer and accelerate, with the optimizer that their examples use."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import lightning
import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from problems import Regression
from torch.utils.data import DataLoader, TensorDataset

import hyperopt_ext as hx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "trainers"))
import huggingface_trainer
import lightning_module

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers

STACK = hx.Adam(lr=1e-2) / hx.SGD(lr=1e-4)


def same(params, others):
    return all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


class Module(lightning_module.Model):
    """That of the example with a stack that learns betas, too, and batches that it passes over."""

    def __init__(self, skipped=()):
        torch.manual_seed(0)
        super().__init__()
        self.skipped = skipped

    def training_step(self, batch, index):
        return None if index in self.skipped else super().training_step(batch, index)

    def configure_optimizers(self):
        return hx.HyperOptimizer(self.parameters(), STACK)


def fit(model, epochs, tmp_path, checkpoint=None, accumulate=2, **options):
    options = {"logger": False, **options}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=0.5,
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(model, data(), ckpt_path=checkpoint)
    return trainer


def data():
    """Without a shuffle, so that a resumed run sees what it would have seen."""
    return DataLoader(lightning_module.data(256).dataset, batch_size=32)


def test_lightning_makes_the_steps_of_a_plain_loop(tmp_path):
    trainer = fit(model := Module(), 2, tmp_path)
    other = Module()
    opt = other.configure_optimizers()
    for _ in range(2):
        for i, (x, y) in enumerate(data()):
            ((other.net(x) - y).square().mean() / 2).backward()
            if i % 2:
                torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
                opt.step()
                opt.zero_grad()
    assert same(model.parameters(), other.parameters())
    assert torch.equal(trainer.optimizers[0].param_groups[0]["tower"], opt.param_groups[0]["tower"])


@pytest.mark.parametrize("unscales", [True, False])
def test_lightning_clips_under_mixed_precision_what_it_unscales_itself(tmp_path, unscales):
    class Own(Module):
        def configure_optimizers(self):
            opt = super().configure_optimizers()
            opt.unscales = unscales
            return opt

    model = Own()
    if unscales:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(model, 1, tmp_path, precision="bf16-mixed")
        return
    trainer = fit(model, 1, tmp_path, precision="bf16-mixed", accumulate=1)
    other = Module()
    opt = other.configure_optimizers()
    for x, y in data():
        with torch.autocast("cpu", torch.bfloat16):
            loss = (other.net(x) - y).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        opt.step()
        opt.zero_grad()
    assert same(model.parameters(), other.parameters())
    assert torch.equal(trainer.optimizers[0].param_groups[0]["tower"], opt.param_groups[0]["tower"])


def test_a_closure_without_a_loss_makes_no_step(tmp_path):
    trainer = fit(Module(skipped=(1, 3)), 1, tmp_path, accumulate=1)
    assert trainer.optimizers[0].state[next(trainer.model.parameters())]["step"] == 6


def test_lightning_resumes_bit_for_bit(tmp_path):
    whole = fit(model := Module(), 4, tmp_path)
    fit(Module(), 2, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(other := Module(), 4, tmp_path, tmp_path / "half.ckpt", num_sanity_val_steps=0)
    assert same(model.parameters(), other.parameters())
    towers = [trainer.optimizers[0].param_groups[0]["tower"] for trainer in (whole, resumed)]
    assert torch.equal(*towers)


def test_lightning_monitors_what_is_learned(tmp_path):
    callbacks = [LearningRateMonitor("step"), lightning_module.LevelsMonitor()]
    logger = CSVLogger(tmp_path)
    trainer = fit(Module(), 1, tmp_path, accumulate=1, logger=logger, callbacks=callbacks, log_every_n_steps=1)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    lrs = [float(row["lr-HyperOptimizer"]) for row in rows if row.get("lr-HyperOptimizer")]
    learned = [float(row["optimizer0/group0/level0/lr"]) for row in rows if row.get("optimizer0/group0/level0/lr")]
    assert len(set(lrs)) > 4
    assert learned[-1] == pytest.approx(trainer.optimizers[0].hyperparameters()[0]["lr"].item())


def test_huggingface_trainer_learns_and_resumes_bit_for_bit(tmp_path):
    settings = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    whole = huggingface_trainer.trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = huggingface_trainer.trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same(whole.model.parameters(), resumed.model.parameters())
    optimizers = [trainer.optimizer.optimizer for trainer in (whole, resumed)]
    assert torch.equal(*(opt.param_groups[0]["tower"] for opt in optimizers))
    logged = [log["level0/lr"] for log in whole.state.log_history if "level0/lr" in log]
    assert len(set(logged)) == 8
    assert logged[-1] == optimizers[0].hyperparameters()[0]["lr"].item()


def test_huggingface_makes_the_groups_of_its_own_optimizers(tmp_path):
    """`optimizer_cls_and_kwargs`: with and without weight decay, each with a tower."""
    arguments = huggingface_trainer.TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True, report_to="none", weight_decay=0.1
    )
    trainer = huggingface_trainer.Trainer(
        huggingface_trainer.model(),
        arguments,
        train_dataset=huggingface_trainer.Copies(16),
        optimizer_cls_and_kwargs=(hx.HyperOptimizer, {"stack": hx.AdamW(lr=1e-3) / hx.SGD(lr=1e-5)}),
    )
    trainer.train()
    groups = [trainer.optimizer.optimizer.hyperparameters(group)[0] for group in (0, 1)]
    assert [group["weight_decay"].item() for group in groups] == [0.1, 0.0]


def test_accelerate_makes_the_steps_of_a_plain_loop_and_resumes(tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    problem, other, resumed = Regression(12), Regression(12), Regression(12)
    batches = DataLoader(TensorDataset(problem.x.flatten(0, 1), problem.y.flatten(0, 1)), batch_size=16)
    model, opt, batches = accelerator.prepare(
        problem.model, hx.HyperOptimizer(problem.model.parameters(), STACK), batches
    )
    for i, (x, y) in enumerate(batches):
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - y).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            opt.zero_grad()
        if i == 5:
            accelerator.save_state(str(tmp_path))

    def plain(problem, opt, steps):
        for i in steps:
            (problem.loss(i) / 2).backward()
            if i % 2:
                torch.nn.utils.clip_grad_norm_(problem.model.parameters(), 0.5)
                opt.step()
                opt.zero_grad()

    expected = hx.HyperOptimizer(other.model.parameters(), STACK)
    plain(other, expected, range(12))
    assert same(problem.model.parameters(), other.model.parameters())
    assert torch.equal(opt.param_groups[0]["tower"], expected.param_groups[0]["tower"])

    accelerator.load_state(str(tmp_path))
    resumed.model.load_state_dict(model.state_dict())
    again = hx.HyperOptimizer(resumed.model.parameters(), STACK)
    again.load_state_dict(opt.state_dict())
    plain(resumed, again, range(6, 12))
    assert same(resumed.model.parameters(), other.model.parameters())

"""Hugging Face `Trainer`: the optimizer is handed over with a scheduler that leaves the learned lr alone.

    python examples/trainers/huggingface_trainer.py [FOLDER]

Without a scheduler, `Trainer` makes one that lowers lr linearly, which is a factor of the learned lr;
`ConstantLR(opt, factor=1.0)` leaves it alone. In the log, `learning_rate` is the scheduler's, and `level0/lr` is what
was learned. The model is a small Llama, made from its configuration and trained from the start to copy sequences.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

import hyperopt_ext as hx


class Copies(Dataset):
    """A random sequence of 8 tokens, twice."""

    def __init__(self, rows: int = 1024) -> None:
        half = torch.randint(64, (rows, 8), generator=torch.Generator().manual_seed(0))
        self.tokens = half.repeat(1, 2)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        labels = self.tokens[i].clone()
        labels[:8] = -100  # nothing to learn there
        return {"input_ids": self.tokens[i], "labels": labels}


class LogLevels(TrainerCallback):
    """Adds what was learned to the log: "level0/lr", "level0/beta1", ..., and so to TensorBoard and the like."""

    def __init__(self, opt: hx.HyperOptimizer) -> None:
        self.opt = opt

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:
            levels = enumerate(self.opt.hyperparameters())
            learned = {f"level{k}/{name}": v.mean().item() for k, level in levels for name, v in level.items()}
            logs.update(learned)
            state.log_history[-1].update(learned)


def model() -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=16, **shape))


def trainer(folder: Path, **arguments: Any) -> Trainer:
    set_seed(0)
    net = model()
    opt = hx.auto(net.parameters(), "adamw")
    settings = {"per_device_train_batch_size": 64, "logging_steps": 16, "report_to": "none", "num_train_epochs": 5}
    return Trainer(
        net,
        TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=Copies(),
        optimizers=(opt, ConstantLR(opt, factor=1.0)),
        callbacks=[LogLevels(opt)],
    )


def main() -> None:
    run = trainer(Path(sys.argv[1] if len(sys.argv) > 1 else "huggingface_run"), save_strategy="epoch")
    run.train()
    print({key: run.state.log_history[-2][key] for key in ("loss", "level0/lr", "level1/lr")})


if __name__ == "__main__":
    main()

"""A complete small experiment for tests: a catalogue of 64 products, both encoders from scratch, three short stages."""

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from datamodules.tuples import TupleDataModule
from mmfusion.encoders import ScratchTextEncoder, TimmEncoder
from mmfusion.fusion import MoEBilinear
from mmfusion.module import RetrievalModule
from mmfusion.optim import Optim
from mmfusion.retrieval.evaluation import Evaluation
from mmfusion.stages import Group, LossWeights, Stage, StageSwitch, Until
from tests.datamodules.small import convert, small_catalogue

ENCODERS_FROZEN = {"text_encoder": "frozen", "image_encoder": "frozen"}
GROUPS = {
    "text_encoder": Group(r"^(query|product\.text)\.encoder\.", 2e-3),
    "image_encoder": Group(r"^product\.image\.encoder\.", 2e-3),
    "projection": Group("projection", 2e-3),
    "fusion": Group(r"^product\.fusion\.", 2e-3),
    "scale": Group(r"^losses\.", 1e-2),
}
BATCH = 16
OPTIONS = [  # of a run by the command line, of ten steps
    "--data.batch_size=16", "--data.streams=4", "--data.image_size=[32, 32]", "--trainer.max_steps=10",
    "--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu", "--wandb.mode=disabled",
]  # fmt: skip


def three_stages(first: int = 2, second: int = 5) -> dict[str, Stage]:
    """Ends after `first` and `second` steps: mid-epoch, as an epoch has 3 steps of BATCH."""
    return {
        "adapt": Stage(Until(steps=first), LossWeights(text_image=0.5, query_text=1.0, query_image=1.0)),
        "align": Stage(Until(steps=second), LossWeights(query_text=1.0, query_image=1.0), dict(ENCODERS_FROZEN)),
        "fuse": Stage(
            Until(fraction=1.0), LossWeights(query_product=1.0, query_text=0.2, query_image=0.2), dict(ENCODERS_FROZEN)
        ),
    }


def small_shards(folder: Path, **options: Any) -> Path:
    """Shards of a small catalogue, made once per folder."""
    out = folder / "shards"
    if not out.exists():
        convert(str(small_catalogue(folder / "catalogue", **options)), str(out))
    return out


def small_data(path: Path, **options: Any) -> TupleDataModule:
    return TupleDataModule(**{"path": str(path), "batch_size": BATCH, "image_size": 32, "streams": 4, **options})


def small_module(dropout: float = 0.0, augment: str = "none", **options: Any) -> RetrievalModule:
    """No BatchNorm anywhere: with it, one process and two see different statistics."""
    seed_everything(7, verbose=False)
    text = ScratchTextEncoder(width=16, layers=1, heads=2, vocabulary=300, dropout=dropout)
    image = TimmEncoder("test_vit", image_size=(32, 32), augment=augment)
    chosen = {
        "text": text, "image": image, "stages": three_stages(), "groups": GROUPS, "dim": 8, "seed": 7,
        "fusion": lambda dim: MoEBilinear(dim, experts=2, rank=4, dropout=0.0), "evaluation": Evaluation(depth=100),
        "optim": Optim(weight_decay=0.1),
    }  # fmt: skip
    return RetrievalModule(**{**chosen, **options})


def small_trainer(folder: Path, *callbacks: Callback, steps: int = 8, **options: Any) -> Trainer:
    chosen = {
        "accelerator": "cpu", "devices": 1, "max_steps": steps, "num_sanity_val_steps": 0, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "use_distributed_sampler": False, "limit_val_batches": 0, "default_root_dir": str(folder),
    }  # fmt: skip
    return Trainer(callbacks=[StageSwitch(), *callbacks], **{**chosen, **options})


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

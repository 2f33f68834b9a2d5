"""Which of Lightning's strategies a run can use: each rank holds the whole model. And which restarts of torchrun."""

import os
from typing import Any

SHARDED = ("fsdp", "deepspeed", "model_parallel", "modelparallel")


def check_strategy(strategy: Any) -> None:
    """Raises ValueError for one that cuts the weights into shards. strategy: trainer.strategy as the options hold it.

    A switch of stages freezes parts mid-epoch and wraps DDP again, where a sharded model has laid out its shards, with
    what trains, once for all; the learning-rate table, the proof that ranks agree, the feature cache and the ends of
    runs bit for bit all read whole parameters by their names.
    """
    name = str(getattr(strategy, "class_path", strategy))
    if any(word in name.lower() for word in SHARDED):
        raise ValueError(
            f"trainer.strategy={name.rpartition('.')[2]} is not an option of a run: it cuts the weights into shards "
            "when training starts, and stages freeze and train other parts later on. Leave it at auto (DDP), and where "
            "memory is short set trainer.precision=bf16-mixed, the encoders' checkpoint_activations=true or "
            "model.micro_batch=64; frozen encoders take no memory for gradients, and their outputs are stored"
        )


def check_restarts() -> None:
    """Raises ValueError where torchrun would start ranks again that then hang (torch 2.15, pytorch issue 135712).

    They meet in a store that its agent keeps from start to start, and find there where the ranks before them were.
    """
    told = os.environ.get
    if told("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and told("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, and "
            "--rdzv-backend=c10d where it is given one: ranks that it starts again do not find each other without"
        )

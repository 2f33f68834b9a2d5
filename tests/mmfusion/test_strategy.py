"""Strategies that shard weights are refused by name, before Lightning makes one; others pass."""

from types import SimpleNamespace

import pytest

from mmfusion.run import FusionCLI
from mmfusion.strategy import check_restarts, check_strategy
from tests.small_run import small_shards

SHARDING = ["fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3_offload"]


@pytest.mark.parametrize("name", SHARDING)
def test_a_run_says_why_and_what_else(name, tmp_path):
    files = ("base", "encoders/tiny", "fusion_gated")
    given = [f"--config=experiments/{file}.yaml" for file in files]
    given += [f"--data.init_args.path={small_shards(tmp_path)}", f"--trainer.strategy={name}"]
    said = rf"trainer\.strategy={name} is not an option of a run: .*stages.*checkpoint_activations.*micro_batch"
    with pytest.raises(ValueError, match=said):
        FusionCLI.parse(given, None)


@pytest.mark.parametrize("kind", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_a_class_as_well(kind):
    with pytest.raises(ValueError, match=rf"trainer\.strategy={kind} is not"):
        check_strategy(SimpleNamespace(class_path=f"lightning.pytorch.strategies.{kind}"))


@pytest.mark.parametrize("name", ["auto", "ddp", "ddp_find_unused_parameters_true", "single_device"])
def test_others_pass(name):
    check_strategy(name)


def test_restarts_that_would_hang_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    check_restarts()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_restarts()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_restarts()

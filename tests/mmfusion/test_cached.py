"""Micro-batches: the gradients of the whole batch, in a micro-batch's memory, with one reduction per step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mmfusion.cached import in_micro_batches
from mmfusion.losses import InfoNCE, identity_pairs
from tests.ddp import run_ranks

ROWS = 24


def tower(*layers: nn.Module, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), *layers, nn.GELU(), nn.Linear(width, 3)).double()


def rows(count: int = ROWS) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(1)).double()


def contrast(left: Tensor, right: Tensor) -> Tensor:
    """Every row takes part in every other row's loss."""
    return (5 * normalize(left, dim=1) @ normalize(right, dim=1).T).log_softmax(1).diagonal().mean()


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters()]


def stepped(run: Callable[[nn.Module], Tensor], *layers: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients, and buffers, of a tower whose vectors `run` gives, after a step's forward and backward pass."""
    module, inputs = tower(*layers), rows()
    torch.manual_seed(3)
    contrast(run(module), inputs[:, :3]).backward()
    return gradients(module), [buffer.clone() for buffer in module.buffers()]


def cached(size: int | None) -> Callable[[nn.Module], Tensor]:
    return lambda module: in_micro_batches(lambda part: module(rows()[part]), ROWS, size, [module])


def by_hand(size: int) -> Callable[[nn.Module], Tensor]:
    """The same micro-batches, all of whose activations are kept."""
    return lambda module: torch.cat([module(part) for part in rows().split(size)])


@pytest.mark.parametrize("size", [1, 3, 8, 7, 24, 100, None])
def test_gradients_are_those_of_the_whole_batch(size):
    expected, _ = stepped(lambda module: module(rows()))
    got, _ = stepped(cached(size))
    for one, other in zip(expected, got, strict=True):
        assert (one - other).abs().max() <= 1e-12 * one.abs().max()


def test_random_state_is_replayed():
    """To the bit: another dropout mask in the second pass would give another gradient."""
    expected, _ = stepped(by_hand(5), nn.Dropout(0.5), nn.GELU(), nn.Dropout(0.3))
    got, _ = stepped(cached(5), nn.Dropout(0.5), nn.GELU(), nn.Dropout(0.3))
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))
    plain, _ = stepped(cached(5), nn.GELU())
    assert not torch.equal(got[0], plain[0])


def test_the_second_pass_leaves_the_generator_where_it_was():
    module = tower(nn.Dropout(0.5))
    loss = contrast(cached(5)(module), rows()[:, :3])
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_state_of_a_gpu_is_replayed():
    found = []
    for run in (lambda m, x: torch.cat([m(part) for part in x.split(5)]),
                lambda m, x: in_micro_batches(lambda part: m(x[part]), ROWS, 5, [m])):  # fmt: skip
        module, inputs = tower(nn.Dropout(0.5)).cuda(), rows().cuda()
        torch.manual_seed(3)
        contrast(run(module, inputs), inputs[:, :3]).backward()
        found.append(gradients(module))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.BatchNorm1d(8),
        lambda: nn.BatchNorm1d(8, momentum=None),
        lambda: nn.BatchNorm1d(8, track_running_stats=False),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()),
    ],
)
def test_running_statistics_are_updated_once_per_micro_batch(layer):
    """A frozen layer too, in the same tower, stays as it is."""
    expected, kept = stepped(by_hand(8), layer(), nn.BatchNorm1d(8).eval())
    got, again = stepped(cached(8), layer(), nn.BatchNorm1d(8).eval())
    for one, other in zip(expected + kept, got + again, strict=True):
        assert torch.equal(one, other)
    norm = nn.BatchNorm1d(8, momentum=0.2)
    stepped(cached(8), norm)
    assert norm.momentum == 0.2
    assert norm.num_batches_tracked == 3


def test_what_a_gradient_is_asked_for_twice():
    module = tower(nn.BatchNorm1d(8))
    loss = contrast(cached(8)(module), rows()[:, :3])
    loss.backward(retain_graph=True)
    once = gradients(module)
    loss.backward()
    assert all(torch.equal(2 * one, both) for one, both in zip(once, gradients(module), strict=True))
    assert module[1].num_batches_tracked == 3


def test_tensors_by_name_and_without_a_gradient():
    module = tower()

    def function(part: slice) -> dict[str, Tensor]:
        found = module(rows()[part])
        return {"vector": found, "twice": 2 * found, "length": found.detach().norm(dim=1)}

    whole, parts = (in_micro_batches(function, ROWS, size, [module]) for size in (None, 5))
    assert list(parts) == ["vector", "twice", "length"]
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-12) for name in whole)
    assert [part.requires_grad for part in parts.values()] == [True, True, False]


@pytest.mark.parametrize(("size", "trains", "calls"), [(None, True, 1), (24, True, 1), (8, True, 6), (8, False, 3)])
def test_what_does_not_train_is_not_computed_again(size, trains, calls):
    module, start, asked = tower().requires_grad_(trains), nn.Parameter(rows()[:, :3]), []

    def function(part: slice) -> Tensor:
        asked.append(part)
        return module(rows()[part])

    contrast(in_micro_batches(function, ROWS, size, [module]), start).backward()
    assert len(asked) == calls
    assert sum(part.stop - part.start for part in asked) == ROWS * (2 if calls == 6 else 1)
    with torch.no_grad():
        in_micro_batches(function, ROWS, 8, [module])
    assert len(asked) == calls + 3


def test_a_micro_batch_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="micro-batches of 0 rows; expected at least 1"):
        in_micro_batches(lambda part: rows()[part], ROWS, 0, [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_the_first_pass(dtype):
    found = []
    for size in (None, 5):
        module, inputs = tower().float(), rows().float()
        with torch.autocast("cpu", dtype):
            if size is None:
                vectors = torch.cat([module(part) for part in inputs.split(5)])
            else:
                vectors = in_micro_batches(lambda part, of=module, x=inputs: of(x[part]), ROWS, size, [module])
        assert vectors.dtype == dtype
        contrast(vectors.float(), inputs[:, :3]).backward()
        found.append(gradients(module))
    for one, other in zip(*found, strict=True):  # autocast casts a weight once for all micro-batches, or once for each
        assert (one - other).abs().max() <= 2 * torch.finfo(dtype).eps * one.abs().max()


class Live(TorchDispatchMode):
    """The most bytes that tensors made under it held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else [found]:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.held = {key: held for key, held in self.held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return found


def peak(count: int, size: int | None) -> int:
    """Of forward and backward pass through a tower whose activations take 16 KiB a row, its vectors 24 bytes."""
    module, inputs = tower(nn.GELU(), nn.GELU(), nn.GELU(), width=512), rows(count)
    with Live() as live:
        vectors = in_micro_batches(lambda part: module(inputs[part]), count, size, [module])
        vectors.pow(2).sum().backward()
    return live.peak


def test_activations_take_the_memory_of_a_micro_batch():
    small, whole = peak(4, None), peak(64, None)
    assert whole > 10 * small
    assert peak(64, 4) < 1.5 * small
    assert peak(256, 4) < 2 * small, "what grows with the batch are its vectors"


# ---- ranks -----------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two towers and a loss with a learnable scale, as DDP wraps them."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.left, self.right, self.loss, self.size = tower(), tower(nn.Linear(8, 8).double()), InfoNCE().double(), size

    def forward(self, inputs: Tensor, ids: Tensor) -> Tensor:
        left, right = (
            normalize(in_micro_batches(lambda part, of=of: of(inputs[part]), len(inputs), self.size, [of]), dim=1)
            for of in (self.left, self.right)
        )
        valid = torch.ones(len(inputs), dtype=torch.bool)
        return self.loss(left, right, identity_pairs(ids), valid, valid)


def on_ranks(rank: int, world: int, size: int | None) -> dict[str, Any]:
    module, share = Pair(size), ROWS // world
    wrapped: nn.Module = DistributedDataParallel(module) if world > 1 else module
    rounds: list[bool] = []

    def hook(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        rounds.append(bucket.is_last())
        return allreduce_hook(None, bucket)

    if isinstance(wrapped, DistributedDataParallel):
        wrapped.register_comm_hook(None, hook)
    own = slice(rank * share, (rank + 1) * share)
    wrapped(rows()[own], torch.arange(ROWS)[own] % 20).backward()
    return {"gradients": {n: p.grad for n, p in module.named_parameters()}, "rounds": rounds}


@pytest.mark.parametrize("size", [5, 2, None])
def test_ranks_get_the_gradients_of_one_process_in_one_reduction(size):
    alone = on_ranks(0, 1, None)["gradients"]
    for found in run_ranks(on_ranks, 2, size):
        assert found["rounds"].count(True) == 1
        assert len(found["rounds"]) == 1, "so few parameters are one bucket"
        assert alone["loss.log_scale"].abs() > 1e-3
        for name, gradient in alone.items():
            assert (found["gradients"][name] - gradient).abs().max() <= 1e-12 * gradient.abs().max(), name

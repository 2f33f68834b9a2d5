"""What each of the runs that go side by side may use of the machine."""

import os


def environment(slot: int, slots: int) -> dict[str, str]:
    """A slot's share of the cores, and of the GPUs where there are several."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // slots))}
    found = gpus()
    if len(found) > 1:
        shares["CUDA_VISIBLE_DEVICES"] = ",".join(found[slot::slots] or [found[slot % len(found)]])
    return shares


def gpus() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip()]
    import torch  # noqa: PLC0415  (seconds, and only this needs it)

    return [str(number) for number in range(torch.cuda.device_count())]

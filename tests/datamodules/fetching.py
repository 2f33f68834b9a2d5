"""What other processes do in tests of the store; imports little, so that they start soon."""

import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from datamodules.stores import pipe, transfer
from datamodules.stores.store import Store, open_file

BLOCK = 4096


def impatient() -> None:
    """Small blocks and short waits, in this process."""
    transfer.BLOCK, transfer.LEAST, transfer.WAIT, transfer.TRIES, transfer.OPEN_TRIES = BLOCK, 64, 0.001, 4, 2
    pipe.TRIES = 2


def fetch(store: Store, wanted: Sequence[str], together: Barrier | None = None) -> None:
    impatient()
    if together is not None:
        together.wait(60)
    for name in wanted:
        open_file(store, name)


def check(store: Store, folder: Path, together: Barrier, rounds: int) -> None:
    """Reads all shards again and again through a cache that has no room for them."""
    impatient()
    together.wait(60)
    for _ in range(rounds):
        for shard in store.manifest.shards:
            assert open_file(store, shard.name).read(shard.bytes + 1, 0) == (folder / shard.name).read_bytes()


def fork_while_fetching(store: Store, name: str, child: "Queue[int]") -> None:
    """Downloads in a thread; a child forked meanwhile shares its open files."""
    impatient()
    thread = threading.Thread(target=store.path, args=(name,))
    thread.start()
    (parts,) = store.path("manifest.json").parents[1].glob("*.parts")
    while not (parts / name).exists() or (parts / name).stat().st_size < 2 * BLOCK:
        pass
    pid = os.fork()
    if pid == 0:
        signal.pause()
    child.put(pid)
    thread.join()

"""When the ranks are killed: drawn by a seed, and each so that it is hit whatever the machine does meanwhile."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

STEPS, EVERY, ENDS = 60, 4, (30, 42)  # 20 epochs; a checkpoint every EVERY; rank.OPTIONS' stages end there
MOST = 42  # kills: a third of them within saves, each in one of its own
KINDS, VICTIMS = ("save", "switch", "anywhere"), ((0, 1), (0,), (1,), (0, 1), (0, 1))
SWITCH = ("save", "set_modes", "wrap_again", "rank_zero_info")  # of the stage before; what StageSwitch.apply calls


@dataclass(frozen=True)
class Moment:
    """The end of an attempt, after `step`; 0: while it starts, STEPS: while it ends and is evaluated.

    draw: in [0, 1), where. save: whether between two writes ("write") or two changes of names ("name"). victims: ranks.
    halved: last.ckpt is, afterwards.
    """

    step: int
    kind: str
    draw: float
    victims: Sequence[int]
    save: str
    workers: int
    halved: bool

    def place(self, straight: list[dict[str, Any]]) -> tuple[int, float]:
        """Before which event of the save, or call of the switch; how many seconds after the step. By the straight run,
        whose saves have the same events."""
        if self.kind == "save":
            after = next(line for line in straight if line.get("step") == self.step + 1)
            return int(self.draw * after["events"][self.save]), 0.0
        if self.kind == "switch":
            return int(self.draw * len(SWITCH)), 0.0
        times = {line["step"]: line["time"] for line in straight if "step" in line}
        times |= {0: straight[0]["time"], STEPS + 1: straight[-1]["time"]}
        return 0, self.draw * (times[self.step + 1] - times[self.step])

    def has_come(self, diary: list[dict[str, Any]]) -> bool:
        if self.kind != "anywhere":
            return any("at" in line for line in diary)
        return bool(diary) and max(line.get("step", line.get("began", 0)) for line in diary) >= self.step


def drawn(kills: int, seed: int) -> list[Moment]:
    """In order of steps, so that an attempt begins at or before the step at which it is killed."""
    rng = random.Random(seed)
    kinds = list(islice(cycle(KINDS), kills))
    saved = rng.sample(range(EVERY, STEPS, EVERY), kinds.count("save"))
    elsewhere = rng.choices(range(1, STEPS), k=kinds.count("anywhere"))
    if len(elsewhere) > 2:
        elsewhere[:2] = [0, STEPS]
    order = [(step, kind, rng.random()) for kind, steps in ((0, saved), (2, elsewhere)) for step in steps]
    for number in range(kinds.count("switch")):  # in turn: a stage that was saved once does not end again
        order.append((ENDS[number % 2], 1, number // 2 % len(SWITCH) / len(SWITCH)))
    order.sort()
    victims, saves = list(islice(cycle(VICTIMS), kills)), cycle(("write", "name"))
    rng.shuffle(victims)
    moments = []
    for (step, kind, draw), (later, after, _), who in zip(
        order, [*order[1:], (STEPS + 1, 1, 0.0)], victims, strict=True
    ):
        halved = after > 0 and later > step and rng.random() < 0.4  # after it, the next save makes fewer events
        # Ranks that have not met do not notice; and rank 0 would save what is to be killed before it is saved.
        alone = 0 < step < STEPS and (kind, draw) != (1, 0.0)
        save = next(saves) if kind == 0 else ""
        moments.append(Moment(step, KINDS[kind], draw, who if alone else (0, 1), save, rng.randrange(3), halved))
    return moments

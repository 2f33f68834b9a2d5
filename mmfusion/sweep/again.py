"""Luck or gain: the best configuration and the experiment as it is, trained anew under seeds that no trial had.

The best of many trials has the luckiest of many numbers; under other seeds, and on test, only what is a gain stays.
They are the two arms of a study, which shares their stages, goes on where it was stopped and tests them in pairs; at
their full length, without `trial_args`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mmfusion.study.definition import EVERYTHING, Arm, Claim, Study
from mmfusion.study.diary import read_json
from mmfusion.study.jobs import Plan
from mmfusion.sweep.definition import Sweep
from mmfusion.sweep.space import Setting, arguments

FOLDER, DEFAULT = "seeds", "default"


def again(sweep: Sweep, plan: Plan, number: int, setting: Setting, seeds: int) -> Plan:
    """A study of two arms in <sweep>/seeds. number, setting: of the best trial."""
    best = _arm(number)
    arms = {
        DEFAULT: Arm(sweep.experiment, prefix=sweep.prefix),
        best: Arm(sweep.experiment, arguments(sweep.parameters, setting), prefix=sweep.prefix),
    }
    claim = Claim(f"Trial {number}, the best on val, beats {sweep.experiment} as it is", best, (DEFAULT,))
    study = Study(
        f"{sweep.name}, the best again", DEFAULT, arms, sweep.encoders, sweep.experiment, sweep.args,
        {EVERYTHING: ()}, claims={"gain": claim},
    )  # fmt: skip
    return replace(plan, study=study, folder=plan.folder / FOLDER, seeds=fresh(sweep.seed, seeds))


def fresh(used: int, count: int) -> tuple[int, ...]:
    """The seeds after the one of the trials."""
    return tuple(range(used + 1, used + 1 + count))


def held(folder: Path, number: int) -> dict[str, Any]:
    """The report of that study in the sweep's folder; {} where there is none, or of another trial."""
    report = read_json(folder / FOLDER / "report.json")
    arms = [row["arm"] for row in report.get("variants", {}).get(EVERYTHING, [])]
    return report if _arm(number) in arms else {}


def _arm(number: int) -> str:
    return f"trial-{number}"

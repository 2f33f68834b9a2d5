"""What a sweep varies: dotted options, each with its distribution, and the settings that a run can be given of them."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from optuna.trial import BaseTrial

Kind = Literal["uniform", "loguniform", "int", "choice"]
Value = float | str  # of a choice: its name
Setting = dict[str, Value]  # by option


@dataclass(frozen=True)
class Parameter:
    """An option and what it may be.

    low, high: bounds, both included; of numbers. choices: the option's text by the name that plots show. when: by
    option of an earlier choice, the names under which this option exists at all.
    """

    option: str
    kind: Kind
    low: float = 0
    high: float = 0
    choices: Mapping[str, str] = field(default_factory=dict)
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def suggested(self, trial: BaseTrial) -> Value:
        """By Optuna's sampler."""
        if self.kind == "choice":
            return str(trial.suggest_categorical(self.option, list(self.choices)))
        if self.kind == "int":
            return trial.suggest_int(self.option, int(self.low), int(self.high))
        return trial.suggest_float(self.option, self.low, self.high, log=self.kind == "loguniform")

    def argument(self, value: Value) -> str:
        """As on the command line."""
        return f"--{self.option}={self.choices[str(value)] if self.kind == 'choice' else value}"

    def ends(self) -> list[Value]:
        """The bounds, or all names."""
        return list(self.choices) if self.kind == "choice" else [self.low, self.high]

    def exists(self, setting: Mapping[str, Value]) -> bool:
        return all(setting.get(option) in names for option, names in self.when.items())


def walked(parameters: Sequence[Parameter], value: Callable[[Parameter], Value]) -> Setting:
    """A value of each parameter that exists under those before it."""
    setting: Setting = {}
    for parameter in parameters:
        if parameter.exists(setting):
            setting[parameter.option] = value(parameter)
    return setting


def arguments(parameters: Sequence[Parameter], setting: Mapping[str, Value]) -> tuple[str, ...]:
    """Of a setting, in the file's order: a choice comes before the options that exist under it."""
    return tuple(one.argument(setting[one.option]) for one in parameters if one.option in setting)


def extremes(parameters: Sequence[Parameter]) -> Iterator[Setting]:
    """Settings that hold each end of each parameter, under each name of the choices that it hangs on."""
    seen = []
    for one in parameters:
        names = [[(option, name) for name in allowed] for option, allowed in one.when.items()]
        for end, under in itertools.product(one.ends(), itertools.product(*names)):
            fixed: Setting = {**dict(under), one.option: end}
            setting = walked(parameters, lambda other, fixed=fixed: fixed.get(other.option, other.ends()[0]))  # type: ignore[misc]
            if setting not in seen:
                seen.append(setting)
                yield setting

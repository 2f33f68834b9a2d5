"""What a study is: the YAML file of its arms, variants and claims, read strictly."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfusion.strict import StrictFile

EVERYTHING = "all"  # the variant of a study that names none
LOGS = "logs"  # the folder beside those of the arms
NEEDS = ("pretrained_image", "trained_text")
SEEDS = 3
# What the runner gives to each run; a --config could hold any of it, and change unseen.
DECIDED = (
    "--exp", "--experiment", "--encoders", "--data", "--data.path", "--data.init_args.path", "--runs", "--resume",
    "--branch", "--checkpoint_stages", "--seed_everything", "--config", "--print_config", "--help",
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One line of the study's table: a run per variant and seed, or a row of another arm's results.

    experiment: file in experiments/; "" for a row. args: of this arm alone, after the study's and the variant's. view:
    of the results; the primary one if None. row_of: the arm whose runs hold this row. once: trained on the first
    variant, counts for all. variants: that it is trained on; all if None. prefix: the stage until whose end it shares
    training with others of its variant and seed; None: it trains by itself. encoders: overlays that its options are
    for; with others there is no such arm.
    """

    experiment: str = ""
    args: tuple[str, ...] = ()
    view: str | None = None
    row_of: str | None = None
    once: bool = False
    variants: tuple[str, ...] | None = None
    prefix: str | None = None
    encoders: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Claim:
    """`arm` beats each of `beats`, on `variants` (all if None). needs: those of NEEDS that a test takes."""

    says: str
    arm: str
    beats: tuple[str, ...]
    variants: tuple[str, ...] | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A study file. args: of all arms. variants: options of each, by name. metric: <primary label>/ndcg@10 if None.

    seeds: how many, from 1 on, where the command names none.
    """

    name: str
    reference: str
    arms: dict[str, Arm]
    encoders: str = "tiny"
    experiment: str = "fusion_moe"
    args: tuple[str, ...] = ()
    variants: dict[str, tuple[str, ...]] = field(default_factory=lambda: {EVERYTHING: ()})
    metric: str | None = None
    prefix: str | None = None
    seeds: int = SEEDS
    claims: dict[str, Claim] = field(default_factory=dict)

    def trained(self) -> dict[str, Arm]:
        """The arms that are runs of their own."""
        return {name: arm for name, arm in self.arms.items() if arm.row_of is None}

    def source(self, arm: str) -> str:
        """The arm whose runs hold this arm's numbers: itself, or that of which it is a row."""
        return self.arms[arm].row_of or arm

    def variants_of(self, arm: str) -> list[str]:
        """The variants for which an arm has numbers."""
        if not self.has(arm):
            return []
        limits = [self.arms[name].variants for name in (arm, self.source(arm))]
        return [name for name in self.variants if all(limit is None or name in limit for limit in limits)]

    def has(self, arm: str) -> bool:
        """Whether an arm is one for the study's encoders."""
        limits = [self.arms[name].encoders for name in (arm, self.source(arm))]
        return all(limit is None or self.encoders in limit for limit in limits)

    def trained_on(self, arm: str) -> list[str]:
        """The variants on which the arm that holds its numbers is trained: the first alone if it counts for all."""
        variants = self.variants_of(self.source(arm))
        return variants[:1] if self.arms[self.source(arm)].once else variants

    def run_folder(self, folder: Path, arm: str, variant: str, seed: int) -> Path:
        """The run that holds an arm's numbers for a variant and seed; `folder` is the study's own."""
        source = self.source(arm)
        trained = self.trained_on(arm)[0] if self.arms[source].once else variant
        return folder / source / f"{trained}-{seed}"

    def job_name(self, arm: str, variant: str, seed: int) -> str:
        """Of that run, in study.json and jobs.json: <arm>/<variant>-<seed>; an arm and a variant may hold dashes."""
        return self.run_folder(Path(), arm, variant, seed).as_posix()


def read_study(path: Path) -> Study:
    """Raises ValueError that names the file, the key and what was expected, with the nearest name."""
    file = StrictFile(path)
    given = file.keys(file.content(), Study, "", needs=("reference", "arms"))
    read: dict[str, Any] = {"name": path.stem}
    for key in ("reference", "encoders", "experiment"):
        if key in given:
            read[key] = file.text(given[key], key)
    for key in ("metric", "prefix"):
        read[key] = file.text_or_none(given.get(key), key)
    read["seeds"] = file.count(given.get("seeds", SEEDS), "seeds")
    read["args"] = options_of(file, given.get("args", []), "args")
    if given.get("variants"):
        variants = file.named(given["variants"], "variants")
        read["variants"] = {name: options_of(file, args, f"variants.{name}") for name, args in variants.items()}
    default = {"experiment": read.get("experiment", Study.experiment), "prefix": read["prefix"]}
    arms = file.named(given["arms"], "arms", reserved=(LOGS,))
    read["arms"] = {name: _arm(file, arm, f"arms.{name}", default) for name, arm in arms.items()}
    claims = file.named(given.get("claims") or {}, "claims")
    read["claims"] = {name: _claim(file, claim, f"claims.{name}") for name, claim in claims.items()}
    study = Study(**read)
    _check_names(file, study)
    return study


def _arm(file: StrictFile, given: Any, where: str, default: Mapping[str, Any]) -> Arm:
    given = file.keys({} if given is None else given, Arm, where)
    row_of = given.get("row_of")
    if row_of is not None:
        for key in ("experiment", "args", "once", "prefix"):
            if key in given:
                raise file.error(f"{where}.{key}", "is given", f"a row has none, it is a part of the runs of {row_of}")
        if given.get("view") is None:
            raise file.error(f"{where}.view", "is missing", f"which row of {row_of}, as in view: bm25")
        default = {}
    read = dict(default) | given
    for key in ("view", "row_of", "prefix"):
        read[key] = file.text_or_none(read.get(key), f"{where}.{key}")
    if "experiment" in given:
        file.text(given["experiment"], f"{where}.experiment")
    read["args"] = options_of(file, given.get("args", []), f"{where}.args")
    read["once"] = file.switch(given.get("once", False), f"{where}.once")
    for key in ("variants", "encoders"):
        if given.get(key) is not None:
            read[key] = file.texts(given[key], f"{where}.{key}")
    return Arm(**read)


def _claim(file: StrictFile, given: Any, where: str) -> Claim:
    given = file.keys(given, Claim, where, needs=("says", "arm", "beats"))
    beats = file.texts(given["beats"], f"{where}.beats")
    if not beats:
        raise file.error(f"{where}.beats", "is empty", "expected a list of arms")
    variants, needs = given.get("variants"), given.get("needs") or []
    return Claim(
        file.text(given["says"], f"{where}.says"),
        file.text(given["arm"], f"{where}.arm"),
        beats,
        None if variants is None else file.texts(variants, f"{where}.variants"),
        file.texts([needs] if isinstance(needs, str) else needs, f"{where}.needs"),
    )


def options_of(file: StrictFile, given: Any, where: str) -> tuple[str, ...]:
    """Each as on the command line, in one text: --dotted.option=value."""
    options = file.texts(given, where)
    for option in options:
        if why := unfit(option):
            raise file.error(where, f"holds {option!r}", why)
    return options


def unfit(option: str) -> str | None:
    """Why an option cannot be given to the runs of a study; None where it can."""
    name, equals, _ = option.partition("=")
    if name.rstrip("+") in DECIDED:
        return "the command gives that to each run, leave it out"
    return None if name.startswith("--") and equals else 'expected "--dotted.option=value"'


def _check_names(file: StrictFile, study: Study) -> None:
    """Every name that is used is one of the study's own."""
    file.among(study.reference, study.arms, "reference")
    if study.arms[study.reference].encoders is not None:
        raise file.error("reference", f"is {study.reference}", "an arm of all encoders; others are tested against it")
    for name, arm in study.arms.items():
        where = f"arms.{name}"
        for variant in arm.variants or ():
            file.among(variant, study.variants, f"{where}.variants")
        if arm.row_of is not None:
            file.among(arm.row_of, study.trained(), f"{where}.row_of")
        if study.has(name) and not study.variants_of(name):
            raise file.error(f"{where}.variants", "leaves none", f"there are {', '.join(study.variants)}")
    for name, claim in study.claims.items():
        where = f"claims.{name}"
        file.among(claim.arm, study.arms, f"{where}.arm")
        for beaten in claim.beats:
            file.among(beaten, study.arms, f"{where}.beats")
        if claim.arm in claim.beats:
            raise file.error(f"{where}.beats", f"names {claim.arm}", "other arms than the claim's own")
        for variant in claim.variants or ():
            file.among(variant, study.variants, f"{where}.variants")
        for need in claim.needs:
            file.among(need, NEEDS, f"{where}.needs")

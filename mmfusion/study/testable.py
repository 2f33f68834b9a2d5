"""Whether a study's runs can answer a claim, and in words why not."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmfusion.study.definition import Claim, Study
from mmfusion.study.finished import Finished
from mmfusion.study.parameters import FILE as PARAMETERS
from mmfusion.study.results import Results, Row


def variants_of_claim(study: Study, claim: Claim) -> Sequence[str]:
    return list(study.variants) if claim.variants is None else claim.variants


def obstacles(claim: Claim, variant: str, results: Results) -> list[str]:
    """Why a claim cannot be tested in a variant; nothing where it can."""
    rows = results.rows[variant]
    absent = [_absent(arm, variant, results) for arm in (claim.arm, *claim.beats)]
    if any(absent):
        return list(dict.fromkeys(filter(None, absent)))
    arm, measured = rows[claim.arm], (results.split, results.metric)
    apart = [other for other in claim.beats if not arm.comparable(rows[other], *measured)]
    unlike = [f"{claim.arm} and {other} have no seed and query in common" for other in apart]
    return [*filter(None, (unmet(need, arm) for need in claim.needs)), *unlike]


def _absent(arm: str, variant: str, results: Results) -> str | None:
    study, row = results.study, results.rows[variant].get(arm)
    if not study.has(arm):
        limits = [study.arms[name].encoders for name in (arm, study.source(arm))]
        only = next(limit for limit in limits if limit is not None and study.encoders not in limit)
        return f"{arm} is an arm of ENCODERS={' or '.join(only)}, not of {study.encoders}"
    if row is None:
        return f"{arm} is not trained on {variant}"
    return None if row.runs else f"{arm} has no finished run ({next(iter(row.missing.values()), 'no seed')})"


def unmet(need: str, row: Row) -> str | None:
    """Why the runs of a row do not have what a claim needs; None where they do."""
    tell = {"pretrained_image": _image_from_scratch, "trained_text": _text_frozen}[need]
    return next(filter(None, (tell(run, row.arm) for run in row.runs.values())), None)


def _image_from_scratch(run: Finished, arm: str) -> str | None:
    image: Mapping[str, Any] | None = run.config.get("model", {}).get("image")
    if not image:
        return f"{arm} has no image encoder"
    options = image.get("init_args") or {}
    kind = str(image.get("class_path", "")).rpartition(".")[2]
    if options.get("pretrained", kind not in {"TimmEncoder", "ScratchImageEncoder"}):
        return None
    name = options.get("model", kind)
    option = " (model.image.init_args.pretrained=false)" if kind == "TimmEncoder" else ""
    return f"the image encoder {name} starts from scratch{option}"


def _text_frozen(run: Finished, arm: str) -> str | None:
    if run.trains is None:
        return f"{run.folder} does not tell what it trained (its {PARAMETERS} is missing or damaged)"
    if any(stage["text"] for stage in run.trains.values()):
        return None
    return f"the text encoder of {arm} is frozen in every stage ({', '.join(run.trains)})"

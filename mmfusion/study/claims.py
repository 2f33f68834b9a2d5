"""Whether a study's claims hold, from tests that are corrected for their number."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mmfusion.retrieval.html.numbers import interval, signed
from mmfusion.retrieval.seeds import Estimate
from mmfusion.retrieval.significance import holm, p_text
from mmfusion.study.definition import Claim, Study
from mmfusion.study.results import Results, Row

Verdict = Literal["holds", "fails", "undecided", "not testable here"]


@dataclass(frozen=True)
class Differences:
    """The differences that a report shows: of each arm to the reference, and of each claim's arm to those it beats."""

    found: Mapping[tuple[str, str, str], Estimate]

    def less(self, variant: str, arm: str, other: str) -> Estimate | None:
        """The mean of `arm` less that of `other`; None where it was not tested."""
        if (variant, arm, other) in self.found:
            return self.found[variant, arm, other]
        found = self.found.get((variant, other, arm))
        return found and turned(found)

    def __len__(self) -> int:
        return len(self.found)


def differences(results: Results) -> Differences:
    """On the study's split and metric, each pair once; p_holm is corrected for all of them."""
    found: dict[tuple[str, str, str], Estimate] = {}
    for variant, arm, other in _pairs(results.study):
        rows = results.rows[variant]
        if arm == other or not {arm, other} <= rows.keys() or (variant, other, arm) in found:
            continue
        difference = rows[arm].less(rows[other], results.split, results.metric)
        if difference is not None:
            found[variant, arm, other] = difference
    corrected = holm(np.array([one.p for one in found.values()], dtype=np.float64))
    return Differences({
        pair: replace(one, p_holm=float(p)) for (pair, one), p in zip(found.items(), corrected, strict=True)
    })  # fmt: skip


def _pairs(study: Study) -> Iterator[tuple[str, str, str]]:
    for variant in study.variants:
        yield from ((variant, arm, study.reference) for arm in study.arms)
        for claim in study.claims.values():
            if variant in _variants(study, claim):
                yield from ((variant, claim.arm, other) for other in claim.beats)


def _variants(study: Study, claim: Claim) -> Sequence[str]:
    return list(study.variants) if claim.variants is None else claim.variants


@dataclass(frozen=True)
class Judged:
    """A claim in one variant: its verdict, and why in a few words."""

    variant: str
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class JudgedClaim:
    """A claim and what became of it in each variant. sentence: all of it, for a reader."""

    name: str
    says: str
    judged: list[Judged]

    @property
    def verdict(self) -> str:
        """That of all variants, or such as `holds on sparse, undecided on full`."""
        variants: dict[str, list[str]] = {}
        for one in self.judged:
            variants.setdefault(one.verdict, []).append(one.variant)
        if len(variants) == 1:
            return self.judged[0].verdict
        return ", ".join(f"{verdict} on {' and '.join(names)}" for verdict, names in variants.items())

    @property
    def why(self) -> str:
        if len({one.why for one in self.judged}) == 1:
            return self.judged[0].why
        return "; ".join(f"on {one.variant} {one.why}" for one in self.judged)

    @property
    def sentence(self) -> str:
        return f"{self.says}: {self.verdict}: {self.why}."


def judge(results: Results, tests: Differences) -> list[JudgedClaim]:
    """Each claim of the study in each of its variants.

    It holds where its arm is significantly better than every one it should beat; it fails where it is significantly
    worse than one; it is not testable where an arm has no run, or the runs lack what the claim needs.
    """
    study = results.study
    return [
        JudgedClaim(name, claim.says, [_judged(claim, variant, results, tests) for variant in _variants(study, claim)])
        for name, claim in study.claims.items()
    ]


def _judged(claim: Claim, variant: str, results: Results, tests: Differences) -> Judged:
    rows = results.rows[variant]
    obstacles = [_absent(rows.get(arm), arm, variant) for arm in (claim.arm, *claim.beats)]
    found: dict[str, Estimate] = {}
    if not any(obstacles):
        obstacles.append(unmet(claim.needs, rows[claim.arm]) if claim.needs else None)
        for other in claim.beats:
            difference = tests.less(variant, claim.arm, other)
            if difference is None:
                obstacles.append(f"{claim.arm} and {other} have no seed and query in common")
            else:
                found[other] = difference
    if told := [obstacle for obstacle in obstacles if obstacle]:
        return Judged(variant, "not testable here", " and ".join(told))
    better = [_shown(other, one) for other, one in found.items() if one.significant and one.mean > 0]
    worse = [_shown(other, one) for other, one in found.items() if one.significant and one.mean < 0]
    unclear = [_shown(other, one) for other, one in found.items() if not one.significant]
    verdict: Verdict = "fails" if worse else "undecided" if unclear else "holds"
    parts = {"worse than": worse, "not significantly different from": unclear, "better than": better}
    whys = [f"{how} {_listed(others)}" for how, others in parts.items() if others]
    return Judged(variant, verdict, f"{claim.arm} is {', but '.join(whys)}")


def _listed(others: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(others[:-1]), others[-1])))


def turned(difference: Estimate) -> Estimate:
    """The difference the other way round."""
    return replace(difference, mean=-difference.mean, low=-difference.high, high=-difference.low)


def _shown(other: str, difference: Estimate) -> str:
    """gated (+.021 [.012, .030], p = .004)."""
    bounds = interval({"low": difference.low, "high": difference.high})
    return f"{other} ({signed(difference.mean)} {bounds}, p {p_text(difference.p_holm)})"


def _absent(row: Row | None, arm: str, variant: str) -> str | None:
    if row is None:
        return f"{arm} is not trained on {variant}"
    return None if row.runs else f"{arm} has no finished run ({next(iter(row.missing.values()), 'no seed')})"


def unmet(need: str, row: Row) -> str | None:
    """Why the runs of a row do not have what a claim needs; None where they do."""
    assert need == "pretrained_image", need
    for run in row.runs.values():
        image: Mapping[str, Any] | None = run.config.get("model", {}).get("image")
        if not image:
            return f"{row.arm} has no image encoder"
        options = image.get("init_args") or {}
        kind = str(image.get("class_path", "")).rpartition(".")[2]
        if not options.get("pretrained", kind != "TimmEncoder"):
            name = options.get("model", kind)
            return f"the image encoder {name} starts from scratch (model.image.init_args.pretrained=false)"
    return None

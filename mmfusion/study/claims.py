"""Whether a study's claims hold, in a sentence each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfusion.retrieval.html.numbers import interval, signed
from mmfusion.retrieval.seeds import Estimate
from mmfusion.retrieval.significance import p_text
from mmfusion.study.definition import Claim
from mmfusion.study.differences import Differences
from mmfusion.study.results import Results
from mmfusion.study.testable import obstacles, variants_of_claim

Verdict = Literal["holds", "fails", "undecided", "not testable here"]
UNCLEAR, FEW = "not significantly different from", "comparable under one seed alone to"


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
    worse than one; it is not testable where an arm has no run, or the runs lack what the claim needs. A difference
    under one common seed decides nothing, unless the whole study has one.
    """
    study = results.study
    return [
        JudgedClaim(
            name, claim.says, [_judged(claim, variant, results, tests) for variant in variants_of_claim(study, claim)]
        )
        for name, claim in study.claims.items()
    ]


def _judged(claim: Claim, variant: str, results: Results, tests: Differences) -> Judged:
    if told := obstacles(claim, variant, results):
        return Judged(variant, "not testable here", " and ".join(told))
    found = {other: tests.of_claim(variant, claim.arm, other) for other in claim.beats}
    sides: dict[str, list[str]] = {"worse than": [], UNCLEAR: [], FEW: [], "better than": []}
    for other, one in found.items():
        few = one.seeds < 2 <= len(results.seeds)
        side = FEW if few else UNCLEAR if not one.significant else "better than" if one.mean > 0 else "worse than"
        sides[side].append(_shown(other, one))
    verdict: Verdict = "fails" if sides["worse than"] else "undecided" if sides[UNCLEAR] or sides[FEW] else "holds"
    whys = [f"{how} {_listed(others)}" for how, others in sides.items() if others]
    return Judged(variant, verdict, f"{claim.arm} is {', but '.join(whys)}")


def _listed(others: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(others[:-1]), others[-1])))


def _shown(other: str, difference: Estimate) -> str:
    """gated (+.021 [.012, .030], p = .004)."""
    bounds = interval({"low": difference.low, "high": difference.high})
    few = "; over queries only, one seed" if difference.seeds < 2 else ""
    return f"{other} ({signed(difference.mean)} {bounds}, p {p_text(difference.p_holm)}{few})"

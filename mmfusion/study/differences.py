"""The tests of a study, corrected for their number.

Claims are named before anything is trained, the table's differences are read afterwards: two families of tests, each
corrected for its own number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmfusion.retrieval.seeds import Estimate
from mmfusion.retrieval.significance import holm
from mmfusion.study.results import Results, Row
from mmfusion.study.testable import obstacles, variants_of_claim

Pairs = Mapping[tuple[str, str, str], Estimate]  # by variant, arm and the other arm: the mean of `arm` less the other's


@dataclass(frozen=True)
class Differences:
    """table: of each arm to the reference. claims: of each testable claim's arm to those it should beat.

    p_holm is corrected for the number of tests in each of the two.
    """

    table: Pairs
    claims: Pairs

    def to_reference(self, row: Row, reference: str) -> Estimate | None:
        """None for the reference itself, and where it was not tested."""
        return self.table.get((row.variant, row.arm, reference))

    def of_claim(self, variant: str, arm: str, other: str) -> Estimate:
        """The mean of `arm` less that of `other`."""
        if (variant, arm, other) in self.claims:
            return self.claims[variant, arm, other]
        return turned(self.claims[variant, other, arm])

    def each(self) -> dict[tuple[str, str, str], Estimate]:
        """Every pair once."""
        new = {key: one for key, one in self.claims.items() if (key[0], key[2], key[1]) not in self.table}
        return dict(self.table) | new


def differences(results: Results) -> Differences:
    """On the study's split and metric."""
    study = results.study
    table = [(variant, arm, study.reference) for variant in study.variants for arm in study.arms]
    claims = [
        (variant, claim.arm, other)
        for variant in study.variants
        for claim in study.claims.values()
        if variant in variants_of_claim(study, claim) and not obstacles(claim, variant, results)
        for other in claim.beats
    ]
    return Differences(_corrected(table, results), _corrected(claims, results))


def _corrected(pairs: Sequence[tuple[str, str, str]], results: Results) -> Pairs:
    """Each pair once, whichever way round, where there is something to test."""
    found: dict[tuple[str, str, str], Estimate] = {}
    for variant, arm, other in pairs:
        rows = results.rows[variant]
        if arm == other or not {arm, other} <= rows.keys() or (variant, other, arm) in found:
            continue
        difference = rows[arm].less(rows[other], results.split, results.metric)
        if difference is not None:
            found[variant, arm, other] = difference
    corrected = holm(np.array([one.p for one in found.values()], dtype=np.float64))
    return {pair: replace(one, p_holm=float(p)) for (pair, one), p in zip(found.items(), corrected, strict=True)}


def turned(difference: Estimate) -> Estimate:
    """The difference the other way round."""
    return replace(difference, mean=-difference.mean, low=-difference.high, high=-difference.low)

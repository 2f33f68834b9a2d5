"""What a reader must know of a study's numbers, in sentences."""

from collections.abc import Iterator, Mapping, Sequence

from mmfusion.retrieval.seeds import Estimate
from mmfusion.study.differences import Differences
from mmfusion.study.results import Results

FEW = {
    1: ("One seed", "intervals and p are over queries alone and say nothing of other seeds."),
    2: ("Two seeds", "intervals may be too narrow where seeds decide (they hold the mean in .86 of cases)."),
}
MOST = 6  # names in a sentence
Pair = tuple[str, str, str]  # variant, arm, other arm


def notes(results: Results, tests: Differences) -> list[str]:
    """Sentences on few seeds, on several versions of the code, and on what is not there."""
    reference = results.study.reference
    bare = [variant for variant, rows in results.rows.items() if reference in rows and not rows[reference].runs]
    few = sorted({row.arm for row in results.all_rows() if row.runs and row.missing})
    others = [arm for arm in results.study.arms if not results.study.has(arm)]
    found = [*_few_seeds(results, tests.each())]
    if bare:
        found.append(f"No differences on {' and '.join(bare)}: the reference {reference} has no finished run there.")
    if few:
        found.append(f"Over fewer seeds than the others: {', '.join(few)}; differences use common seeds.")
    if others:
        found.append(f"Arms of other encoders than {results.study.encoders} are left out: {', '.join(others)}.")
    by_commit = runs_by_commit(results)
    if len(by_commit) > 1:
        told = " and ".join(f"{commit[:7]} ({named(runs)})" for commit, runs in by_commit.items())
        found.append(f"Made by {len(by_commit)} versions of the code, which may compute differently: {told}.")
    return found


def _few_seeds(results: Results, tests: Mapping[Pair, Estimate]) -> Iterator[str]:
    """Of the whole study where it has so few, else of the pairs that have so few in common."""
    for seeds, (title, meaning) in FEW.items():
        if len(results.seeds) == seeds:
            yield f"{title}: {meaning}"
            continue
        pairs = [pair for pair, one in tests.items() if one.seeds == seeds]
        told = [
            text
            for variant in results.rows
            for text in _told([pair for pair in pairs if pair[0] == variant], tests, len(results.rows) > 1)
        ]
        if told:
            yield f"{title} in common: {named(told)}; there {meaning}"


def _told(pairs: Sequence[Pair], tests: Mapping[Pair, Estimate], several: bool) -> list[str]:
    """Pairs of one variant as texts, all of it as one. several: there are other variants."""
    if not pairs:
        return []
    variant = pairs[0][0]
    place = f" on {variant}" if several else ""
    if len(pairs) > 1 and len(pairs) == sum(key[0] == variant for key in tests):
        return [f"all arms{place}"]
    return [f"{arm} and {other}{place}" for _, arm, other in pairs]


def runs_by_commit(results: Results) -> dict[str, list[str]]:
    """Names of the runs that each commit had a part in; a run that was continued may have several."""
    found: dict[str, list[str]] = {}
    for row in results.all_rows():
        for seed, run in row.runs.items():
            name = results.study.job_name(row.arm, row.variant, seed)
            trained = results.job(row, seed).get("commits") or []
            for commit in filter(None, dict.fromkeys([*trained, run.results.get("run", {}).get("commit")])):
                if name not in found.setdefault(commit, []):
                    found[commit].append(name)
    return found


def named(names: Sequence[str]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more

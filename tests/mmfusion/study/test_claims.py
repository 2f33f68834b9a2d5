import re
from pathlib import Path

import numpy as np
import pytest

from mmfusion.retrieval.significance import holm
from mmfusion.study.claims import JudgedClaim, differences, judge
from mmfusion.study.results import read_study
from tests.mmfusion.study.drawn_runs import METRICS, PRETRAINED, draw_arm, draw_run, study_of

TEXT = """
reference: moe
variants: {{sparse: ["--a=1"], full: []}}
arms: {{bm25: {{row_of: moe, view: bm25}}, masked_sum: {{}}, gated: {{}}, moe: {{}}, joint: {{variants: [sparse]}}}}
claims: {{it: {{says: MoE wins, arm: moe, beats: [{beats}]{more}}}}}
"""
BOTH = ("sparse", "full")


def claim(folder: Path, beats: str, more: str = "") -> JudgedClaim:
    results = read_study(folder / "runs", study_of(folder, TEXT.format(beats=beats, more=more)))
    (judged,) = judge(results, differences(results))
    return judged


def draw(folder: Path, variants: tuple[str, ...] = BOTH, **means: float) -> None:
    for arm, value in means.items():
        draw_arm(folder / "runs", arm, value, variants)


def test_holds_where_every_one_is_beaten(tmp_path: Path) -> None:
    draw(tmp_path, masked_sum=0.4, gated=0.5, moe=0.6)
    found = claim(tmp_path, "masked_sum, gated, bm25")
    assert found.verdict == "holds"
    one = r"\(\+\.\d{3} \[\.\d{3}, \.\d{3}\], p (= \.\d+|< \.0001)\)"
    better = rf"moe is better than masked_sum {one}, gated {one} and bm25 {one}"
    assert re.fullmatch(rf"MoE wins: holds: on sparse {better}; on full {better}\.", found.sentence)


def test_fails_where_one_is_better(tmp_path: Path) -> None:
    draw(tmp_path, masked_sum=0.7, gated=0.5, moe=0.6)
    found = claim(tmp_path, "gated, masked_sum", ", variants: [full]")
    assert found.verdict == "fails"
    assert found.sentence.startswith("MoE wins: fails: moe is worse than masked_sum (−.")
    assert ", but better than gated (+." in found.why


def test_undecided_where_one_is_as_good(tmp_path: Path) -> None:
    draw(tmp_path, masked_sum=0.6, gated=0.5, moe=0.6)
    found = claim(tmp_path, "masked_sum, gated", ", variants: [sparse]")
    assert found.verdict == "undecided"
    assert "moe is not significantly different from masked_sum (" in found.why
    assert ", but better than gated (+" in found.why


def test_seeds_that_disagree_decide_nothing(tmp_path: Path) -> None:
    """By queries alone each seed's difference is beyond doubt."""
    for seed, value in enumerate((0.45, 0.5, 0.7), start=1):
        draw_run(tmp_path / "runs" / "moe" / f"sparse-{seed}", {"fused": value})
        draw_run(tmp_path / "runs" / "gated" / f"sparse-{seed}", {"fused": 0.5})
    assert claim(tmp_path, "gated", ", variants: [sparse]").verdict == "undecided"


def test_variants_may_differ(tmp_path: Path) -> None:
    draw(tmp_path, ("sparse",), gated=0.5, moe=0.6)
    draw(tmp_path, ("full",), gated=0.7, moe=0.6)
    assert claim(tmp_path, "gated").verdict == "holds on sparse, fails on full"


def test_not_testable_without_a_run(tmp_path: Path) -> None:
    draw(tmp_path, moe=0.6, gated=0.5)
    found = claim(tmp_path, "masked_sum, gated, joint")
    assert found.verdict == "not testable here"
    assert [one.why for one in found.judged] == [
        "masked_sum has no finished run (was not trained yet) and joint has no finished run (was not trained yet)",
        "masked_sum has no finished run (was not trained yet) and joint is not trained on full",
    ]


def test_not_testable_without_a_seed_in_common(tmp_path: Path) -> None:
    draw_run(tmp_path / "runs" / "moe" / "full-1", {"fused": 0.6})
    draw_run(tmp_path / "runs" / "gated" / "full-2", {"fused": 0.6})
    found = claim(tmp_path, "gated", ", variants: [full]")
    assert found.sentence == "MoE wins: not testable here: moe and gated have no seed and query in common."


def test_what_a_claim_needs(tmp_path: Path) -> None:
    draw(tmp_path, gated=0.5, moe=0.6)
    needs = ", needs: pretrained_image"
    found = claim(tmp_path, "gated", needs)
    assert found.why == "the image encoder resnet18 starts from scratch (model.image.init_args.pretrained=false)"
    assert claim(tmp_path, "gated").verdict == "holds"


@pytest.mark.parametrize("image", [PRETRAINED, {"class_path": "mmfusion.encoders.DualImageEncoder", "init_args": {}}])
def test_a_pretrained_image_encoder(tmp_path: Path, image: dict[str, object]) -> None:
    draw_arm(tmp_path / "runs", "moe", 0.6, BOTH, image=image)
    draw(tmp_path, gated=0.5)
    assert claim(tmp_path, "gated", ", needs: pretrained_image").verdict == "holds"


def test_no_image_encoder(tmp_path: Path) -> None:
    draw_arm(tmp_path / "runs", "moe", 0.6, BOTH, image={})
    draw(tmp_path, gated=0.5)
    assert claim(tmp_path, "gated", ", needs: pretrained_image").why == "moe has no image encoder"


def test_p_is_corrected_for_every_pair_once(tmp_path: Path) -> None:
    """Three arms and a row against the reference, gated against masked_sum; moe against gated is among them already."""
    draw(tmp_path, ("sparse",), masked_sum=0.5, gated=0.501, moe=0.5, joint=0.502)
    text = (
        TEXT.partition("claims")[0].format()
        + """
claims:
  first: {says: so, arm: moe, beats: [gated]}
  second: {says: so, arm: gated, beats: [masked_sum, moe]}
"""
    )
    results = read_study(tmp_path / "runs", study_of(tmp_path, text))
    tests = differences(results)
    assert sorted((arm, other) for _, arm, other in tests.found) == [
        ("bm25", "moe"), ("gated", "masked_sum"), ("gated", "moe"), ("joint", "moe"), ("masked_sum", "moe"),
    ]  # fmt: skip
    found = list(tests.found.values())
    assert [one.p_holm for one in found] == pytest.approx(holm(np.array([one.p for one in found])).tolist())
    there, back = tests.less("sparse", "gated", "moe"), tests.less("sparse", "moe", "gated")
    assert there is not None
    assert back is not None
    assert (back.mean, back.low, back.high, back.p_holm) == (-there.mean, -there.high, -there.low, there.p_holm)
    rows = results.rows["sparse"]
    alone = rows["gated"].less(rows["moe"], "test", METRICS[0])
    assert alone is not None
    assert (alone.mean, alone.p) == (there.mean, there.p)

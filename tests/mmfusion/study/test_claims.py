import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmfusion.retrieval.significance import holm
from mmfusion.study.claims import JudgedClaim, judge
from mmfusion.study.differences import differences
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


FROZEN = {"adapt": {"text": 0, "image": 9}, "fuse": {"text": 0, "image": 0}}
TUNED = {"adapt": {"text": 7, "image": 9}, "fuse": {"text": 0, "image": 0}}


def test_a_text_encoder_that_no_stage_trains(tmp_path: Path) -> None:
    draw_arm(tmp_path / "runs", "moe", 0.6, BOTH, trains=FROZEN)
    draw(tmp_path, gated=0.5)
    found = claim(tmp_path, "gated", ", needs: trained_text")
    assert found.sentence == (
        "MoE wins: not testable here: the text encoder of moe is frozen in every stage (adapt, fuse)."
    )
    found = claim(tmp_path, "gated", ", needs: [pretrained_image, trained_text]")
    assert "resnet18 starts from scratch" in found.why
    assert "frozen in every stage" in found.why


def test_a_text_encoder_that_a_stage_trains(tmp_path: Path) -> None:
    draw_arm(tmp_path / "runs", "moe", 0.6, BOTH, trains=TUNED)
    draw(tmp_path, gated=0.5)
    assert claim(tmp_path, "gated", ", needs: trained_text").verdict == "holds"
    (tmp_path / "runs" / "moe" / "full-2" / "parameters.json").write_text("{")
    found = claim(tmp_path, "gated", ", needs: trained_text")
    assert found.verdict == "holds on sparse, not testable here on full"
    assert "full-2 does not tell what it trained" in found.why


def test_an_arm_of_other_encoders(tmp_path: Path) -> None:
    """It is no arm of a study with these, so that nothing of it is missing either."""
    draw(tmp_path, gated=0.5, moe=0.6)
    text = TEXT.replace("gated: {{}}", "gated: {{encoders: [minilm]}}").format(beats="gated", more="")
    study = study_of(tmp_path, text)
    results = read_study(tmp_path / "runs", study)
    (judged,) = judge(results, differences(results))
    assert judged.sentence == "MoE wins: not testable here: gated is an arm of ENCODERS=minilm, not of tiny."
    assert "gated" not in results.rows["full"]
    results = read_study(tmp_path / "runs", replace(study, encoders="minilm"))
    assert judge(results, differences(results))[0].verdict == "holds"


def draw_with_one_seed_in_common(folder: Path) -> None:
    draw(folder, ("sparse",), moe=0.6, masked_sum=0.4)
    draw_run(folder / "runs" / "gated" / "sparse-2", {"fused": 0.4})


def test_one_seed_in_common_decides_nothing(tmp_path: Path) -> None:
    draw_with_one_seed_in_common(tmp_path)
    found = claim(tmp_path, "gated, masked_sum", ", variants: [sparse]")
    assert found.verdict == "undecided"
    assert re.search(
        r"comparable under one seed alone to gated \(.*; over queries only, one seed\), but better", found.why
    )


def test_a_study_of_one_seed_decides_by_queries_and_says_so(tmp_path: Path) -> None:
    for arm, value in (("moe", 0.6), ("gated", 0.4)):
        draw_arm(tmp_path / "runs", arm, value, ("sparse",), seeds=1)
    found = claim(tmp_path, "gated", ", variants: [sparse]")
    assert found.verdict == "holds"
    assert "over queries only, one seed" in found.why


def test_p_is_corrected_in_two_families(tmp_path: Path) -> None:
    """Four arms against the reference; two pairs of claims, each once, of which one is in the table too."""
    draw(tmp_path, ("sparse",), masked_sum=0.5, gated=0.501, moe=0.5, joint=0.502)
    text = (
        TEXT.partition("claims")[0].format()
        + """
claims:
  first: {says: so, arm: moe, beats: [gated]}
  second: {says: so, arm: gated, beats: [masked_sum, moe]}
  third: {says: so, arm: joint, beats: [gated], needs: pretrained_image}
"""
    )
    results = read_study(tmp_path / "runs", study_of(tmp_path, text))
    tests = differences(results)
    assert list(tests.table) == [("sparse", arm, "moe") for arm in ("bm25", "masked_sum", "gated", "joint")]
    assert list(tests.claims) == [("sparse", "moe", "gated"), ("sparse", "gated", "masked_sum")]
    for family in (tests.table, tests.claims):
        found = list(family.values())
        assert [one.p_holm for one in found] == pytest.approx(holm(np.array([one.p for one in found])).tolist())
    there, back = tests.of_claim("sparse", "gated", "moe"), tests.of_claim("sparse", "moe", "gated")
    assert (back.mean, back.low, back.high, back.p_holm) == (-there.mean, -there.high, -there.low, there.p_holm)
    rows = results.rows["sparse"]
    alone = rows["gated"].less(rows["moe"], "test", METRICS[0])
    assert alone is not None
    assert (alone.mean, alone.p) == (there.mean, there.p)
    assert len(tests.each()) == 5

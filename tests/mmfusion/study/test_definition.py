"""A study file is read to the letter: what it says, its defaults, and each mistake with the nearest name."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mmfusion.study.definition import Arm, Claim, Study, read_study

ROOT = Path(__file__).parents[3]
WHOLE = """
encoders: minilm
experiment: fusion_moe
args: ["--model.evaluation.baselines=false"]
variants: {sparse: ["--data.text_fields=[title_sparse]"], full: []}
metric: relevance/recall@100
reference: moe
prefix: adapt
seeds: 2
arms:
  bm25: {row_of: moe, view: bm25}
  zero_shot_image: {row_of: image_only, view: zero_shot_image}
  image_only: {experiment: image_only, prefix: null, once: true}
  gated: {experiment: fusion_gated, args: ["--model.dim=64"]}
  moe: {}
  late: {prefix: align}
  joint: {experiment: joint, prefix: null, variants: [sparse]}
claims:
  fusion: {says: "it wins", arm: moe, beats: [gated, bm25], variants: [sparse], needs: pretrained_image}
"""


def study_of(folder: Path, text: str = WHOLE) -> Study:
    path = folder / "whole.yaml"
    path.write_text(text)
    return read_study(path)


def test_a_whole_file(tmp_path):
    assert study_of(tmp_path) == Study(
        name="whole", reference="moe", encoders="minilm", metric="relevance/recall@100", prefix="adapt", seeds=2,
        args=("--model.evaluation.baselines=false",),
        variants={"sparse": ("--data.text_fields=[title_sparse]",), "full": ()},
        arms={
            "bm25": Arm(row_of="moe", view="bm25"), "zero_shot_image": Arm(row_of="image_only", view="zero_shot_image"),
            "image_only": Arm("image_only", once=True),
            "gated": Arm("fusion_gated", ("--model.dim=64",), prefix="adapt"),
            "moe": Arm("fusion_moe", prefix="adapt"), "late": Arm("fusion_moe", prefix="align"),
            "joint": Arm("joint", variants=("sparse",)),
        },
        claims={"fusion": Claim("it wins", "moe", ("gated", "bm25"), ("sparse",), ("pretrained_image",))},
    )  # fmt: skip


def test_the_least_that_a_file_can_say(tmp_path):
    assert study_of(tmp_path, "reference: moe\narms: {moe: }") == Study("whole", "moe", {"moe": Arm("fusion_moe")})


def test_where_an_arm_has_its_numbers(tmp_path):
    study = study_of(tmp_path)
    runs = {arm: [str(study.run_folder(Path("s"), arm, v, 2)) for v in study.variants_of(arm)] for arm in study.arms}
    assert runs == {
        "bm25": ["s/moe/sparse-2", "s/moe/full-2"], "moe": ["s/moe/sparse-2", "s/moe/full-2"],
        "image_only": ["s/image_only/sparse-2"] * 2, "zero_shot_image": ["s/image_only/sparse-2"] * 2,
        "gated": ["s/gated/sparse-2", "s/gated/full-2"], "late": ["s/late/sparse-2", "s/late/full-2"],
        "joint": ["s/joint/sparse-2"],
    }  # fmt: skip
    assert study.trained_on("image_only") == ["sparse"]
    assert list(study.trained()) == ["image_only", "gated", "moe", "late", "joint"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refrence": "moe"}, "refrence is an unknown key: there are .* did you mean reference?"),
        ({"reference": None}, "reference is missing: needed are reference, arms"),
        ({"reference": "moo"}, "reference names 'moo': there are .*; did you mean moe?"),
        ({"arms": []}, r"arms is \[\]: expected names"),
        ({"arms": {"logs": {}}}, "arms names 'logs': .* and not logs"),
        ({"arms": {"a/b": {}}}, "arms names 'a/b': expected letters"),
        ({"arms": {"moe": {"experimnt": "joint"}}}, "arms.moe.experimnt is an unknown key: .* mean experiment?"),
        ({"arms": {"moe": {"once": "yes"}}}, "arms.moe.once is 'yes': expected true or false"),
        ({"arms": {"moe": {"experiment": None}}}, "arms.moe.experiment is None: expected a text"),
        ({"arms": {"moe": {"args": ["model.dim=3"]}}}, "arms.moe.args holds 'model.dim=3': expected"),
        ({"arms": {"moe": {"args": ["--data.path=x"]}}}, "arms.moe.args holds '--data.path=x': the command gives that"),
        ({"arms": {"moe": {"args": "--model.dim=3"}}}, "arms.moe.args is '--model.dim=3': expected a list"),
        ({"arms": {"moe": {"variants": ["sparce"]}}}, "arms.moe.variants names 'sparce': .*; did you mean sparse?"),
        ({"arms": {"moe": {"variants": []}}}, "arms.moe.variants leaves none"),
        ({"arms": {"moe": {}, "bm25": {"row_of": "mo", "view": "bm25"}}}, "arms.bm25.row_of names 'mo'"),
        ({"arms": {"moe": {}, "bm25": {"row_of": "moe"}}}, "arms.bm25.view is missing: which row of moe"),
        ({"arms": {"moe": {}, "b": {"row_of": "moe", "view": "v", "args": []}}}, "arms.b.args is given: a row"),
        ({"arms": {"moe": {"args": ["--runs+=x"]}}}, "arms.moe.args holds '--runs.=x': the command gives that"),
        ({"args": ["--config=more.yaml"]}, "args holds '--config=more.yaml': the command gives that"),
        ({"seeds": 0}, "seeds is 0: expected a whole number from 1 on"),
        ({"claims": {"c": {"says": "x", "arm": "moe"}}}, "claims.c.beats is missing"),
        ({"claims": {"c": {"says": "x", "arm": "moe", "beats": []}}}, "claims.c.beats is empty"),
        ({"claims": {"c": {"says": "x", "arm": "moe", "beats": ["gate"]}}}, "claims.c.beats names 'gate': .* gated?"),
        ({"claims": {"c": {"says": "x", "arm": "moe", "beats": ["gated"], "needs": "gpu"}}}, "needs names 'gpu'"),
        ({"claims": {"c": {"says": "x", "arm": "moe", "beats": ["moe"]}}}, "beats names moe: other arms than"),
        ({"arms": {"moe": {"encoders": "minilm"}}}, "arms.moe.encoders is 'minilm': expected a list"),
        ({"arms": {"moe": {"encoders": ["minilm"]}}}, "reference is moe: an arm of all encoders"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"whole\.yaml: .*{message}"):
        study_of(tmp_path, yaml.safe_dump(yaml.safe_load(WHOLE) | change))


def test_an_arm_for_some_encoders(tmp_path):
    """With others it is trained on nothing, and so are its rows."""
    arms = {"moe": {}, "tuned": {"encoders": ["dual"]}, "row": {"row_of": "tuned", "view": "bm25"}}
    study = study_of(tmp_path, yaml.safe_dump(yaml.safe_load(WHOLE) | {"arms": arms, "claims": {}}))
    assert [set(study.variants_of(arm)) for arm in arms] == [{"sparse", "full"}, set(), set()]
    dual = replace(study, encoders="dual")
    assert [set(dual.trained_on(arm)) for arm in arms] == [{"sparse", "full"}] * 3


def test_no_yaml(tmp_path):
    with pytest.raises(ValueError, match=r"whole\.yaml is no YAML"):
        study_of(tmp_path, "arms: {moe")


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_projects_own_studies_name_experiments_that_exist(path):
    study = read_study(path)
    for arm in study.trained().values():
        assert (ROOT / "experiments" / f"{arm.experiment}.yaml").is_file()
        for overlay in (study.encoders, *(arm.encoders or ())):
            assert (ROOT / "experiments" / "encoders" / f"{overlay}.yaml").is_file()

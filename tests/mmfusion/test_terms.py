"""Terms beyond the four, hard negatives' rows, teachers' scores, and how a loss that is not finite stops a run."""

import csv
import dataclasses
import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from datamodules.pair_tables import write_pair_table
from mmfusion.batch import Judged, TupleBatch
from mmfusion.contract import contract
from mmfusion.features import part_of
from mmfusion.loggers import AppendingCSVLogger
from mmfusion.losses import Distillation, GradedInfoNCE, InfoNCE, Loss, Matryoshka, Pairs, Sigmoid
from mmfusion.run import FusionCLI
from mmfusion.stages import LossWeights, Stage, Until
from mmfusion.term_checks import check_data, check_label
from mmfusion.terms import TERM_VIEWS, Losses, base_of, loss_terms, sides, trained_dims
from tests.ddp import run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer

TUPLES, HARD = 6, 2
DESIRABLE = "query_product_desirability"


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def batch(shards) -> TupleBatch:
    """6 tuples with 2 hard negatives each, of one batch of 18 products: rows 6 on are the negatives'."""
    data = small_data(shards, batch_size=20)
    data.setup("fit")
    whole = next(iter(data.train_dataloader()))
    rows = TUPLES * (1 + HARD)
    judged = whole.judged["relevance"]
    inside = judged.product < rows
    column = Judged(*(getattr(judged, f.name)[inside] for f in dataclasses.fields(Judged)))
    clicks = dataclasses.replace(column, gain=column.gain * 0.5, positive=column.gain > 2)
    query = whole.query
    return TupleBatch(
        dataclasses.replace(query, text=query.text[:TUPLES], id=query.id[:TUPLES], valid=query.valid[:TUPLES]),
        part_of(whole.product, slice(rows)),
        {"relevance": column, "clicks": clicks},
        {"teacher": dataclasses.replace(column, gain=column.gain - 3.0, positive=column.gain > 9)},
        torch.tensor([0, 1] * TUPLES),
    )


class Asked(Loss):
    """A user's own loss, which keeps what it was given."""

    def forward(self, left: Tensor, right: Tensor, pairs: Pairs, left_valid: Tensor, right_valid: Tensor) -> Tensor:
        self.asked = (left, right, pairs, left_valid, right_valid)
        return left.sum() + right.sum()


class AskedForScores(Asked):
    reads = "scores"


def asked(batch: TupleBatch, term: str, label: str | None = None) -> tuple:
    loss = (AskedForScores if label == "teacher" else Asked)(label)
    losses = Losses(more={f"{term}_mine": loss}).modules()
    vectors = {name: torch.randn(TUPLES if name == "query" else len(batch.product.id), 4) for name in sides([term])}
    loss_terms(losses, {f"{term}_mine"}, vectors, batch)
    return losses[f"{term}_mine"].asked


def test_names_of_further_terms():
    assert base_of(DESIRABLE) == "query_product"
    assert base_of("text_image_2") == "text_image"
    assert sides(["query_image_x", "query_text"]) == {"query", "image", "text"}
    for wrong in ("query_product", "query_product_", "query", "product_x", "query_product_X", "query_product_a.b"):
        with pytest.raises(ValueError, match=r"model.losses.more.*such as query_product_desirability"):
            Losses(more={wrong: InfoNCE()})


@pytest.mark.parametrize("term", list(TERM_VIEWS))
def test_hard_negatives_are_rows_of_the_product_side(batch, term):
    left, right, pairs, left_valid, right_valid = asked(batch, term)
    rows = TUPLES * (1 + HARD)
    there = batch.product.present & batch.product.valid[:, None]
    of_view = {"query": batch.query.valid, "fused": batch.product.valid, "text": there[:, 0], "image": there[:, 1]}
    assert len(right) == rows
    assert len(left) == (rows if term == "text_image" else TUPLES)
    assert torch.equal(left_valid, of_view[TERM_VIEWS[term][0]])
    assert torch.equal(right_valid, of_view[TERM_VIEWS[term][1]])
    found = {(int(i), int(j)): float(gain) for (i, j), gain in zip(pairs.rows, pairs.gain, strict=True)}
    if term == "text_image":
        ids = batch.product.id.tolist()
        assert found == {(i, j): 1.0 for i in range(rows) for j in range(rows) if ids[i] == ids[j]}
    else:
        judged = batch.judged["relevance"]
        listed = list(zip(judged.product.tolist(), judged.query_id.tolist(), judged.gain.tolist(), strict=True))
        of_query = batch.query.id.tolist()
        assert found == {(i, j): gain for j, q, gain in listed for i in range(TUPLES) if of_query[i] == q}
        assert any(j >= TUPLES for _, j in found), "else the negatives' own judgments were not looked at"


def test_what_is_not_valid_takes_no_part(batch):
    batch = dataclasses.replace(batch, product=dataclasses.replace(batch.product, valid=torch.arange(18) != 7))
    for term, (_, right) in TERM_VIEWS.items():
        assert not asked(batch, term)[4][7], right


def test_judgments_are_of_a_column_and_scores_of_a_teachers_table(batch):
    """Also where both have the name: what a loss reads says which it means."""
    by_default, clicks, teacher = (asked(batch, "query_text", label)[2] for label in (None, "clicks", "teacher"))
    assert torch.equal(by_default.gain, asked(batch, "query_text", "relevance")[2].gain)
    assert torch.equal(clicks.gain, by_default.gain * 0.5)
    assert torch.equal(teacher.gain, by_default.gain - 3)
    assert not teacher.positive.any()
    shadowing = dataclasses.replace(batch, scores={"clicks": batch.scores["teacher"]})
    assert torch.equal(asked(shadowing, "query_text", "clicks")[2].gain, clicks.gain)
    losses = Losses(more={"query_text_x": AskedForScores("clicks"), "query_text_y": Asked("clicks")}).modules()
    vectors = {"query": torch.randn(TUPLES, 4), "text": torch.randn(len(batch.product.id), 4)}
    loss_terms(losses, {"query_text_x", "query_text_y"}, vectors, shadowing)
    assert torch.equal(losses["query_text_x"].asked[2].gain, teacher.gain)
    assert torch.equal(losses["query_text_y"].asked[2].gain, clicks.gain)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (InfoNCE, None),
        (lambda: InfoNCE("clicks"), None),
        (lambda: Distillation("teacher"), None),
        (lambda: Matryoshka(Distillation("teacher"), [2]), None),
        (lambda: Matryoshka(InfoNCE("clicks"), [2]), None),
        (
            lambda: InfoNCE("clicked"),
            r"model.losses.more.query_text_mine.init_args.label 'clicked' is neither one of the shards' label columns "
            r"\(relevance, clicks\) nor of the tables of data.scores \(teacher, clicker\). Did you mean clicks\?",
        ),
        (lambda: Distillation("clickers"), r"'clickers' is neither .*. Did you mean clicker\?"),
        (
            lambda: InfoNCE("teacher"),
            r"'teacher' is one of the tables of data.scores \(teacher, clicker\), but InfoNCE learns from judgments: "
            r"name one of the shards' label columns \(relevance, clicks\)$",
        ),
        (
            lambda: Distillation("clicks"),
            r"'clicks' is one of the shards' label columns .*, but Distillation learns from a table of scores: name "
            r"one of the tables of data.scores \(teacher, clicker\)$",
        ),
        (lambda: Matryoshka(Distillation("clicks"), [2]), "but Distillation learns from a table of scores"),
        (lambda: Matryoshka(InfoNCE("teacher"), [2]), "but InfoNCE learns from judgments"),
        (lambda: AskedForScores(None), "label is null, but AskedForScores learns from a table of scores: name one of"),
    ],
)
def test_a_label_is_one_that_its_loss_can_learn_from(loss, said):
    with nullcontext() if said is None else pytest.raises(ValueError, match=said):
        check_label("query_text_mine", loss(), ["relevance", "clicks"], ["teacher", "clicker"])


@pytest.mark.parametrize("stage", ["first", "last"])
def test_labels_of_all_stages_are_checked_before_training(shards, tmp_path, stage):
    weights = {"first": LossWeights(query_text=1.0), "last": LossWeights(query_text=1.0)}
    weights[stage] = LossWeights(more={"query_product_mine": 1.0})
    stages = {"first": Stage(Until(steps=2), weights["first"]), "last": Stage(Until(fraction=1.0), weights["last"])}
    said = r"more.query_product_mine.init_args.label 'relevnce' .* data.scores \(none\). Did you mean relevance\?"
    module = small_module(losses=Losses(more={"query_product_mine": InfoNCE("relevnce")}), stages=stages)
    trainer = small_trainer(tmp_path)
    with pytest.raises(ValueError, match=said):
        trainer.fit(module, small_data(shards))
    assert trainer.global_step == 0
    unused = small_module(losses=Losses(more={"query_product_mine": InfoNCE("relevnce")}))
    unused.query.encoder.fit(["red cup", "blue hat", "number 12 lamp", "green shoe", "yellow"])
    small_trainer(tmp_path).test(unused, small_data(shards), verbose=False)
    assert set(unused.results) == {"val", "test"}, "other data may be evaluated on"


def test_an_unused_term_may_have_any_label(shards, tmp_path):
    module = small_module(losses=Losses(more={"query_product_mine": InfoNCE("relevnce")}))
    trainer = small_trainer(tmp_path, steps=8)
    trainer.fit(module, small_data(shards))
    assert trainer.global_step == 8


def test_a_judged_pairs_loss_learns_nothing_from_scores(tmp_path):
    """InfoNCE over a teacher's table has no positives: it would be 0 in every step."""
    shards = small_shards(tmp_path)
    query, product = np.arange(4).repeat(3), np.tile(np.array([1, 2, 3]), 4)
    write_pair_table(shards, "teacher", "scores", query, product, np.arange(12, dtype=np.float32), {})
    data = {"scores": ["teacher"]}
    for loss, said in ((InfoNCE("teacher"), "InfoNCE learns from judgments"), (Distillation("teacher"), None)):
        module = small_module(losses=Losses(query_product=loss))
        trainer = small_trainer(tmp_path, steps=8)
        with nullcontext() if said is None else pytest.raises(ValueError, match=said):
            trainer.fit(module, small_data(shards, **data))
        assert trainer.global_step == (8 if said is None else 0)


def test_what_a_product_is_to_itself_has_no_label():
    with pytest.raises(ValueError, match=r"losses.text_image_x has the label 'clicks', but .* no label"):
        small_module(losses=Losses(more={"text_image_x": InfoNCE("clicks")}))


def test_terms_of_a_batch_with_hard_negatives_depend_on_them(batch):
    module = small_module().eval()
    module.query.encoder.fit(["red cup", "blue hat", "number 12 lamp", "green shoe", "yellow"])
    all_terms = module.terms(batch, set(TERM_VIEWS))
    without = dataclasses.replace(batch, product=part_of(batch.product, slice(TUPLES)), judged={
        name: Judged(*(getattr(part, f.name)[part.product < TUPLES] for f in dataclasses.fields(Judged)))
        for name, part in batch.judged.items()
    })  # fmt: skip
    fewer = module.terms(without, set(TERM_VIEWS))
    assert all(all_terms[name] > fewer[name] for name in TERM_VIEWS), "more negatives, a harder task"


def test_the_reach_of_a_stage_is_found_on_one_tuple_too(batch):
    from mmfusion.reach import reached

    module = small_module(losses=Losses(more={DESIRABLE: InfoNCE()}))
    module.query.encoder.fit(["red cup", "blue hat", "number 12 lamp", "green shoe", "yellow"])
    one = dataclasses.replace(batch, query=dataclasses.replace(
        batch.query, text=batch.query.text[:1], id=batch.query.id[:1], valid=batch.query.valid[:1]
    ))  # fmt: skip
    found = [reached(module, module.query, module.product, module.losses, {DESIRABLE}, part) for part in (one, batch)]
    assert found[0] == found[1]
    assert f"losses.{DESIRABLE}.log_scale" in found[0]
    assert "losses.query_product.log_scale" not in found[0]
    assert any(name.startswith("product.fusion") for name in found[0])


def test_a_term_twice_is_the_term_with_twice_the_weight(shards, tmp_path):
    found = []
    for weights in (LossWeights(query_product=2.0), LossWeights(query_product=1.0, more={DESIRABLE: 1.0})):
        losses = Losses(InfoNCE(learnable=False), more={DESIRABLE: InfoNCE("relevance", learnable=False)})
        module = small_module(losses=losses, stages={"all": Stage(Until(fraction=1.0), weights)})
        logger = AppendingCSVLogger(tmp_path, name="exp", version=str(len(found)))
        small_trainer(tmp_path, logger=logger, log_every_n_steps=1, steps=2).fit(module, small_data(shards))
        found.append(module)
    for (name, one), other in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        assert torch.equal(one, other), name
    with (tmp_path / "exp/1/metrics.csv").open() as file:
        row = next(iter(csv.DictReader(file)))
    assert row[f"train/{DESIRABLE}"] == row["train/query_product"]
    assert row[f"train/scale/{DESIRABLE}"]


@pytest.mark.parametrize(
    ("stage", "losses", "said"),
    [
        (
            {"query_product_desire": 1.0},
            {DESIRABLE: InfoNCE()},
            rf"losses.more.query_product_desire: .*mean {DESIRABLE}",
        ),
        ({"query_product": 1.0}, {}, r"losses.more.query_product: there is no such term; model.losses.more has none"),
        ({DESIRABLE: -1.0}, {DESIRABLE: InfoNCE()}, "must not be negative"),
        ({DESIRABLE: 0.0}, {DESIRABLE: InfoNCE()}, "every weight is 0; give one of .*desirability"),
    ],
)
def test_weights_of_further_terms_are_checked(stage, losses, said):
    with pytest.raises(ValueError, match=said):
        small_module(losses=Losses(more=losses), stages={"all": Stage(Until(fraction=1.0), LossWeights(more=stage))})


# ---- options ---------------------------------------------------------------------------------------------------------


def options(shards: Path, *more: str) -> list[str]:
    files = ("base", "encoders/tiny", "fusion_gated")
    return [*(f"--config=experiments/{name}.yaml" for name in files), f"--data.init_args.path={shards}", *more]


def parsed(*arguments: str) -> FusionCLI:
    return FusionCLI.parse(list(arguments), None)


@pytest.mark.parametrize("way", ["yaml", "whole", "dotted"])
def test_further_terms_are_options(shards, tmp_path, way):
    graded = {"class_path": "GradedInfoNCE", "init_args": {"label": "clicks", "temperature": 0.1}}
    if way == "yaml":
        file = tmp_path / "more.yaml"
        stage = yaml.safe_load(Path("experiments/base.yaml").read_text())["model"]["stages"]
        stage["fuse"]["losses"]["more"] = {DESIRABLE: 0.3}
        file.write_text(yaml.safe_dump({"model": {"losses": {"more": {DESIRABLE: graded}}, "stages": stage}}))
        given = [f"--config={file}"]
    elif way == "whole":
        given = [f"--model.losses.more={json.dumps({DESIRABLE: graded})}",
                 f"--model.stages.fuse.losses.more={json.dumps({DESIRABLE: 0.3})}"]  # fmt: skip
    else:
        given = [f"--model.losses.more.{DESIRABLE}={json.dumps(graded)}",
                 f"--model.losses.more.query_text_{way}=InfoNCE",
                 f"--model.stages.fuse.losses.more.{DESIRABLE}=0.3",
                 f"--model.stages.fuse.losses.more.query_text_{way}=0.1"]  # fmt: skip
    cli = parsed(*options(shards, *given))
    loss = cli.model.losses[DESIRABLE]
    assert (type(loss).__name__, loss.label, round(1 / loss.scale.item(), 6)) == ("GradedInfoNCE", "clicks", 0.1)
    assert cli.model.stages["fuse"].losses.active()[DESIRABLE] == 0.3
    assert cli.model.stages["fuse"].losses.query_text == 0.2, "the stage's other weights stay"
    again = tmp_path / "config.yaml"
    again.write_text(cli.resolved())
    repeated = parsed(f"--config={again}")
    assert repeated.model.losses[DESIRABLE].label == "clicks"


def test_a_resumed_run_has_the_same_terms(shards):
    def of(*given: str) -> dict:
        return contract(yaml.safe_load(parsed(*options(shards, *given)).resolved()))

    chunked = {"class_path": "Matryoshka", "init_args": {"loss": {"class_path": "Sigmoid"}, "dims": [8]}}
    assert not [key for key in of(f"--model.losses.query_text={json.dumps(chunked)}") if "chunk" in key]
    one = of(f"--model.losses.more={json.dumps({DESIRABLE: {'class_path': 'InfoNCE'}})}")
    other = of(
        f"--model.losses.more={json.dumps({DESIRABLE: {'class_path': 'GradedInfoNCE'}})}", "--model.micro_batch=8"
    )
    differ = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert f"model.losses.more.{DESIRABLE}.class_path" in differ
    assert "model.micro_batch" in differ


LOSSES = ["Distillation", "GradedInfoNCE", "InfoNCE", "Matryoshka", "Sigmoid"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("query_product=InfoNCe", "InfoNCe: the nearest names are InfoNCE"),
        ("query_product=mmfusion.losses.Sigmiod", "Sigmiod: the nearest names are Sigmoid"),
        ('more={"query_product_x": "InfoNCe"}', "InfoNCe: the nearest names are InfoNCE"),
        (
            'query_text={"class_path": "Matryoshka", "init_args": {"loss": "InfoNCe", "dims": [8]}}',
            "InfoNCe: the nearest names are InfoNCE",
        ),
        ("query_text=Loss", ""),
        ("query_text=torch.nn.Linear", ""),
    ],
)
def test_a_wrong_name_of_a_loss_is_told_with_the_right_ones(shards, given, said):
    with pytest.raises(ValueError, match=r"model\.losses takes a class name") as error:
        parsed(*options(shards, f"--model.losses.{given}"))
    assert f"for each term: {', '.join(LOSSES)}\n{said}" in f"{error.value}\n"


@pytest.mark.parametrize(
    ("loss", "near"),
    [
        ({"class_path": "InfoNCE", "init_args": {"temperatur": 3}}, "temperatur: the nearest names are temperature$"),
        ({"class_path": "Distillation", "init_args": {"label": "x", "teacher_temprature": 3}}, "teacher_temperature"),
        ({"class_path": "Sigmoid", "init_args": {"bais": 3}}, "bais: the nearest names are bias$"),
        (
            {"class_path": "Distillation", "init_args": {"label": "x", "hard_upto": 3}},
            "not accepted((?!hard_up_to).)*$",
        ),
    ],
)
@pytest.mark.parametrize("place", ["query_product", "more"])
def test_a_wrong_option_of_a_loss_is_told_with_the_nearest(shards, place, loss, near):
    value = {"query_product_x": loss} if place == "more" else loss
    with pytest.raises(ValueError, match=f"(?s){near}"):
        parsed(*options(shards, f"--model.losses.{place}={json.dumps(value)}"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {stages: {fuse: {losses: {more: 3}}}}", "losses.more.*Expected a <class 'dict'>. Got value: 3"),
        ("model: {stages: {fuse: {losses: {more: [a, b]}}}}", r"losses.more.*Expected a <class 'dict'>. Got value: \["),
        ("model: {stages: {fuse: {rates: [a]}}}", r"rates.*Expected a <class 'dict'>. Got value: \['a'\]"),
        ("model: {stages: {fuse: }}", "model.stages.*Got value: None"),
        ("model: {stages: [a]}", r"model.stages.*Expected a <class 'dict'>. Got value: \['a'\]"),
        ("model: {losses: {more: 3}}", "model.losses.more.*Expected a <class 'dict'>"),
        ("model: 3", "model"),
        ("[1]", r"Unexpected config: \[1\]"),
        ("a: [", "parsing"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--model.stages.fuse.losses.more.query_text_x=1"]])
def test_what_is_no_table_is_left_to_the_parser(shards, tmp_path, text, said, more):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        parsed(*options(shards, f"--config={file}", *more))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_of_16_bits_are_refused(shards, precision):
    with pytest.raises(
        ValueError, match=f"trainer.precision={precision} would hold the weights in 16 bits.*bf16-mixed"
    ):
        parsed(*options(shards, f"--trainer.precision={precision}"))
    parsed(*options(shards, "--trainer.precision=bf16-mixed"))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_go_by_their_class_names(shards, name):
    inner = {"loss": {"class_path": "InfoNCE"}, "dims": [16, 32]} if name == "Matryoshka" else {}
    needed = {"label": "teacher"} if name == "Distillation" else inner
    given = json.dumps({"class_path": name, "init_args": needed})
    cli = parsed(*options(shards, f"--model.losses.query_product={given}"))
    assert type(cli.model.losses["query_product"]).__name__ == name
    if name == "Matryoshka":
        assert list(cli.model.searched) == ["text", "image", "fused", "fused@32", "fused@16"]


# ---- hard negatives --------------------------------------------------------------------------------------------------


def test_where_hard_negatives_come_from_is_logged(shards, tmp_path):
    logger = AppendingCSVLogger(tmp_path, name="exp", version="1")
    data = small_data(shards, hard_negatives=2, hard_max_gain=0.1)
    module = small_module(micro_batch=9, losses=Losses(InfoNCE(hard_up_to=0.1)))
    small_trainer(tmp_path, logger=logger, log_every_n_steps=2, steps=6).fit(module, data)
    with (tmp_path / "exp/1/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 3
    for row in rows:
        assert float(row["data/hard/random"]) + float(row["data/hard/judged"]) == pytest.approx(1)


def fitted_with_substitutes(shards: Path, folder: Path, losses: Losses, **data: Any) -> list[str]:
    """What rank 0 is warned of where labels worth .1 are read as hard negatives."""
    stages = {"all": Stage(Until(fraction=1.0), LossWeights(query_product=1.0, query_text=1.0, text_image=1.0))}
    trainer = small_trainer(folder, steps=1)
    options = {"hard_negatives": 1, "hard_max_gain": 0.1, **data}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(small_module(losses=losses, stages=stages), small_data(shards, **options))
    return [str(warning.message) for warning in seen if "hard_max_gain" in str(warning.message)]


def test_hard_negatives_that_no_loss_takes_as_such_are_warned_of(shards, tmp_path):
    (said,) = fitted_with_substitutes(shards, tmp_path, Losses(query_text=GradedInfoNCE(hard_up_to=0.09)))
    assert said.startswith(
        "data.hard_max_gain is 0.1, but hard_up_to is less in all of model.losses.query_product.init_args.hard_up_to, "
        "model.losses.query_text.init_args.hard_up_to: "
    )
    (said,) = fitted_with_substitutes(shards, tmp_path, Losses(query_text=Matryoshka(InfoNCE(), [2])))
    assert "query_text" in said


@pytest.mark.parametrize(
    ("losses", "data"),
    [
        (lambda: Losses(query_text=InfoNCE(hard_up_to=0.1)), {}),
        (lambda: Losses(query_text=Matryoshka(Sigmoid(hard_up_to=0.1), [2])), {}),
        (lambda: Losses(query_text=InfoNCE(mask_false_negatives=False)), {}),
        (Losses, {"hard_max_gain": 0.0, "hard_from": []}),
        (Losses, {"hard_max_gain": 0.0, "hard_negatives": 0}),
    ],
)
def test_hard_negatives_that_a_loss_takes_are_not_warned_of(shards, tmp_path, losses, data):
    assert fitted_with_substitutes(shards, tmp_path, losses(), **data) == []


# ---- not finite ------------------------------------------------------------------------------------------------------


class Broken(InfoNCE):
    """Not finite on the last of several ranks, in its second step."""

    steps = 0

    def forward(self, *args: object) -> Tensor:
        self.steps += 1
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        found = super().forward(*args)
        return found * float("inf") if self.steps == 2 and rank == ranks - 1 else found


def broken(rank: int, world: int, shards: Path, folder: Path) -> str:
    stages = {"all": Stage(Until(fraction=1.0), LossWeights(query_text=1.0, query_image=0.5))}
    module = small_module(losses=Losses(query_text=Broken()), stages=stages)
    trainer = small_trainer(folder, devices=world, strategy="ddp" if world > 1 else "auto", steps=4)
    with pytest.raises(RuntimeError) as error:
        trainer.fit(module, small_data(shards))
    return str(error.value)


@pytest.mark.parametrize("around", [False, True])
def test_unmasked_losses_have_extra_queries_or_hard_negatives(shards, around):
    """With both, the tuples' own pairs could not be told by their places."""

    def check(loss, **options):
        data = small_data(shards, **options)
        data.setup("fit")
        losses = nn.ModuleDict({"query_text": Matryoshka(loss, [4]) if around else loss})
        check_data({"only": Stage(Until(fraction=1.0), LossWeights(query_text=1))}, losses, data)

    both, none = {"extra_queries": 8, "hard_negatives": 1, "hard_from": []}, {}
    unmasked = InfoNCE(mask_false_negatives=False)
    for fine in (none, {"extra_queries": 8}, {"hard_negatives": 1, "hard_from": []}):
        check(unmasked, **fine)
    check(InfoNCE(), **both)
    with pytest.raises(ValueError, match=r"query_text.*mask_false_negatives is false.*leave out one of the three"):
        check(unmasked, **both)


def test_extra_queries_without_a_term_of_the_query_are_refused(shards):
    data = small_data(shards, extra_queries=8)
    data.setup("fit")
    stages = {"only": Stage(Until(fraction=1.0), LossWeights(text_image=1))}
    with pytest.raises(ValueError, match=r"data.extra_queries is 8, but no stage has a term of the query"):
        check_data(stages, nn.ModuleDict({"text_image": InfoNCE()}), data)


def test_a_loss_that_is_not_finite_stops_the_run_naming_step_stage_and_term(shards, tmp_path):
    said = broken(0, 1, shards, tmp_path)
    assert said.startswith("the loss is not finite at step 1, stage all: query_text is inf; query_image is ")
    assert "lower the stage's rates (--model.stages.<stage>.rates.<group>)" in said


def test_it_stops_every_rank(shards, tmp_path):
    said = run_ranks(broken, 2, shards, tmp_path, timeout=60)
    assert said[0] == said[1]
    assert said[0].startswith("the loss is not finite at step 1, stage all: query_text is inf on rank 1 of 2; query_im")


# ---- leading dimensions ----------------------------------------------------------------------------------------------


def test_the_dimensions_that_are_trained_to_do_alone():
    def loss(*dims: int) -> Loss:
        found = InfoNCE()
        found.dims = dims
        return found

    losses = Losses(loss(2, 8), query_image=loss(4), text_image=loss(3), more={"query_product_x": loss(4, 2)})
    stages = {
        "one": Stage(Until(steps=1), LossWeights(query_product=1.0, text_image=1.0)),
        "two": Stage(Until(fraction=1.0), LossWeights(query_text=1.0, more={"query_product_x": 1.0})),
    }
    assert trained_dims(stages, losses.modules(), 8) == {"fused": [2, 4], "text": []}
    with pytest.raises(ValueError, match=r"model.losses.query_text: dims has 16, but model.dim is 8"):
        small_module(losses=Losses(query_text=loss(4, 16)))

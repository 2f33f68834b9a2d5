"""Saves the view `mmfusion` in a W&B project: what we look at, in the order in which we look.

    .venv/bin/python experiments/dashboard.py --entity TEAM [--project mmfusion] [--column relevance] [--dry-run]

Runs      sorted by final/primary (the primary view's nDCG@10 on test); beside it val/primary, which sweeps maximise
          (`metric: {name: val/primary, goal: maximize}`), and the seed
Results   final/primary of each run; test nDCG@10 of its views; the table with intervals; all views and baselines;
          calibration of the scores
Training  val/primary, nDCG@10 of each view, the stage, the loss, its terms and their scales, learning rates, gates
Slices    nDCG@10, or of products Recall@10, of the primary view on each value of the built-in slices; their table
Examples  queries best and worst against text, with the photos and labels of their first products under each view

Without a key for W&B, or with --dry-run, the view is built, printed as JSON and not sent. Saving was NOT tried against
a server: the view follows the documented schema of wandb-workspaces, an optional extra.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from mmfusion.loggers import Wandb
from mmfusion.retrieval.report import FIRST as VIEWS
from mmfusion.retrieval.slices import OF_PRODUCTS, OF_QUERIES

try:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: the W&B view needs an extra, `pip install -e '.[dashboards]'`") from error

STEP = "trainer/global_step"
BARS = "wandb/bar/v0"


def view(entity: str, project: str, column: str = "relevance") -> ws.Workspace:
    """The view of a project; column: the label column that it shows."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name="mmfusion",
        sections=[
            section("Results", 2, results(column)),
            section("Training", 3, training(column)),
            section("Slices", 3, slices()),
            section("Examples", 1, [table("examples/test")]),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(
            order=[expr.Ordering(expr.Summary("final/primary"), ascending=False)],
            pinned_columns=["summary:final/primary", "summary:val/primary", "config:seed_everything"],
        ),
    )


def results(column: str) -> list[Any]:
    of_views: list[Any] = [f"final/test/{name}/{column}/ndcg@10" for name in VIEWS]
    return [
        wr.BarPlot(title="test nDCG@10 of the primary view", metrics=["final/primary"]),
        wr.BarPlot(title="test nDCG@10 of each view", metrics=of_views),
        table("results/test"),
        chart("charts/views/test", BARS, ("label", "value")),
        chart("charts/calibration/test", "wandb/lineseries/v0", ("step", "lineKey", "lineVal")),
    ]


def training(column: str) -> list[Any]:
    return [
        curves("val/primary", ["val/primary"]),
        curves("val nDCG@10 of each view", [f"val/{name}/{column}/ndcg@10" for name in VIEWS]),
        curves("stage", ["stage"]),
        curves("loss", ["train/loss"]),
        curves("loss terms", regex=r"^train/(query|text)_[a-z0-9_]*$"),
        curves("scales", regex=r"^train/scale/"),
        curves("learning rates", regex=r"^lr/"),
        curves("gates, mean over products", regex=r"^gates/.*/mean$"),
    ]


def slices() -> list[Any]:
    bars = [chart(f"charts/slices/test/{name}", BARS, ("label", "value")) for name in (*OF_QUERIES, *OF_PRODUCTS)]
    return [*bars, table("slices/test")]


def section(name: str, columns: int, panels: list[Any]) -> ws.Section:
    return ws.Section(name, panels, is_open=True, layout_settings=ws.SectionLayoutSettings(columns=columns))


def curves(title: str, metrics: Sequence[str] = (), regex: str | None = None) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=STEP, y=list(metrics), metric_regex=regex)


def table(key: str) -> wr.WeavePanelSummaryTable:
    return wr.WeavePanelSummaryTable(table_name=key)


def chart(key: str, preset: str, fields: Sequence[str]) -> wr.CustomChart:
    """A plot that a run logs under `key`; its table is beside it, with a column for each field of the preset."""
    return wr.CustomChart(
        query={"summaryTable": {"tableKey": f"{key}_table"}},
        chart_name=preset,
        chart_fields={name: name for name in fields},
        chart_strings={"title": key},
    )


def specification(workspace: ws.Workspace) -> str:
    """The JSON that `save` sends."""
    return workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", default="", help="team or user that owns the project; needed for saving")
    parser.add_argument("--project", default=Wandb().project)
    parser.add_argument("--column", default="relevance", help="label column to show")
    parser.add_argument("--dry-run", action="store_true", help="print the view and do not send it")
    options = parser.parse_args(argv)
    workspace = view(options.entity, options.project, options.column)
    if options.dry_run or Wandb().resolved() != "online":
        print(specification(workspace))
        why = "--dry-run" if options.dry_run else "no key for W&B (WANDB_API_KEY or ~/.netrc), or WANDB_MODE is set"
        print(f"not sent: {why}", file=sys.stderr)
    elif options.entity:
        workspace.save()
    else:
        parser.error("--entity is missing: the team or user that owns the project")


if __name__ == "__main__":
    main()

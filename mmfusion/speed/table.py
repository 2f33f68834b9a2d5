"""A run's speed on the terminal."""

from collections.abc import Mapping

from rich.table import Table

from mmfusion.speed.timeline import PARTS

TITLES = {
    "samples_per_s": "samples/s",
    "step_ms": "ms per step",
    **{f"{part}_ms": f"  {part}" for part in PARTS},
    "epoch_minutes": "minutes per epoch",
    "gpu_gib": "GiB on the GPU",
    "host_gib": "GiB of the process",
    "mfu": "FLOP utilisation",
}


def speed_table(stages: Mapping[str, Mapping[str, float]]) -> Table:
    """A column per stage, of what speed.json holds. A row is left out where no stage has its value, or all have 0."""
    table = Table(box=None, pad_edge=False)
    table.add_column("speed", no_wrap=True)
    for stage in stages:
        table.add_column(stage, justify="right")
    for name, title in TITLES.items():
        values = [stage.get(name) for stage in stages.values()]
        if any(values):
            table.add_row(title, *(_cell(name, value) for value in values))
    return table


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "mfu":
        return f"{100 * value:.1f} %"
    if name == "epoch_minutes" or value < 10:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

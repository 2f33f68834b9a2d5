"""The options of a run, parsed as the run itself would, before it starts: a mistake costs seconds."""

from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

import yaml


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Of `mmfusion train`, resolved as in a config.yaml; nothing is built.

    Raises ValueError or FileNotFoundError for what training would refuse.
    """
    from mmfusion.cli import fit_arguments  # noqa: PLC0415
    from mmfusion.run import FusionCLI  # noqa: PLC0415  (seconds, and only what is not done yet needs it)

    class Options(FusionCLI):
        def _set_seed(self) -> None:
            pass

        def instantiate_classes(self) -> None:
            pass

    try:
        cli = Options.parse(fit_arguments(arguments)[0], None)
    except ArgumentError as error:
        raise ValueError(str(error).removeprefix("argument None: ")) from error
    return dict(yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False)))

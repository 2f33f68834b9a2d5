"""`make mine`: a run's best checkpoint ranks the train queries; its hard negatives go beside the shards."""

import hashlib
import json
import re
import shlex
import string
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float, Int
from torch import Tensor

from mmfusion.batch import ProductBatch
from mmfusion.checkpoints import best_of
from mmfusion.environment import commit
from mmfusion.mining import Known, Mined, Rules, mined
from mmfusion.module import RetrievalModule
from mmfusion.options import shown
from mmfusion.progress import RunProgress
from mmfusion.retrieval.collected import QUERY
from mmfusion.retrieval.ranking import Ranking, Rows, VectorsOf, gathered, own_products, process, rank_own
from mmfusion.retrieval.topk import tie_ranks
from mmfusion.run import FusionCLI, config_of

TABLES = "data.pairs."  # a checkpoint's contract has one key for each table of pairs that it was trained with
PLACES = 1 << 21  # of lists that are held at a time: some 200 bytes each
TRAIN = "queries/train"
HARD = ("hard_negatives", "hard_from", "hard_max_gain")
SAFE = set(string.ascii_letters + string.digits + "-_./=:,+@%[]")  # what a shell leaves alone in a word


@dataclass
class Order:
    """What is to be mined.

    Args:
        trained_on: manifest hash of the data that the run was trained on; dense ids mean nothing elsewhere
        trained_with: tables of pairs that it was trained with, each with its sha256
        rules: which products of a list are taken
        name: of the table; None: mined-<iteration>
        view: that ranks; None: the run's primary one
        replace: a table of that name, if there is one
    """

    trained_on: str
    trained_with: dict[str, str]
    rules: Rules = field(default_factory=Rules)
    name: str | None = None
    view: str | None = None
    replace: bool = False


class MiningModule(RetrievalModule):
    """A RetrievalModule whose test pass ends in `found`, the negatives of the train queries, instead of metrics.

    `order` must be set before the pass. `found` and `iteration` are for rank 0.
    """

    order: Order
    found: Mined
    iteration: int
    name: str
    without_positive: int
    examines = False

    def setup(self, stage: str) -> None:
        """Raises ValueError, before anything is encoded, where the order cannot be carried out on these data."""
        super().setup(stage)
        if self.data.manifest_hash != self.order.trained_on:
            raise ValueError(
                f"{self.data.address} is another catalogue than the one that the run was trained on (manifest "
                f"{self.data.manifest_hash[:12]}, not {self.order.trained_on[:12]}): mine on a copy of that, DATA=..."
            )
        if self.ranked_by not in self.product.views:
            raise ValueError(f"--view={self.ranked_by}: the run has the views {', '.join(self.product.views)}")
        if self.data.test_loaders != ["corpus", TRAIN]:
            raise ValueError("data.test_splits is not an option of mining: it ranks the train queries")
        tables = self.data.pair_tables()
        self.iteration = 1 + iteration_of(self.order.trained_with, tables)
        self.name = self.order.name or f"mined-{self.iteration}"
        self.data.check_pair_table(self.name)
        if self.name in tables and not self.order.replace:
            raise ValueError(
                f"{self.data.address}: the table of pairs {self.name!r} exists: choose another name (NAME=...), or "
                "replace it (ARGS=--replace)"
            )
        self._warn_of_unlisted(tables)

    def _warn_of_unlisted(self, tables: dict[str, dict[str, Any]]) -> None:
        unlisted = not_listed(self.order.trained_with, tables)
        if unlisted and self.trainer.is_global_zero:
            warnings.warn(
                f"{self.data.address} does not list what the run was trained with: {', '.join(unlisted)}. Going by the "
                f"names alone, this is iteration {self.iteration}",
                stacklevel=2,
            )

    @property
    def ranked_by(self) -> str:
        return self.order.view or self.primary

    def views(self, batch: ProductBatch, names: set[str]) -> dict[str, Float[Tensor, "product dim"]]:
        """Of all views the one that ranks: the others' vectors would only take memory."""
        return super().views(batch, {self.ranked_by})

    def on_test_epoch_end(self) -> None:
        """Raises ValueError, on all ranks, when no negative is left."""
        self._log_failures("test", "test")
        corpus = own_products(self.collected.pop("corpus")[self.ranked_by].rows())
        queries = self.collected.pop(TRAIN)[QUERY].rows()
        self.collected = {}
        self.features.release()
        tie = tie_ranks(self.data.product_ids())
        known = Known.of(self.data.judgments("train"), len(tie))
        ids = np.unique(np.concatenate(gathered(queries.ids.cpu().numpy())))
        asked = known.with_positive(ids)
        self.without_positive = len(ids) - len(asked)
        rankings = ranked(queries, corpus, asked, tie, known, self.order.rules, self.evaluation.chunk)
        first, parts, vectors = process()[0] == 0, [], VectorsOf(corpus)
        for ranking in self._shown(rankings, len(asked)):
            lists = ranking.query_ids, ranking.top.ids.numpy(), ranking.top.scores.numpy()
            part = mined(*lists, known, vectors, self.order.rules)  # on all ranks, as it asks all for vectors
            parts += [part] if first else []
        self.found = Mined.joined(parts)
        if not gathered(len(self.found.query))[0]:
            raise ValueError(
                "no negative is left: choose other RANKS, a smaller MARGIN, or a run that ranks better"
                + (f"\n{self.found.told(self.without_positive)}" if first else "")
            )

    def _shown(self, rankings: Iterator[Ranking], queries: int) -> Iterator[Ranking]:
        """The rankings, with a bar where the trainer shows bars."""
        bar = self.trainer.progress_bar_callback
        if not isinstance(bar, RunProgress):
            yield from rankings
            return
        with bar.counting("ranking of train queries", queries, "query") as shown:
            for ranking in rankings:
                yield ranking
                shown.update(len(ranking.query_ids))


def ranked(
    queries: Rows,
    corpus: Rows,
    asked: Int[np.ndarray, "asked"],
    tie: Int[Tensor, "catalogue"],
    known: Known,
    rules: Rules,
    chunk: int,
) -> Iterator[Ranking]:
    """The lists of the queries `asked`, some at a time (PLACES together, or one), as deep as `mined` needs them.

    queries: this rank's rows; corpus: its `own_products`. asked: equal on all ranks. Those with few judged products
    come first, so that few lists are longer than they must be.
    """
    judged = known.counts(asked)
    order = np.argsort(judged, kind="stable")
    depth = np.minimum(rules.last + judged[order], len(tie))
    start = 0
    while start < len(order):
        places = np.arange(1, len(order) - start + 1) * depth[start:]  # that so many queries take
        end = start + max(1, int(np.searchsorted(places, PLACES, side="right")))
        own = torch.from_numpy(np.isin(queries.ids.cpu().numpy(), asked[order[start:end]]))
        rows = Rows(queries.vectors[own.to(queries.vectors.device)], queries.ids[own.to(queries.ids.device)])
        yield rank_own(rows, corpus, tie, int(depth[end - 1]), chunk=chunk)
        start = end


def iteration_of(trained_with: dict[str, str], tables: dict[str, dict[str, Any]]) -> int:
    """The highest iteration of mining among the tables that a run was trained with; 0: none.

    They are found by their content; of one that is not listed, the name mined-<iteration> tells.
    """
    made_by = {table["sha256"]: table["made_by"] for table in tables.values()}
    found = [int(made_by.get(sha256, {}).get("iteration", 0)) for sha256 in trained_with.values()]
    named = [re.fullmatch(r"mined-(\d+)", name) for name in not_listed(trained_with, tables)]
    return max([0, *found, *(int(match[1]) for match in named if match)])


def not_listed(trained_with: dict[str, str], tables: dict[str, dict[str, Any]]) -> list[str]:
    """The names of tables that a run was trained with and whose content none of `tables` has."""
    listed = {table["sha256"] for table in tables.values()}
    return [name for name, sha256 in trained_with.items() if sha256 not in listed]


def mine_run(
    run: Path,
    data: str | None,
    rules: Rules,
    name: str | None,
    view: str | None,
    rest: list[str],
    replace: bool = False,
) -> None:
    """Mines with the best checkpoint of `run`, on its own data or on `data`, the same catalogue elsewhere.

    Raises ValueError or FileNotFoundError for what a user got wrong; then nothing is written.
    """
    config, checkpoint = config_of(run), best_of(run)
    contract = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["contract"]
    tables = {key.removeprefix(TABLES): sha256 for key, sha256 in contract.items() if key.startswith(TABLES)}
    own = ["--data.init_args.test_splits=[train]"] + ([f"--data.init_args.path={data}"] if data else [])
    cli = FusionCLI.parse([f"--config={config}", *own, *rest], None, MiningModule)
    model: MiningModule = cli.model
    model.order = Order(contract["manifest"], tables, rules, name, view, replace)
    cli.trainer.test(model, cli.datamodule, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
    if not cli.trainer.is_global_zero:
        return
    found = model.found
    made_by = _made_by(run, checkpoint, model, cli.config.seed_everything, rest)
    rows = found.query, found.product, found.score
    table = cli.datamodule.add_pair_table(model.name, "negatives", *rows, made_by, replace)
    print(found.told(model.without_positive))
    print(f"negatives: {table}")
    print(f"train with them: {next_command(run, data, model.name)}")


def _made_by(run: Path, checkpoint: Path, model: MiningModule, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    rules = model.order.rules
    return {
        "mined_from": str(run.resolve()),
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": _sha256(checkpoint),
        "commit": commit(),
        "view": model.ranked_by,
        "k": rules.k,
        "ranks": [rules.first, rules.last],
        "margin": rules.margin,
        "manifest": model.order.trained_on,
        "seed": seed,
        "overrides": [shown(option) for option in overrides],
        "trained_with": model.order.trained_with,
        "iteration": model.iteration,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def next_command(run: Path, data: str | None, name: str) -> str:
    """What a user types to train as `run` was trained, with the table `name` of negatives."""
    config = yaml.safe_load(config_of(run).read_text(encoding="utf-8"))["data"]["init_args"]
    options = [f"--data.hard_negatives={config.get('hard_negatives') or 1}", f"--data.hard_from=[{name}]"]
    options += ["--data.hard_max_gain=0.0"] if config.get("hard_max_gain") else []  # it is about judged ones
    record = run / "environment.json"
    command = json.loads(record.read_text(encoding="utf-8"))["command"] if record.is_file() else []
    if command[1:2] != ["train"]:
        moved = [f"--data.path={data}"] if data else []
        return shlex.join([".venv/bin/mmfusion", "fit", f"--config={config_of(run)}", *moved, *options])
    parser = ArgumentParser(allow_abbrev=False)
    for option in ("exp", "encoders", "data", "resume", *(f"data.{name}" for name in ("path", *HARD))):
        parser.add_argument(f"--{option}")
    known, others = parser.parse_known_args(command[2:])
    given = vars(known)
    chosen = {"EXP": given["exp"], "ENCODERS": given["encoders"], "DATA": data or given["data.path"] or given["data"]}
    words = [_variable(variable, value) for variable, value in chosen.items() if value]
    return " ".join(["make train", *words, _arguments([*others, *options])])


def _variable(name: str, value: str) -> str:
    """A word of a make command; the Makefile puts the value between single quotes."""
    value = value.replace("'", "'\\''").replace("$", "$$")
    return shlex.quote(f"{name}={value}")


def _arguments(options: Sequence[str]) -> str:
    """ARGS of a make command; the Makefile leaves it to the shell as it is."""
    plain = " ".join(option if set(option) <= SAFE else shlex.quote(option) for option in options).replace("$", "$$")
    return f'ARGS="{plain}"' if not set(plain) & set('"$`\\!') else shlex.quote(f"ARGS={plain}")

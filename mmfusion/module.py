"""The LightningModule: wires encoders, towers, losses, stages and evaluation together, and logs."""

import copy
import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from mmfusion import optim as optimisation
from mmfusion.batch import ProductBatch, QueryBatch, RetrievalData, TupleBatch
from mmfusion.encoders import Encoded, ImageEncoder, ScratchTextEncoder, TextEncoder
from mmfusion.encoders.augment import uniforms
from mmfusion.features import Features, in_parts
from mmfusion.fusion import FusionHead, Gated
from mmfusion.losses import InfoNCE, Loss, Pairs, identity_pairs, match_pairs
from mmfusion.optim import Optim
from mmfusion.reach import TERM_VIEWS, reached, sides
from mmfusion.retrieval.evaluation import VALIDATION, Evaluation, ViewResult, add_baselines, measured
from mmfusion.retrieval.examples import main_metric
from mmfusion.retrieval.ranking import Collector, rank_corpus
from mmfusion.retrieval.slices import find_columns
from mmfusion.retrieval.topk import tie_ranks
from mmfusion.stages import Group, Stage, StagedModule, StagePlan
from mmfusion.towers import MODALITIES, ProductTower, QueryTower, View

Modality = Literal["text", "image"]
# Parts that a model may lack: rules of the learning-rate table may name them all the same.
SWITCHABLE = [
    *(f"product.{name}.{part}." for name in MODALITIES for part in ("encoder", "projection", "token_projection")),
    "product.fusion.",
]


@dataclass
class Losses:
    """The loss of each term; InfoNCE with its defaults where none is given. Stages hold their weights.

    Args:
        query_product: of the query with the fused product
        query_text: of the query with the product's text
        query_image: of the query with the product's photo
        text_image: of the product's text with its own photo
    """

    query_product: Loss | None = None
    query_text: Loss | None = None
    query_image: Loss | None = None
    text_image: Loss | None = None

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({f.name: getattr(self, f.name) or InfoNCE() for f in fields(self)})


class RetrievalModule(StagedModule):
    """A query tower and a product tower, trained in stages and evaluated over the whole corpus.

    Args:
        text: encoder of product text
        image: encoder of product photos
        stages: the run's stages, in order
        groups: parameters and their learning rates, by regular expressions over parameter names; first match wins
        query: encoder of queries: `shared` with the product's text, a `copy` of it that trains apart, or another
        fusion: fusion head, by class name
        dim: size of the shared embedding space
        modalities: what a product is made of; with one alone there is no fusion and that view is the primary one
        projection_hidden: projections with a hidden layer instead of linear ones
        losses: the loss of each term
        modality_dropout: probability that the fused term sees a product without its text or without its photo
        optim: AdamW's options
        memo_gib: GiB that the kept outputs of each frozen encoder may take
        evaluation: how rankings are measured and explained
        compile: backend of torch.compile for the encoders' networks and the fusion head, such as inductor; none without
        zero_shot: evaluate before training too; needs linear projections between equal sizes
        seed: seed of dropout; the command line sets it to seed_everything
    """

    def __init__(
        self,
        text: TextEncoder,
        image: ImageEncoder,
        stages: dict[str, Stage],
        groups: dict[str, Group],
        query: Literal["shared", "copy"] | TextEncoder = "shared",
        fusion: Callable[[int], FusionHead] = Gated,
        dim: int = 256,
        modalities: list[Modality] = ["text", "image"],  # noqa: B006
        projection_hidden: bool = False,
        losses: Losses = Losses(),  # noqa: B008
        modality_dropout: float = 0.0,
        optim: Optim = Optim(),  # noqa: B008
        memo_gib: float = 4.0,
        evaluation: Evaluation = Evaluation(),  # noqa: B008
        compile: str | None = None,
        zero_shot: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not modalities or set(modalities) - set(MODALITIES) or len(set(modalities)) < len(modalities):
            raise ValueError(f"model.modalities takes text, image or both, each once; received {modalities}")
        if not 0 <= modality_dropout < 1:
            raise ValueError(f"model.modality_dropout is a probability below 1; received {modality_dropout}")
        query_encoder = query if isinstance(query, TextEncoder) else text if query == "shared" else copy.deepcopy(text)
        self.query = QueryTower(query_encoder, dim, projection_hidden)
        self.product = ProductTower(
            View(text, dim, projection_hidden) if "text" in modalities else None,
            View(image, dim, projection_hidden) if "image" in modalities else None,
            fusion(dim) if len(modalities) == 2 else None,
        )
        self.losses = losses.modules()
        self.stages, self.groups, self.optim, self.seed = stages, groups, optim, seed
        self.modality_dropout, self.evaluation = modality_dropout, evaluation
        self.compile_parts, self.zero_shot = compile, zero_shot
        self._check_terms()
        if zero_shot:
            self._check_zero_shot()
        self.assigned = optimisation.assign(self, groups, stages, SWITCHABLE)
        self.features = Features(self.query, self.product, memo_gib)
        self.contract: dict[str, Any] = {}
        self.collected: dict[str, dict[str, Collector]] = {}
        self.results: dict[str, dict[str, ViewResult]] = {}
        self.hybrid_weight: float | None = None
        self._failed: dict[str, set[str]] = {}  # per stage, reasons for which products failed

    # ---- construction ------------------------------------------------------------------------------------------------

    def _check_terms(self) -> None:
        for name, stage in self.stages.items():
            for term in stage.losses.active():
                missing = sides({term}) - {"query", *self.product.views}
                if missing:
                    raise ValueError(
                        f"model.stages.{name}.losses.{term} needs the view {missing.pop()!r}, which this model lacks "
                        f"(model.modalities gives the views {', '.join(self.product.views)})"
                    )
            if not stage.losses.active():
                raise ValueError(f"model.stages.{name}.losses: every weight is 0; give one of {', '.join(TERM_VIEWS)}")

    def _check_zero_shot(self) -> None:
        if isinstance(self.query.encoder, ScratchTextEncoder):
            raise ValueError(
                "model.zero_shot needs pretrained encoders; ScratchTextEncoder knows nothing before training"
            )
        for part in (self.query, self.product.text, self.product.image):
            weight = None if part is None else getattr(part.projection.network, "weight", None)
            if part is not None and (weight is None or weight.shape[0] != weight.shape[1]):
                raise ValueError(
                    "model.zero_shot needs linear projections between equal sizes: set model.dim to the encoders' size "
                    f"({part.encoder.dim}) and model.projection_hidden to false"
                )

    def setup(self, stage: str) -> None:
        find_columns(self.data, self.evaluation.slices)  # a wrong name is told before training, not after
        views = filter(None, (self.query, self.product.text, self.product.image))
        encoders = list(dict.fromkeys(cast(TextEncoder | ImageEncoder, view.encoder) for view in views))
        for encoder in encoders:
            if stage == "fit" and isinstance(encoder, TextEncoder):
                encoder.fit(self.data.texts())
        if self.compile_parts is not None:
            backend, self.compile_parts = self.compile_parts, None  # once: fit and test both set up
            for encoder in encoders:
                encoder.compile_network(backend=backend)
            if self.product.fusion is not None:
                self.product.fusion.compile(backend=backend)

    @property
    def data(self) -> RetrievalData:
        return cast(RetrievalData, self.trainer.datamodule)  # type: ignore[attr-defined]

    @property
    def primary(self) -> str:
        """The view that decides: `fused`, or the only one there is."""
        return self.product.views[-1]

    # ---- training ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: TupleBatch, batch_idx: int) -> None:
        # Lightning saves no random state: dropout must be a function of (seed, step, rank) for a resumed run to agree.
        torch.manual_seed(hash((self.seed, self.current_epoch, batch_idx, self.global_rank)) & 0x7FFF_FFFF_FFFF_FFFF)

    def training_step(self, batch: TupleBatch, batch_idx: int) -> Float[Tensor, ""]:
        weights = self.stages[self.stage_name].losses.active()
        terms = self.terms(batch, set(weights))
        total = torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
        if not torch.isfinite(total):
            values = {name: term.item() for name, term in terms.items()}
            raise RuntimeError(f"the loss is not finite at step {self.global_step}, stage {self.stage_name}: {values}")
        self._log_step(total, terms, len(batch))
        return total

    def on_train_epoch_end(self) -> None:
        self._log_failures("fit", "data")

    def terms(self, batch: TupleBatch, names: set[str]) -> dict[str, Float[Tensor, ""]]:
        """The loss terms `names` on one rank's share of the batch; DDP's mean over ranks is the whole batch's loss."""
        needed = sides(names)
        vectors = self.views(batch.product, needed - {"query"})
        if "query" in needed:
            vectors["query"] = self.features.queries(batch.query)
        everything = torch.ones_like(batch.product.present[:, 0])
        valid = dict(zip(MODALITIES, batch.product.present.unbind(1), strict=True))
        pairs: dict[str, Pairs] = {}
        terms = {}
        for name in sorted(names):
            left, right = TERM_VIEWS[name]
            loss = cast(Loss, self.losses[name])
            key = "identity" if name == "text_image" else loss.label
            pairs[key] = pairs.get(key) or self._pairs(batch, key)
            sides_valid = valid.get(left, everything), valid.get(right, everything)
            terms[name] = loss(vectors[left], vectors[right], pairs[key], *sides_valid)
        return terms

    def views(self, batch: ProductBatch, names: set[str]) -> dict[str, Float[Tensor, "product dim"]]:
        """The product views `names` as unit vectors; in training the fused view may miss a modality (dropout)."""
        encoded = self.features.products(batch, set(MODALITIES) if "fused" in names else names)
        if not self.training:
            return self._evaluated_views(encoded, batch.present, names)
        projected, visible = self.product.project(encoded), self._visible(batch)
        if "fused" in names and self._logs_now():
            self._log_gates(projected, visible)
        return self.product.vectors(projected, names, batch.present, visible)

    def _evaluated_views(
        self, encoded: dict[str, Encoded], present: Bool[Tensor, "product 2"], names: set[str]
    ) -> dict[str, Float[Tensor, "product dim"]]:
        parts = [
            {
                view: rows[:count]
                for view, rows in self.product.vectors(self.product.project(part), names, present[index]).items()
            }
            for part, index, count in in_parts(encoded, len(present))
        ]
        return {view: torch.cat([part[view] for part in parts]) for view in parts[0]}

    def _visible(self, batch: ProductBatch) -> Bool[Tensor, "product 2"]:
        """What is there, less what modality dropout hides: of two modalities one, never the only one."""
        if self.modality_dropout == 0:
            return batch.present
        chance = uniforms(batch.draw, 2, salt=2)
        hides = (chance[:, 0] < self.modality_dropout) & batch.present.all(1)
        hidden = nn.functional.one_hot((chance[:, 1] < 0.5).long(), 2).bool()
        return batch.present & ~(hides[:, None] & hidden)

    def _pairs(self, batch: TupleBatch, key: str) -> Pairs:
        if key == "identity":
            return identity_pairs(batch.product.id)
        if key not in batch.judged:
            near = difflib.get_close_matches(key, batch.judged, 1)
            raise ValueError(
                f"a loss has label {key!r}, but the shards' label columns are {', '.join(batch.judged)}"
                + (f". Did you mean {near[0]}?" if near else "")
            )
        return match_pairs(batch.query.id, batch.judged[key])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        total = self.trainer.estimated_stepping_batches
        if total in (-1, float("inf")):
            raise ValueError("stages need a run of known length: set trainer.max_epochs or trainer.max_steps")
        self.trainer.fit_loop.setup_data()  # with max_steps, Lightning has not counted the epoch's batches yet
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        self.stage_plan = StagePlan.lay(self.stages, int(total), steps_per_epoch)
        optimizer, schedule = optimisation.build(
            self, self.assigned, self.groups, self.stages, self.stage_plan, self.optim
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- stages ------------------------------------------------------------------------------------------------------

    def trainable(self, index: int, batch: TupleBatch) -> tuple[list[str], list[str]]:
        """Parameters that their rates let train: those that the stage's losses reach, and the others."""
        stage = self.stages[self.stage_plan.names[index]]
        rated = [n for n, group in self.assigned.items() if optimisation.rate_of(self.groups, stage, group) != "frozen"]
        terms = set(stage.losses.active())
        within_reach = reached(self, self.query, self.product, self.losses, terms, batch)
        return [n for n in rated if n in within_reach], [n for n in rated if n not in within_reach]

    def on_stage(self, index: int) -> None:
        super().on_stage(index)
        self.features.sync()

    # ---- resuming ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["contract"] = self._contract()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where training would go on as another run: other model, stages, batch, seed or data."""
        if self._trainer is None or self._trainer.state.fn != "fit":
            return
        ours, theirs = self._contract(), checkpoint.get("contract", {})
        differs = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        if differs:
            lines = [f"  {key}: the checkpoint has {theirs.get(key)}, this run {ours.get(key)}" for key in differs[:8]]
            more = [f"  and {len(differs) - 8} more"] if len(differs) > 8 else []
            raise ValueError(
                "the checkpoint cannot be resumed as another run; make these equal or start afresh:\n"
                + "\n".join(lines + more)
            )

    def _contract(self) -> dict[str, Any]:
        return self.contract | {"manifest": self.data.manifest_hash}

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.features.sync()
        self.collected = {name: {} for name in self.data.val_loaders}

    def on_test_epoch_start(self) -> None:
        self.features.sync()
        self.collected = {name: {} for name in self.data.test_loaders}

    def validation_step(self, batch: QueryBatch | ProductBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._collect(batch, dataloader_idx)

    def test_step(self, batch: QueryBatch | ProductBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._collect(batch, dataloader_idx)

    def _collect(self, batch: QueryBatch | ProductBatch, loader: int) -> None:
        collectors = list(self.collected.values())[loader]
        if isinstance(batch, QueryBatch):
            vectors = {"query": self.features.queries(batch)}
        else:
            vectors = self.views(batch, set(self.product.views))
        folder = self.evaluation.vectors if isinstance(batch, ProductBatch) else None
        for view, rows in vectors.items():
            if view not in collectors:
                collectors[view] = Collector(Path(folder) if folder else None)
            collectors[view].add(rows, batch.id, batch.valid)

    def on_validation_epoch_end(self) -> None:
        self._log_failures("val", "val")
        # validation decides which checkpoint is best: means do, and their intervals would be thrown away
        metrics = [name for name in VALIDATION if int(name.partition("@")[2] or 0) <= self.evaluation.depth]
        self._evaluate(dataclasses.replace(self.evaluation, metrics=metrics), intervals=False)
        corpus = "" if self.data.val_corpus == "all" else f" in {self.data.val_corpus}"
        for split, views in self.results.items():
            for view, result in views.items():
                values = {f"{split}/{view}/{name}{corpus}": cell["value"] for name, cell in result.metrics.items()}
                self.log_dict(values)
            primary = views[self.primary].metrics
            self.log(f"{split}/primary", primary[main_metric(primary)]["value"])

    def on_test_epoch_end(self) -> None:
        self._log_failures("test", "test")
        tie = self._evaluate(self.evaluation)
        if self.evaluation.baselines and self.results:
            self.hybrid_weight = add_baselines(
                self.results, self.primary, self.data, tie, self.evaluation, self.hybrid_weight
            )

    def _evaluate(self, options: Evaluation, intervals: bool = True) -> Int[Tensor, "catalogue"]:
        """Fills `results[split][view]`, equal on every rank; returns the order of ties."""
        corpus = {view: collector.rows() for view, collector in self.collected.pop("corpus").items()}
        queries = {name.removeprefix("queries/"): c["query"].rows() for name, c in self.collected.items()}
        tie = tie_ranks(self.data.product_ids())
        self.results = {}
        for split, rows in queries.items():
            judgments = self.data.judgments(split)
            self.results[split] = {
                view: measured(
                    rank_corpus(rows, corpus[view], tie, options.depth, chunk=options.chunk),
                    judgments,
                    options,
                    intervals,
                )
                for view in self.product.views
            }
        self.collected = {}
        self.features.release()
        return tie

    # ---- logging -----------------------------------------------------------------------------------------------------

    def _logs_now(self) -> bool:
        """Whether Lightning writes this training step; a value logged in between would be written late, or never."""
        return self.training and self._trainer is not None and self.trainer._logger_connector.should_update_logs

    def _log_step(self, total: Tensor, terms: dict[str, Tensor], size: int) -> None:
        if not self._logs_now():
            return
        values = {"train/loss": total, "stage": torch.tensor(float(self.stage), device=total.device)}
        for name, term in terms.items():
            values[f"train/{name}"] = term
            if isinstance(scale := getattr(self.losses[name], "scale", None), Tensor):
                values[f"train/scale/{name}"] = scale
        self.log_dict(values, batch_size=size, sync_dist=True)
        groups = cast(torch.optim.Optimizer, self.optimizers()).param_groups
        rates = {f"lr/{group['name'].removesuffix('/no_decay')}": group["lr"] for group in groups}
        self.log_dict(rates, batch_size=size, sync_dist=False)

    def _log_failures(self, stage: Literal["fit", "val", "test"], prefix: str) -> None:
        """What failed in the stage's pass, on all ranks at once: of each reason from its first time on, also 0 then."""
        counts, seen = self.data.failures(stage), self._failed.setdefault(stage, set())
        seen |= {reason for reason, count in counts.items() if count}
        failed = {reason.replace(" ", "_"): float(count) for reason, count in counts.items() if reason in seen}
        # the same on all ranks already
        self.log_dict({f"{prefix}/failed/{reason}": count for reason, count in failed.items()}, sync_dist=False)

    def _log_gates(self, projected: dict[str, Any], present: Bool[Tensor, "product 2"]) -> None:
        """Mean and spread of the head's gates or expert weights over the batch."""
        assert self.product.fusion is not None
        with torch.no_grad():
            gates = self.product.fusion.gates(projected["text"], projected["image"], present)
        for name, weights in gates.items():
            spread = {
                f"gates/{name}/mean": weights.float().mean(),
                f"gates/{name}/std": weights.float().std(correction=0),
            }
            self.log_dict(spread, batch_size=len(weights), sync_dist=True)

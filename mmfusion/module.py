"""The LightningModule: wires encoders, towers, losses, stages and evaluation together, and logs."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from lightning import Callback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from mmfusion import optim as optimisation
from mmfusion.batch import ProductBatch, QueryBatch, RetrievalData, TupleBatch
from mmfusion.branch import COURSE, Branch, course, stage_courses
from mmfusion.contract import refuse_another_run
from mmfusion.ema import WeightAverage
from mmfusion.encoders import ImageEncoder, ScratchTextEncoder, TextEncoder
from mmfusion.feature_cache import CacheOptions
from mmfusion.feature_cache.cache import NAMES, FeatureCache
from mmfusion.feature_cache.uses import Use, sides_used, without_content
from mmfusion.features import Features, after_dropout
from mmfusion.fusion import FusionHead, Gated
from mmfusion.layers import below_top
from mmfusion.optim import Optim
from mmfusion.reach import reached
from mmfusion.retrieval.collected import (
    QUERY,
    Collected,
    collect,
    measured_views,
    photos_dropped,
    vectors_of,
    with_dims,
)
from mmfusion.retrieval.evaluation import VALIDATION, Evaluation, ViewResult, add_baselines
from mmfusion.retrieval.examination import Examination
from mmfusion.retrieval.examples import main_metric
from mmfusion.retrieval.gates import Weights
from mmfusion.retrieval.score_fusion import add_score_fusion
from mmfusion.retrieval.slices import find_columns, stated_columns
from mmfusion.retrieval.topk import tie_ranks
from mmfusion.stages import Group, Stage, StagedModule, StagePlan
from mmfusion.term_checks import check_data, check_terms
from mmfusion.terms import Losses, loss_terms, sides, stop_unless_finite, trained_dims
from mmfusion.towers import MODALITIES, ProductTower, QueryTower, View

Modality = Literal["text", "image"]
# Parts that a model may lack: rules of the learning-rate table may name them all the same.
SWITCHABLE = [
    *(f"product.{name}.{part}." for name in MODALITIES for part in ("encoder", "projection", "token_projection")),
    "product.fusion.",
]


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
        ema: decay of an exponential moving average of the weights, which validations and checkpoints then have in their
            place; None: the weights themselves
        memo_gib: GiB that the kept outputs of each frozen encoder may take in memory, of those that are not on disk
        cache: outputs of frozen encoders on disk
        micro_batch: rows (queries, or products) that go through the towers at a time in training, with the activation
            memory of so many and a second forward pass; the losses see the whole batch, BatchNorm only so many rows.
            None: all at once
        evaluation: how rankings are measured and explained
        compile: backend of torch.compile for the encoders' networks and the fusion head, such as inductor; none without
        zero_shot: evaluate before training too; needs linear projections between equal sizes
        seed: seed of dropout; the command line sets it to seed_everything
    """

    examines = True  # a test asks for more than rankings: see Examination

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
        ema: float | None = None,
        memo_gib: float = 4.0,
        cache: CacheOptions = CacheOptions(),  # noqa: B008
        micro_batch: int | None = None,
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
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"model.micro_batch is {micro_batch}; expected at least 1 row, or null")
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
        check_terms(stages, self.losses, self.product.views, dim)
        self.searched = with_dims(self.product.views, trained_dims(stages, self.losses, dim))
        if zero_shot:
            self._check_zero_shot()
        self.assigned = optimisation.assign(self, groups, stages, SWITCHABLE)
        self.features = Features(self.query, self.product, memo_gib, micro_batch)
        self.feature_cache = FeatureCache(self.features, cache, compile)
        self.below_top = self._below_top() if optim.layer_decay < 1 else {}
        self.average = None if ema is None else WeightAverage(ema)
        self.contract: dict[str, Any] = {}
        self.collected: Collected = {}
        self.results: dict[str, dict[str, ViewResult]] = {}
        self.hybrid_weight: float | None = None
        self.score_fusion_weight: float | None = None
        self.examination: Examination | None = None
        self.dropped: dict[str, dict[str, ViewResult]] = {}  # by split and by how many photos: the view fused
        self.gate_weights: Weights = {}
        self.branched_from: str | None = None  # the checkpoint of another run that this one began from
        self._failed: dict[str, set[str]] = {}  # per stage, reasons for which products failed

    # ---- construction ------------------------------------------------------------------------------------------------

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
        # a wrong name is told before training, not after
        find_columns(self.data, self.evaluation.slices)
        stated_columns(self.data, self.evaluation.stated)
        if stage == "fit":
            check_data(self.stages, self.losses, self.data)
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
        stop_unless_finite(total, terms, f"step {self.global_step}, stage {self.stage_name}")
        self._log_step(total, terms, batch)
        return total

    def on_train_epoch_end(self) -> None:
        self._log_failures("fit", "data")

    def terms(self, batch: TupleBatch, names: set[str]) -> dict[str, Float[Tensor, ""]]:
        """The loss terms `names` on one rank's share of the batch; DDP's mean over ranks is the whole batch's loss."""
        needed = sides(names)
        vectors = self.views(batch.product, needed - {"query"})
        if "query" in needed:
            vectors["query"] = self.features.queries(batch.query)
        return loss_terms(self.losses, names, vectors, batch)

    def views(self, batch: ProductBatch, names: set[str]) -> dict[str, Float[Tensor, "product dim"]]:
        """The product views `names` as unit vectors; in training the fused view may miss a modality (dropout)."""
        if not self.training:
            return self.features.evaluated(batch, names)
        visible = after_dropout(batch, self.modality_dropout)
        views, gates = self.features.products(batch, names, visible, with_gates=self._logs_now())
        self._log_gates(gates)
        return views

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        total = self.trainer.estimated_stepping_batches
        if total in (-1, float("inf")):
            raise ValueError("stages need a run of known length: set trainer.max_epochs or trainer.max_steps")
        self.trainer.fit_loop.setup_data()  # with max_steps, Lightning has not counted the epoch's batches yet
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        self.stage_plan = StagePlan.lay(self.stages, int(total), steps_per_epoch)
        optimizer, schedule = optimisation.build(
            self, self.assigned, self.groups, self.stages, self.stage_plan, self.optim, self.below_top
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_callbacks(self) -> list[Callback]:
        """Once per trainer: a fit and the test after it share it."""
        there = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if self.average is None or self.average in there else [self.average]

    def _below_top(self) -> dict[str, int]:
        """How many layers are above a parameter's own, in the encoders that some stage trains."""
        trained = {encoder for use in self._uses() for encoder in use.trains}
        encoders = {side: encoder for side, encoder in self.features.encoders.items() if encoder in trained}
        found = {side: below_top(encoder) for side, encoder in encoders.items()}
        return {f"{NAMES[side]}.{name}": below for side, names in found.items() for name, below in names.items()}

    # ---- stages ------------------------------------------------------------------------------------------------------

    def trainable(self, index: int, batch: TupleBatch) -> tuple[list[str], list[str]]:
        """Parameters that their rates let train: those that the stage's losses reach, and the others."""
        stage = self.stages[self.stage_plan.names[index]]
        rated = [n for n, group in self.assigned.items() if optimisation.rate_of(self.groups, stage, group) != "frozen"]
        terms = set(stage.losses.active())
        batch = self._with_content(batch)
        within_reach = reached(self, self.query, self.product, self.losses, terms, batch)
        return [n for n in rated if n in within_reach], [n for n in rated if n not in within_reach]

    def on_stage(self, index: int) -> None:
        super().on_stage(index)
        uses = self._uses()
        self.feature_cache.enter(uses[index], self.trainer, self.data)
        stored, encoders = set(self.features.stored), self.features.encoders
        until = without_content(uses, index, self.stage_plan.ends, encoders, stored)
        known = self.feature_cache.known(self.data) if until > self.trainer.global_step else None
        self.data.leave_out(known, until)

    # ---- feature cache -----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Raises ValueError, before the first step, where the run's features take more than their limit."""
        self.data.leave_out(None, 0)
        self.feature_cache.announce(self._uses(), self.trainer, self.data)

    def on_validation_start(self) -> None:
        whole = self.feature_cache.look(self.trainer, self.data)
        self.data.leave_out_of_evaluation(self.feature_cache.known(self.data) if whole else None)

    on_test_start = on_validation_start

    def _with_content(self, batch: TupleBatch) -> TupleBatch:
        """The batch, or its first two tuples where it has none."""
        if batch.product.shown:
            return batch
        product = self.data.products(batch.product.id[:2].cpu().numpy()).to(batch.product.id.device)
        query = QueryBatch(batch.query.text[:2], batch.query.id[:2], batch.query.valid[:2])
        return dataclasses.replace(batch, query=query, product=product, hard=batch.hard[:0])

    def _uses(self) -> list[Use]:
        """Of each stage, in order, as its losses and rates have it. An encoder without weights is never frozen."""
        names = {parameter: name for name, parameter in self.named_parameters()}

        def trains(encoder: nn.Module, stage: Stage) -> bool:
            groups = {self.assigned[names[parameter]] for parameter in encoder.parameters()}
            return not groups or any(optimisation.rate_of(self.groups, stage, group) != "frozen" for group in groups)

        uses = []
        for name, stage in self.stages.items():
            used = sides_used(sides(set(stage.losses.active())))
            encoders = {self.features.encoders[side] for side in used}
            uses.append(Use(name, used, {encoder for encoder in encoders if trains(encoder, stage)}))
        return uses

    # ---- resuming ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["contract"], checkpoint["branched_from"] = self._contract(), self.branched_from
        stages = stage_courses(self.stages, self.groups, self.assigned)
        checkpoint[COURSE] = course(self.stage_plan, stages, self, self.trainer.optimizers[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where training would go on as another run: other model, stages, batch, seed or data.

        Of a run that branches off, what comes later may be another.
        """
        self.branched_from = checkpoint.get("branched_from")
        if self._trainer is None or self._trainer.state.fn != "fit":
            return
        callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        branch = next((part for part in callbacks if isinstance(part, Branch)), None)
        if branch is None:
            refuse_another_run(self._contract(), checkpoint.get("contract", {}))
            return
        stages = stage_courses(self.stages, self.groups, self.assigned)
        branch.take(checkpoint, self, self._contract(), stages, self.assigned)
        self.branched_from = branch.path

    def _contract(self) -> dict[str, Any]:
        tables = {f"data.pairs.{name}": sha256 for name, sha256 in self.data.pair_tables_in_use().items()}
        return self.contract | {"manifest": self.data.manifest_hash} | tables

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.collected, self.examination = {name: {} for name in self.data.val_loaders}, None

    def on_test_epoch_start(self) -> None:
        self.collected = {name: {} for name in self.data.test_loaders}
        examines = self.examines and "fused" in self.product.views
        self.examination = Examination(self.data.product_ids(), self.evaluation.drop_photos) if examines else None

    def validation_step(self, batch: QueryBatch | ProductBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._collect(batch, dataloader_idx)

    def test_step(self, batch: QueryBatch | ProductBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._collect(batch, dataloader_idx)

    def _collect(self, batch: QueryBatch | ProductBatch, loader: int) -> None:
        if isinstance(batch, QueryBatch):
            vectors = {QUERY: self.features.queries(batch)}
        elif self.examination is None:
            vectors = self.views(batch, set(self.product.views))
        else:
            visible = self.examination.visible(batch)
            vectors, weights = self.features.examined(batch, set(self.product.views), visible)
            self.examination.add(weights, batch)
        collectors = list(self.collected.values())[loader]
        collect(collectors, vectors, batch.id, batch.valid, self.evaluation.vectors)

    def on_validation_epoch_end(self) -> None:
        self._log_failures("val", "val")
        # validation decides which checkpoint is best: means do, and their intervals would be thrown away
        metrics = [name for name in VALIDATION if int(name.partition("@")[2] or 0) <= self.evaluation.depth]
        self._evaluate(dataclasses.replace(self.evaluation, metrics=metrics, baselines=False), intervals=False)
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
        """Fills `results[split][view]` and `dropped`, equal on every rank; returns the order of ties."""
        tie = tie_ranks(self.data.product_ids())
        vectors, examined = vectors_of(self.collected), self.examination
        self.results = measured_views(vectors, self.searched, self.data, tie, options, intervals)
        self.dropped = photos_dropped(vectors, examined, self.data, tie, options) if examined else {}
        self.gate_weights = examined.weights() if examined else {}
        if options.baselines and self.results:
            judged = {split: self.data.judgments(split) for split in self.results}
            self.score_fusion_weight = add_score_fusion(
                self.results, vectors.corpus, vectors.queries, judged, tie, options, self.score_fusion_weight
            )
        self.features.release()
        return tie

    # ---- logging -----------------------------------------------------------------------------------------------------

    def _logs_now(self) -> bool:
        """Whether Lightning writes this training step; a value logged in between would be written late, or never."""
        return self.training and self._trainer is not None and self.trainer._logger_connector.should_update_logs

    def _log_step(self, total: Tensor, terms: dict[str, Tensor], batch: TupleBatch) -> None:
        if not self._logs_now():
            return
        values = {"train/loss": total, "stage": torch.tensor(float(self.stage), device=total.device)}
        for name, term in terms.items():
            values[f"train/{name}"] = term
            if isinstance(scale := getattr(self.losses[name], "scale", None), Tensor):
                values[f"train/scale/{name}"] = scale
        for source, name in enumerate(self.data.hard_sources):
            values[f"data/hard/{name}"] = (batch.hard == source).float().mean()
        self.log_dict(values, batch_size=len(batch), sync_dist=True)
        groups = cast(torch.optim.Optimizer, self.optimizers()).param_groups
        rates = {f"lr/{group['name'].removesuffix('/no_decay')}": group["lr"] for group in groups}
        self.log_dict(rates, batch_size=len(batch), sync_dist=False)

    def _log_failures(self, stage: Literal["fit", "val", "test"], prefix: str) -> None:
        """What failed in the stage's pass, on all ranks at once: of each reason from its first time on, also 0 then."""
        counts, seen = self.data.failures(stage), self._failed.setdefault(stage, set())
        seen |= {reason for reason, count in counts.items() if count}
        failed = {reason.replace(" ", "_"): float(count) for reason, count in counts.items() if reason in seen}
        # the same on all ranks already
        self.log_dict({f"{prefix}/failed/{reason}": count for reason, count in failed.items()}, sync_dist=False)

    def _log_gates(self, gates: dict[str, Float[Tensor, "product"]]) -> None:
        """Mean and spread of the head's gates or expert weights over the batch."""
        for name, weights in gates.items():
            spread = {
                f"gates/{name}/mean": weights.float().mean(),
                f"gates/{name}/std": weights.float().std(correction=0),
            }
            self.log_dict(spread, batch_size=len(weights), sync_dist=True)

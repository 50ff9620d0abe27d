"""Pipeline parallelism: one step of a cut model by a schedule of torch.distributed.pipelining.

Between stages go the hidden states [B, S, D] and, for models with a load-balancing loss, its sums [2 E + 1] over the
layers so far (routes an expert, probability an expert, rows). The last stage makes the loss of them, and autograd takes
its gradient back along the stages: the loss is that of all layers of a micro-batch, over all data ranks.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeweave.parallel import aux_loss as aux_losses
from moeweave.parallel import loss as losses
from moeweave.parallel.data import keep_gathered, reduce_gradients
from moeweave.parallel.record import Record
from moeweave.parallel.schedules import Layout, make_schedule, weight_gradients
from moeweave.parallel.stage_ties import TiedGradients
from moeweave.parallel.stages import Cut
from moeweave.parallel.vocabulary import split_logits

Step = dict[str, Any]


class StagePart(nn.Module):
    """What torch's runtime calls as one stage; holds that stage's modules."""

    def __init__(self, pipeline: Pipeline, stage: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(pipeline.cut.parts[stage])
        self.stage = stage
        self.run = pipeline.run_stage

    def forward(self, *args: Tensor, index: Tensor) -> Any:
        return self.run(self.stage, int(index), args)


class Pipeline:
    """A cut model's stages and how they run.

    Attributes:
        cut, layout: which stages this rank has.
        num_experts: E of the model, for the sums of the balance loss.
    """

    def __init__(self, model: nn.Module, cut: Cut, layout: Layout, record: Record, num_experts: int) -> None:
        self.model, self.cut, self.layout, self.record = model, cut, layout, record
        self.num_experts = num_experts
        self.parts: list[dict[str, Any]] = []
        self.share = 1.0
        self.aux_on = False
        self.generating = False
        self.width = _width(model)
        self.takes_router_logits = "output_router_logits" in inspect.signature(model.forward).parameters
        self.steps: dict[tuple[Any, ...], Any] = {}
        for block in record.blocks:
            if block.router_path is not None:
                model.get_submodule(block.router_path).register_forward_hook(self._see_router)
        keep_gathered(model)
        self.tied = self._tied_gradients()
        model.register_forward_pre_hook(self._refuse_direct_call, prepend=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states between stages."""
        return self.record.plan.torch_dtype or next(param.dtype for param in self.model.parameters())

    def _tied_gradients(self) -> TiedGradients | None:
        """For a rank with one of two stages that hold a tied weight; a rank with both has it once."""
        tie, rank = self.cut.tie, self.record.mesh.dense.get_local_rank("pp")
        first, last = (self.layout.rank_of(stage) for stage in (0, self.layout.num_stages - 1))
        if tie is None or first == last or rank not in (first, last):
            return None
        if rank == last:
            vars(self.model)["_moeweave_copies"] = {tie.copy: tie.weight}
        param = self.model.get_parameter(tie.weight if rank == first else tie.copy)
        if not param.requires_grad:
            return None
        return TiedGradients(param, last if rank == first else first, self.record.mesh.group("pp"))

    def _refuse_direct_call(self, *_: Any) -> None:
        if not self.cut.border.running and not self.generating:
            raise RuntimeError(
                f"{type(self.model).__name__} is cut into {self.layout.num_stages} stages: no rank can run it alone. "
                "Call moeweave.forward_backward(model, batch, microbatches=...) on every rank."
            )

    def _see_router(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.cut.border.logits is not None:
            self.cut.border.logits.append(output[0] if isinstance(output, tuple) else output)

    def forward_backward(self, batch: dict[str, Any], microbatches: int) -> Tensor:
        """See `loss.forward_backward`. Every rank of a pipeline is fed the same batch."""
        record, count = self.record, microbatches
        self.layout.check_microbatches(count)
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] % count:
            rows = list(ids.shape) if isinstance(ids, Tensor) else None
            raise ValueError(
                f"pp needs input_ids [B, S] whose rows divide over the micro-batches ({count}); got {rows}. "
                "Pass a batch with a multiple of that many rows."
            )
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise ValueError("pp needs labels in the batch: the last stage computes the loss.")
        parts = losses.split(batch, count)
        num_items = batch.get("num_items_in_batch")
        known = {shifted: losses.global_tokens(labels, shifted=shifted) for shifted in (False, True)}
        if record.takes_num_items and num_items is None:
            num_items = known[record.labels_shifted]
        self.share = 1.0 / count if num_items is None else 1.0
        extra = {} if num_items is None else {"num_items_in_batch": num_items}
        self.parts = [{**part, **extra} for part in parts]
        self.aux_on = self.num_experts > 0 and aux_losses.balances(self.model, batch)
        if self.aux_on:
            aux_losses.check_routers(record)
        for layer in record.layers:
            layer.aux_share = 1.0 / count
        token = losses.begin_step(labels, count, {key: value / count for key, value in known.items()})
        try:
            total = self._step(count, ids.shape[0] // count, self._held(*ids.shape))
        finally:
            losses.end_step(token)
            self.parts = []
            for layer in record.layers:
                layer.aux_share = 1.0
        dist.all_reduce(total)
        return total * self.layout.pp / record.mesh.world

    def _held(self, rows: int, length: int) -> int:
        """Positions that go between this rank's stages."""
        sharing = self.record.sequence
        return length if sharing is None else int(sharing.span(rows, length).held)

    def _mask(self, batch: Step) -> Tensor | None:
        """Attention mask of the tokens that this rank routes."""
        mask, sharing = batch.get("attention_mask"), self.record.sequence
        if mask is None or mask.dim() != 2 or sharing is None:
            return mask
        tokens: Tensor = sharing.span(*mask.shape).tokens(mask)
        return tokens

    def _step(self, count: int, rows: int, width: int) -> Tensor:
        key = (count, rows, width, self.aux_on)
        if key not in self.steps:
            self.steps.clear()  # stages keep buffers of their width
        if key not in self.steps:
            self.steps[key] = self._make_step(*key)
        indices = torch.arange(count)
        found: list[Tensor] = []
        own = self.layout.stages_of(self.record.mesh.dense.get_local_rank("pp"))
        args = (indices.to(self.record.mesh.device),) if 0 in own else ()
        last = self.layout.num_stages - 1 in own
        options = {"target": indices, "losses": found} if last else {}
        with self.tied.summed() if self.tied is not None else nullcontext():
            self.steps[key](*args, index=indices, return_outputs=False, **options)
            reduce_gradients(self.model)
        total = torch.zeros((), device=self.record.mesh.device)
        return sum((loss.detach().float() for loss in found), total)

    def _make_step(self, count: int, rows: int, width: int, aux_on: bool) -> Any:
        """Shapes are said beforehand: else torch's runtime would run a forward of its own to find them."""
        from torch.distributed.pipelining import PipelineStage  # imports Dynamo, which only pp needs

        mesh, last = self.record.mesh, self.layout.num_stages - 1
        dtype = self.dtype
        hidden = torch.empty(rows, width, self.width, dtype=dtype, device="meta", requires_grad=True)
        sums = torch.empty(2 * self.num_experts + 1, device="meta", requires_grad=True)
        between = (hidden, sums) if aux_on else (hidden,)
        index = (torch.empty(1, dtype=torch.int64, device="meta"),)
        loss = (torch.empty(1, dtype=dtype, device="meta", requires_grad=True),)
        stages = [
            PipelineStage(
                StagePart(self, stage),
                stage,
                last + 1,
                mesh.device,
                input_args=between if stage else index,
                output_args=between if stage < last else loss,
                group=mesh.group("pp"),
                dw_builder=weight_gradients(),
            )
            for stage in self.layout.stages_of(mesh.dense.get_local_rank("pp"))
        ]
        return make_schedule(self.layout, stages, count)

    def run_stage(self, stage: int, index: int, args: tuple[Tensor, ...]) -> Any:
        """One micro-batch through one stage: (hidden[, sums]) for the next stage, or the loss [1] of the last."""
        border, last = self.cut.border, stage == self.layout.num_stages - 1
        border.received = args[0] if stage else None
        border.logits = [] if self.aux_on else None
        batch = dict(self.parts[index])
        if not last:
            self._hide_labels(batch)
        if self.aux_on:
            batch["output_router_logits"] = False
        with self.cut.viewing(stage), split_logits():
            output = self.model(**batch)
        logits, sent = border.logits, border.sent
        border.received = border.sent = border.logits = None
        sums = None
        if logits is not None:
            sums = args[1] if stage else torch.zeros(2 * self.num_experts + 1, device=self.record.mesh.device)
            sums = aux_losses.balance_sums(logits, self._mask(batch), self.record.top_k, sums)
            sums = sums if sums.requires_grad else sums.requires_grad_()
        if not last:
            return sent if sums is None else (sent, sums)
        loss = losses.loss_of(output) * self.share
        if sums is not None:
            aux = aux_losses.balance_loss(sums, self.record)
            loss = loss + self.record.aux_coef * aux / len(self.parts)
        return loss.reshape(1)

    def _hide_labels(self, batch: dict[str, Any]) -> None:
        """Stages before the last compute no loss; a forward that insists on labels gets none that count."""
        if losses.labels_optional(self.model):
            batch.pop("labels", None)
            batch.pop("shift_labels", None)
        else:
            batch["labels"] = torch.full_like(batch["labels"], losses.IGNORED_LABEL)


def _width(model: nn.Module) -> int:
    """Hidden size D: the config's, else the width of the layers' norm or embedding on this rank."""
    config: Any = getattr(model, "config", None)
    if config is not None:
        return int(config.get_text_config().hidden_size)
    return int(vars(model)["_moeweave_width"])

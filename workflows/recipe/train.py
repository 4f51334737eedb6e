"""The recipe's training stages and how they run."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipelines.config import DataConfig, StrictModel
from pipelines.identity import Decides

Part = Literal["vision", "connector", "language_model"]
PARTS = ("vision", "connector", "language_model")
AUTO = "auto"
MOST_AT_ONCE = 8
"""Rows of a micro batch that are tried at most where their number is measured."""


def _number_or_auto(value: Any) -> Any:
    if value != AUTO and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError("give a number above 0, or auto")
    return value


Measured = Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)]
"""A number that only speed and rounding depend on, or `auto`."""


class LoraRecipe(StrictModel):
    """Low-rank adapters on the language model in place of its own weights; merged into them when the stage ends."""

    rank: int = Field(16, gt=0)
    """Rank of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """Scale: an adapter counts alpha / rank times."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapter."""
    targets: str = r".*\.(in_proj|out_proj)"
    """Regular expression that the full name of an adapted linear layer within the language model matches."""


class AugmentRecipe(StrictModel):
    """Random changes of the training images, for corpora of few images. A resumed stage sees the same ones."""

    crop: float = Field(1.0, gt=0, le=1)
    """Show a part with at least this share of the area; 1 for the whole image."""
    flip: bool = False
    """Mirror half of the images; only where left and right do not matter: no questions about sides, no writing."""
    colour: float = Field(0.0, ge=0, lt=1)
    """Brightness, contrast and saturation change by factors of up to 1 - colour and 1 + colour; not where colours are
    asked for."""

    @model_validator(mode="after")
    def _changes_something(self):
        if self.crop == 1 and not self.flip and not self.colour:
            raise ValueError(
                "augment changes nothing: give crop under 1, flip: true or colour above 0, or leave it out"
            )
        return self


class BestRecipe(StrictModel):
    """A stage whose model is that of the best measurement and not of the last step. Needs train.validate_every and a
    validation split."""

    by: Literal["score", "loss"] = "score"
    """What is measured on the validation split: `score`, the share of its answers that the model gives to the last
    token (of two steps with the same one, that with the lower loss is better), or `loss`."""
    patience: int | None = Field(None, gt=0)
    """Stop after so many measurements in a row of which none was better; absent: all steps are done."""


class StageRecipe(StrictModel):
    """One training stage. What it trains, what is frozen and what is saved follow from `trains` alone:
    the other parts are frozen, and every export holds the whole model."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    """Name in folders, logs and --stage."""
    trains: list[Part]
    """The parts that train."""
    lora: LoraRecipe | None = None
    """Train the language model through low-rank adapters; it must be among the parts that train."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the rows; or give steps."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps; or give epochs."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate; cosine to zero after the warm-up."""
    learning_rates: dict[Part, float] = Field(default_factory=dict)
    """Peak learning rates of single parts, as {vision: 2.0e-6}; the others have learning_rate."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay; never on biases, norms, A_log, dt_bias and D."""
    betas: Annotated[tuple[float, float], Decides.WHEN_SET] = (0.9, 0.98)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Decides.WHEN_SET] = Field(1e-8, gt=0)
    """AdamW's term that keeps the division from zero."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps with linearly rising learning rate."""
    batch_rows: int = Field(gt=0)
    """Packed rows in one optimizer step, over all workers."""
    micro_batch_rows: Measured = 1
    """Packed rows that one worker runs at once; the rest is accumulated. `auto`: the stage's first start runs some rows
    in each way, for some seconds, and takes the fastest; a resumed stage goes on with what was chosen. For workers on
    CPUs: on a GPU memory decides."""
    augment: Annotated[AugmentRecipe | None, Decides.WHEN_SET] = None
    """Random changes of the images; absent: none."""
    dropout: Annotated[float, Decides.WHEN_SET] = Field(0.0, ge=0, lt=1)
    """Share of the values that is dropped, in steps alone, of the connector's embeddings and of what each block of the
    language model adds; of the parts that train."""
    balance_answers: Annotated[float, Decides.WHEN_SET] = Field(0.0, ge=0, le=1)
    """How far answers that are given often are made to count less in the loss: each weighs its number in the training
    split to the power of minus this, and a token 1 on average. At 1 every answer counts as much as any other, at 0.5 a
    hundred times as many count ten times as much. Not for free texts, each of which is an answer of its own. At the
    stage's start every row is read to count them."""
    keep_features: Annotated[Literal["never", "auto", "always"], Decides.NOTHING] = "never"
    """Keep what a frozen encoder gives for each image beside the shards, and do not compute it again: `always`, or with
    `auto` where each record's images are shown twice or more and the features take no more than half of the disk's
    free room. The same losses but for rounding. Not with a training encoder or `augment`, which change what would be
    kept."""
    best: Annotated[BestRecipe | None, Decides.WHEN_SET] = None
    """Take the step that is best on the validation split; absent: the last one."""
    clip: float = Field(1.0, ge=0)
    """Global gradient norm limit; 0 for none."""
    data: DataConfig | None = None
    """Data set of this stage alone, or the name of a data recipe, as the paper has one for the connector and one for
    the rest. Absent: the recipe's. The tokenizer must be the same."""

    @model_validator(mode="after")
    def _one_length(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self

    @model_validator(mode="after")
    def _trains_something(self):
        if not self.trains:
            raise ValueError(f"the stage trains nothing: name parts in trains ({', '.join(PARTS)}), or drop the stage")
        for part, rate in self.learning_rates.items():
            if part not in self.trains:
                raise ValueError(f"learning_rates.{part} is given, but trains does not name {part}")
            if rate <= 0:
                raise ValueError(f"learning_rates.{part} = {rate}: give more than 0, or take {part} out of trains")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)}: each is at least 0 and under 1")
        if self.keep_features == "always" and ("vision" in self.trains or self.augment):
            changes = "augment, which changes the images" if self.augment else "vision, which trains"
            raise ValueError(f"keep_features is always, beside {changes}: drop one of them, or set it to auto")
        if self.lora and "language_model" not in self.trains:
            raise ValueError("lora adapts the language model: add language_model to trains, or drop lora")
        return self


def _one_or_two(workers: Any) -> Any:
    numbers = workers if isinstance(workers, list | tuple) else [workers]
    whole = all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in numbers)
    if not whole or len(numbers) > 2 or (isinstance(workers, list | tuple) and len(numbers) < 2):
        raise ValueError("give a number above 0, or two of them, [least, most]")
    if numbers[0] > numbers[-1]:
        raise ValueError(f"the first of [{numbers[0]}, {numbers[1]}] is the least, and is over the most")
    return workers


class TrainRecipe(StrictModel):
    """How the stages run."""

    workers: Annotated[int | tuple[int, int], BeforeValidator(_one_or_two), Decides.NOTHING]
    """Ray Train workers; with GPUs, one GPU each. Two numbers, [least, most], for a cluster whose nodes come and go:
    training starts with as many as there is room for, goes on from its last checkpoint with the rest when a node is
    lost, and grows when there is room again. Each step has the same rows whatever their number."""
    cpus_per_worker: Annotated[int, Decides.NOTHING] = Field(1, gt=0)
    """CPU cores, and torch threads, of one worker."""
    gpus_per_worker: Annotated[Literal[0, 1], Decides.NOTHING] = 0
    """1 on a GPU cluster."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 0 is plain data parallel; 1 shards the optimizer, 2 gradients too, 3 weights too."""
    offload: Annotated[Literal["none", "optimizer", "parameters"], Decides.NOTHING] = "none"
    """Keep the optimizer in the CPU's memory, and with ZeRO-3 the parameters too: slower, for larger models."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type. A_log, dt_bias, D and the recurrent state stay float32."""
    activation_checkpointing: Annotated[bool, Decides.NOTHING] = False
    """Recompute each block in the backward pass."""
    save_every: Annotated[int, Decides.NOTHING] = Field(100, gt=0)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: Annotated[int, Decides.NOTHING] = Field(2, gt=0)
    """Checkpoints that an unfinished stage keeps; one goes when a newer one is whole."""
    log_every: Annotated[int, Decides.NOTHING] = Field(10, gt=0)
    """Optimizer steps between logged metrics."""
    validate_every: Annotated[int | None, Decides.NOTHING] = Field(None, gt=0)
    """Optimizer steps between measurements of loss and score on the validation split; absent: none. The score is the
    share of its answers that greedy decoding would give to the last token, after right answers to the questions before;
    it comes out of the pass that measures the loss."""
    validate_rows: Annotated[int, Decides.NOTHING] = Field(64, gt=0)
    """Packed rows of the validation split that are measured, the first ones. Where a stage takes its best step, this
    and validate_every decide what comes out."""
    sample_every: Annotated[int | None, Decides.NOTHING] = Field(None, gt=0)
    """Optimizer steps between sample answers to questions of the validation split; absent: none."""
    samples: Annotated[int, Decides.NOTHING] = Field(4, gt=0)
    """Questions that are answered."""
    sample_tokens: Annotated[int, Decides.NOTHING] = Field(16, gt=0)
    """Longest sample answer in tokens."""
    max_loss_rise: Annotated[float | None, Decides.NOTHING] = Field(3.0, gt=0)
    """The stage stops as diverged when the mean loss between two logs is this much, in nats per token, over the lowest
    such mean so far (3 nats: 20 times less likely answers); absent: only what is not finite stops it."""
    check_shards: Annotated[bool, Decides.NOTHING] = True
    """Compare each shard with its sha256 before it is read, once on each node, while training goes on. It reads a shard
    whole; shards in an object store are not compared here (`mlmamba prepare --verify` does)."""
    max_failures: Annotated[int, Decides.NOTHING] = Field(2, ge=0)
    """How often a stage is restarted from its last checkpoint when a worker fails."""
    max_lost_nodes: Annotated[int, Decides.NOTHING] = Field(100, ge=0)
    """How often a stage goes on, beside that, when a node is lost or taken back. Where its node was drained before, as
    a notice of a spot instance's end should have it, the workers leave with a checkpoint, and no step is lost."""
    stages: list[StageRecipe] = Field(min_length=1)
    """The stages, in order."""

    @model_validator(mode="after")
    def _check(self):
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]!r}")
        needs = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needs:
            raise ValueError(f"offload = {self.offload} needs zero_stage {needs} or more, not {self.zero_stage}")
        for stage in self.stages:
            if stage.best and not self.validate_every:
                raise ValueError(
                    f"stage {stage.name!r}: best chooses among measurements on the validation split, and there are "
                    "none: set train.validate_every to the steps between them, or drop best"
                )
            at_once = 1 if stage.micro_batch_rows == AUTO else stage.micro_batch_rows
            per_pass = self.most_workers * at_once
            if stage.batch_rows % per_pass:
                raise ValueError(
                    f"stage {stage.name!r}: batch_rows = {stage.batch_rows} does not divide into "
                    f"workers x micro_batch_rows = {self.most_workers} x {at_once} = {per_pass}"
                )
            if stage.micro_batch_rows == AUTO and self.gpus_per_worker:
                raise ValueError(
                    f"stage {stage.name!r}: micro_batch_rows = auto is for workers on CPUs: on a GPU give as many as "
                    "its memory holds (`mlmamba train RECIPE --dry-run` says what they take)"
                )
        return self

    def micro_batches(self, stage: StageRecipe) -> list[int]:
        """The numbers of rows that a worker may run at once: the recipe's, or those among which is measured."""
        if stage.micro_batch_rows != AUTO:
            return [stage.micro_batch_rows]
        own = stage.batch_rows // self.most_workers
        return [rows for rows in range(1, min(own, MOST_AT_ONCE) + 1) if own % rows == 0]

    @property
    def least_workers(self) -> int:
        """With how many training can begin."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """How many it takes where there is room."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

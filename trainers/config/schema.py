"""The schema of an experiment: every section, field and default. Ranges are checked by `trainers.config.validation`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainers.config.errors import ConfigurationError
from trainers.config.fields import fields_of
from trainers.config.inherited import fill_inherited
from trainers.config.section import Section, accepts_other_spellings


@accepts_other_spellings("model")
@dataclass
class ModelConfig(Section):
    """Which model is trained.

    Attributes:
        name: What the project's model factory calls it; other spelling `type`.
        hidden_size: Width of the hidden layers.
        num_layers: Number of layers.
        num_heads: Number of attention heads.
        dropout: Share of the activations that is dropped, 0 to 1.
        activation: Name of the activation function.
        num_classes: Number of classes; None where there are none.
        pretrained: Whether to start from pretrained weights.
        freeze_backbone: Whether to train the head only.
        custom_params: Anything else the factory needs.

    Example:
        >>> ModelConfig(type="transformer").name
        'transformer'
    """

    name: str
    hidden_size: int = 512
    num_layers: int = 6
    num_heads: int = 8
    dropout: float = 0.1
    activation: str = "relu"
    num_classes: int | None = None
    pretrained: bool = False
    freeze_backbone: bool = False
    custom_params: dict[str, Any] = field(default_factory=dict)


@accepts_other_spellings("training")
@dataclass
class TrainingConfig(Section):
    """How long and how fast is trained.

    Attributes:
        epochs: Passes over the training data; other spelling `max_epochs`.
        max_steps: Optimizer steps after which training ends; None for no such end.
        batch_size: Samples a batch.
        learning_rate: Learning rate.
        gradient_accumulation_steps: Batches an optimizer step.
        max_grad_norm: Norm to which gradients are clipped; None for no clipping.
        early_stopping_patience: Validations without improvement before training ends; None for no early stopping.
        early_stopping_metric: What is to improve.
        early_stopping_mode: "min" or "max".
        validation_every_n_epochs: Epochs between validations; other spelling `validation_frequency`.
    """

    epochs: int = 100
    max_steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 1e-4
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = 1.0
    early_stopping_patience: int | None = None
    early_stopping_metric: str = "val_loss"
    early_stopping_mode: str = "min"
    validation_every_n_epochs: int = 1


@accepts_other_spellings("data")
@dataclass
class DataConfig(Section):
    """What is trained on.

    Attributes:
        dataset_name: What the project's loader factory calls the data set.
        dataset_path: Where it lies; other spelling `data_dir`.
        train_split: Name of the training split.
        val_split: Name of the validation split.
        test_split: Name of the test split.
        shuffle_train: Whether the training data is shuffled.
        drop_last: Whether an incomplete last batch is left out.
        preprocessing: Settings of the project's preprocessing.
        augmentations: Settings of the project's augmentations.
        custom_params: Anything else the factory needs.
        batch_size: Samples a batch; None for that of `training`.
        num_workers: Loader processes; None for the number in `performance`.
        pin_memory: Whether batches go to pinned memory; None for the setting in `performance`.
    """

    dataset_name: str
    dataset_path: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    test_split: str = "test"
    shuffle_train: bool = True
    drop_last: bool = True
    preprocessing: dict[str, Any] = field(default_factory=dict)
    augmentations: dict[str, Any] = field(default_factory=dict)
    custom_params: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    num_workers: int | None = None
    pin_memory: bool | None = None


@accepts_other_spellings("optimizer")
@dataclass
class OptimizerConfig(Section):
    """Which optimizer is used.

    Attributes:
        name: Its name; other spelling `type`.
        weight_decay: Weight decay.
        betas: The two decay rates of Adam and its kin.
        eps: Term that keeps divisions finite.
        amsgrad: Whether to use the AMSGrad variant.
        custom_params: Anything else the project's optimizer factory needs.
        learning_rate: Learning rate, other spelling `lr`; None for that of `training`.
    """

    name: str = "adamw"
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    amsgrad: bool = False
    custom_params: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None


@accepts_other_spellings("scheduler")
@dataclass
class SchedulerConfig(Section):
    """Which learning rate schedule is used.

    Attributes:
        name: Its name; other spelling `type`.
        warmup_steps: Steps during which the learning rate rises.
        max_steps: Length of the schedule in steps; None where the project's factory knows it.
        min_lr: Learning rate at the end.
        gamma: Factor of the stepwise and exponential schedules.
        step_size: Epochs or steps between two changes of the "step" schedule.
        milestones: When the "multistep" schedule changes.
        custom_params: Anything else the project's scheduler factory needs.
    """

    name: str = "cosine"
    warmup_steps: int = 1000
    max_steps: int | None = None
    min_lr: float = 1e-6
    gamma: float = 0.1
    step_size: int = 10
    milestones: list[int] = field(default_factory=list)
    custom_params: dict[str, Any] = field(default_factory=dict)


@accepts_other_spellings("slurm")
@dataclass
class SLURMConfig(Section):
    """What a Slurm job asks for; None leaves an option out, so that the cluster's own default holds.

    Attributes:
        job_name: Name of the job; None for that of the experiment.
        time_limit: In one of Slurm's forms, such as "1-00:00:00"; other spelling `time`.
        nodes: Number of nodes.
        ntasks_per_node: Tasks on each node.
        cpus_per_task: Processor cores a task.
        requeue: Whether Slurm may start the job again.
        exclusive: Whether the nodes are shared with no other job.
        additional_args: Further options, each beginning with "-"; other spelling `extra_args`, a dict.
        gres: Generic resources, such as "gpu:2"; other spelling `gpus_per_node`, a number.
        partition: As in sbatch, like all that follow.
        account: Account to be charged.
        mem: Memory a node, such as "32G".
        mem_per_cpu: Memory a core.
        qos: Quality of service.
        constraint: Features the nodes must have.
        gpu_bind: How tasks are bound to graphics cards.
        begin: Earliest start.
        reservation: Name of a reservation.
        exclude: Nodes not to be used.
        nodelist: Nodes to be used.
        mail_type: When to send mail.
        mail_user: Whom to send mail.
        array: Array indices.
        dependency: Jobs to wait for.
        output: File for the standard output.
        error: File for the standard error.

    Example:
        >>> SLURMConfig(gpus_per_node=2).gres
        'gpu:2'
    """

    job_name: str | None = None
    time_limit: str | None = "1-00:00:00"
    nodes: int = 1
    ntasks_per_node: int = 1
    cpus_per_task: int = 8
    requeue: bool = True
    exclusive: bool = False
    additional_args: list[str] = field(default_factory=list)
    gres: str | None = None
    partition: str | None = None
    account: str | None = None
    mem: str | None = None
    mem_per_cpu: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_bind: str | None = None
    begin: str | None = None
    reservation: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    array: str | None = None
    dependency: str | None = None
    output: str | None = None
    error: str | None = None


@accepts_other_spellings("logging")
@dataclass
class LoggingConfig(Section):
    """What is logged, and where.

    Attributes:
        log_level: Level of the messages; other spelling `console_log_level`.
        log_file: File for the messages; None for none.
        console_log: Whether messages go to the console.
        log_every_n_steps: Steps between logged metrics; other spelling `log_scalars_every_n_steps`.
        use_wandb: Whether to log to Weights & Biases.
        wandb_project: Project there.
        wandb_entity: Entity there.
        wandb_notes: Notes there.
        wandb_tags: Tags there.
        tensorboard_dir: Directory for TensorBoard; None for no such log.
        csv_log_dir: Directory for CSV files; None for none.
    """

    log_level: str = "INFO"
    log_file: str | None = None
    console_log: bool = True
    log_every_n_steps: int = 50
    use_wandb: bool = False
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_notes: str | None = None
    wandb_tags: list[str] = field(default_factory=list)
    tensorboard_dir: str | None = None
    csv_log_dir: str | None = None


@accepts_other_spellings("checkpoint")
@dataclass
class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept.

    Attributes:
        checkpoint_dir: Where they go; other spelling `root_dir`.
        save_every_n_epochs: Epochs between checkpoints; None for none after epochs.
        save_every_n_steps: Steps between checkpoints; None for none after steps.
        save_every_n_minutes: Minutes between checkpoints; None for none by time.
        save_top_k: How many are kept, -1 for all; other spelling `max_checkpoints`.
        save_last: Whether the end of training is saved.
        monitor: Metric that says which are best; other spelling `monitor_metric`.
        mode: "min" or "max", whichever is better; other spelling `monitor_mode`.
        filename: Pattern of the file names, to which a number is added where another state has the name already; other
            spelling `filename_template`.
        save_rng: Whether states of random generators are saved.
        save_optimizer: Whether the optimizer is saved.
        save_scheduler: Whether the scheduler is saved.
        timeout_seconds: How long a save may take.
    """

    checkpoint_dir: str = "checkpoints"
    save_every_n_epochs: int | None = 1
    save_every_n_steps: int | None = None
    save_every_n_minutes: float | None = None
    save_top_k: int = 5
    save_last: bool = True
    monitor: str | None = None
    mode: str = "min"
    filename: str = "epoch_{epoch:03d}_step_{step:06d}.ckpt"
    save_rng: bool = True
    save_optimizer: bool = True
    save_scheduler: bool = True
    timeout_seconds: float = 300.0


_REQUEUE_SIGNALS = ("SIGUSR1", "SIGUSR2")


@accepts_other_spellings("preemption")
@dataclass
class PreemptionConfig(Section):
    """What happens when the scheduler takes the machine away.

    Attributes:
        timeout_minutes: How long the save may take; other spelling `max_checkpoint_sec`, in seconds.
        grace_period_seconds: What is left for the rest after the save.
        max_preemptions: How often the job is put back into the queue.
        signals: Signals that mean preemption; other spelling `signal`, one of them.
        requeue_signals: Those of them after which the job is put back into the queue; not given: those of SIGUSR1
            and SIGUSR2 that are among `signals`.
        requeue_job: Whether the job is put back at all.
        checkpoint_on_preemption: Whether a checkpoint is written.
        exit_on_max_preemptions: Whether training ends at a preemption beyond `max_preemptions`.
        auto_resume: Whether training goes on from the newest checkpoint; other spelling
            `resume_from_latest_symlink`.

    Example:
        >>> PreemptionConfig(signal="SIGUSR1", max_checkpoint_sec=90).timeout_minutes
        1.5
    """

    timeout_minutes: float = 5.0
    grace_period_seconds: int = 60
    max_preemptions: int = 3
    signals: list[str] = field(default_factory=lambda: [*_REQUEUE_SIGNALS, "SIGTERM"])
    requeue_signals: list[str] | None = None
    requeue_job: bool = True
    checkpoint_on_preemption: bool = True
    exit_on_max_preemptions: bool = True
    auto_resume: bool = True

    def __post_init__(self) -> None:
        if self.requeue_signals is None:
            self.requeue_signals = [name for name in _REQUEUE_SIGNALS if name in self.signals]


@accepts_other_spellings("performance")
@dataclass
class PerformanceConfig(Section):
    """How batches are loaded and computed.

    Attributes:
        num_workers: Loader processes; other spelling `dataloader_num_workers`.
        pin_memory: Whether batches go to pinned memory.
        prefetch_factor: Batches each process loads ahead; left out by a loader factory when `num_workers` is 0.
        persistent_workers: Whether the processes outlive an epoch; left out likewise.
        compile_model: Whether the model is compiled.
        mixed_precision: None, "16-mixed" or "bf16-mixed"; other spelling `use_amp`, true for "16-mixed".
        gradient_accumulation_steps: Batches an optimizer step; None for the number in `training`.
        clip_grad_norm: Norm to which gradients are clipped; None for `training.max_grad_norm`.
        dataloader_drop_last: Whether an incomplete last batch is left out; None for `data.drop_last`.
    """

    num_workers: int = 4
    pin_memory: bool = True
    prefetch_factor: int = 2
    persistent_workers: bool = True
    compile_model: bool = False
    mixed_precision: str | None = None
    gradient_accumulation_steps: int | None = None
    clip_grad_norm: float | None = None
    dataloader_drop_last: bool | None = None


@dataclass
class ExperimentConfig(Section):
    """Everything about an experiment. Inheriting fields without a value take that of their source when it is built.

    Attributes:
        experiment_name: Name of the experiment, of its directory and of its job.
        model: Which model is trained.
        training: How long and how fast.
        data: What is trained on.
        optimizer: Which optimizer is used.
        scheduler: Which learning rate schedule is used; None for none.
        slurm: What a Slurm job asks for; None outside Slurm.
        logging: What is logged.
        checkpoint: When checkpoints are written.
        preemption: What happens when the machine is taken away.
        performance: How batches are loaded and computed.
        description: Free text.
        tags: Free words.
        created_by: Who set up the experiment.
        created_at: When.
        version: Version of the configuration.
        seed: Seed of all random generators; None for no fixed seed.
        deterministic: Whether to use deterministic algorithms only.
        benchmark: Whether to let cuDNN look for the fastest algorithms.
        custom_params: Anything else.

    Raises:
        ConfigurationError: A section is no object of its class.

    Example:
        >>> config = ExperimentConfig("first", ModelConfig("mlp"), TrainingConfig(batch_size=8), DataConfig("digits"),
        ...                           OptimizerConfig())
        >>> config.data.batch_size
        8
    """

    experiment_name: str
    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig | None = None
    slurm: SLURMConfig | None = None
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig)
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    description: str | None = None
    tags: list[str] = field(default_factory=list)
    created_by: str | None = None
    created_at: str | None = None
    version: str = "1.0"
    seed: int | None = None
    deterministic: bool = True
    benchmark: bool = False
    custom_params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for section in fields_of(ExperimentConfig).values():
            value = getattr(self, section.name)
            if not section.is_section or isinstance(value, section.item) or (value is None and section.is_optional):
                continue
            if value is not None or section.is_required:
                raise ConfigurationError(
                    f"{section.name}: received {type(value).__name__}; expected {section.item.__name__}. "
                    "Build it from a dict with create_experiment_config."
                )
            setattr(self, section.name, section.item())
        fill_inherited(self)

"""Define the fields of a recipe, with their ranges, units and descriptions."""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    TypeAdapter,
)
from pydantic.dataclasses import dataclass

from ..adversary.attack import Attack
from ..data.own import absolute
from ..data.photos import Damaged
from ..device.precision import Precision
from ..errors import EngineError
from ..evaluation.robust_accuracy import EvaluationPrecision, PgdLoss, PgdStep
from ..objectives import OBJECTIVES, LocalBall, Objective, Passes
from ..registers import loaders, optimisers
from ..threat import Number, ThreatModel
from ..training.perturbation import Weights
from ..training.schedule import Schedule

LoggerName = Literal["tensorboard", "wandb", "mlflow"]


def _on_or_off(value: object) -> object:
    """Read true and false as well: run folders of earlier versions hold them."""
    words = {"true": "on", "false": "off"}
    return words.get(str(value).lower(), value)


def _absolute_path(path: str | None) -> str | None:
    """Make a path absolute: a run can then be resumed from any folder."""
    return path if path is None else str(Path(path).expanduser().absolute())


def _sides(value: Any) -> Any:
    """Return (height, width) of one side, of two, or of the words "224" and "224x160"."""
    if isinstance(value, str):
        value = value.replace("x", ",").split(",")
    if isinstance(value, int):
        value = [value]
    return [*value, *value] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _pair(value: Any) -> Any:
    """Return the parts of the words "0.25,1"."""
    return value.split(",") if isinstance(value, str) else value


def _count_or_share(value: Any) -> Any:
    """Refuse 1.0 and more with a point, which may mean a share of all or a count of one."""
    if isinstance(value, str | float) and re.fullmatch(r"\s*\+?0*[1-9][\d_]*\.\d*\s*", str(value)):
        raise ValueError("a count is written 1, without a point, and a share lies below 1")
    return value


_Side = Annotated[int, Field(ge=1, le=1 << 14)]
_Share = Annotated[float, Field(gt=0, le=1)]


def _read_objective(value: Any) -> Objective:
    """Read an objective's table by the class that has its name, a registered one too."""
    if isinstance(value, Objective):
        return value
    kind = OBJECTIVES.get(value["name"]) if isinstance(value, dict) and "name" in value else None
    if kind is None:
        raise ValueError("must be a table with the name of an objective")
    return TypeAdapter(kind).validate_python(value)


def _write_objective(objective: Objective, info: SerializationInfo) -> dict[str, Any]:
    return TypeAdapter(type(objective)).dump_python(
        objective, mode="json" if info.mode_is_json() else "python"
    )


# Which classes there are is known when a recipe is read, not here: an imported module adds to them.
AnyObjective = Annotated[
    Objective, PlainValidator(_read_objective), PlainSerializer(_write_objective)
]


@dataclass(frozen=True)
class Data:
    name: Annotated[
        str,
        AfterValidator(absolute),
        Field(description="dataset: see `engine data list`; or the path of your own"),
    ] = "digits"
    validation: Annotated[
        Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)],
        BeforeValidator(_count_or_share),
        Field(
            description="training images held out to choose the best checkpoint "
            "[count, or share 0..1]"
        ),
    ] = 1000
    train_examples: Annotated[
        int | None,
        Field(ge=1, description="use only the first N training images; left out: all [count]"),
    ] = None
    pad: Annotated[
        int, Field(ge=0, description="random crop after zero-padding by this [pixels]")
    ] = 0
    flip: Annotated[bool, Field(description="mirror half of the images")] = False
    cutout: Annotated[
        int, Field(ge=0, description="side of a random square set to 0; 0: none [pixels]")
    ] = 0
    cutmix: Annotated[
        bool,
        Field(description="replace a random box of every image by another image's; mixes labels"),
    ] = False
    erase: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="share of the images of which a random rectangle is set to 0 [0..1]",
        ),
    ] = 0.0
    extra: Annotated[
        str | None,
        AfterValidator(lambda name: name if name is None else absolute(name)),
        Field(
            description="extra training images, generated ones for instance: an .npz with `image` "
            "and `label`, or a dataset; left out: none"
        ),
    ] = None
    extra_share: Annotated[
        float,
        Field(gt=0, lt=1, description="share of every batch that is extra images (0..1)"),
    ] = 0.7
    size: Annotated[
        tuple[_Side, _Side] | None,
        BeforeValidator(_sides),
        Field(
            description="stream a folder of pictures of any size, and show the network this size: "
            "224 or 224x160 (height x width); left out: images of one size, held in memory [pixels]"
        ),
    ] = None
    resize: Annotated[
        int | None,
        Field(
            ge=1,
            description="with size: shorter side of a whole picture before its centre is cropped; "
            "left out: size / 0.875 [pixels]",
        ),
    ] = None
    scale: Annotated[
        tuple[_Share, _Share] | None,
        BeforeValidator(_pair),
        Field(
            description="with size: train on random resized crops of such a share of the picture, "
            "0.25,1; left out: on the centre, shifted by pad [share 0..1]"
        ),
    ] = None
    jitter: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="brightness, contrast and saturation change by up to this share [0..1)",
        ),
    ] = 0.0
    damaged: Annotated[
        Damaged,
        Field(description="with size: refuse to train beside damaged files, or name and skip them"),
    ] = "refuse"
    loader: Annotated[
        str,
        AfterValidator(loaders.checked),
        Field(
            description="what makes batches: the device itself (resident), NVIDIA DALI, torch's "
            "DataLoader, or one from --import; null repeats one batch, for benchmarks; auto: "
            "resident where it fits"
        ),
    ] = "auto"
    workers: Annotated[
        int,
        Field(ge=0, le=256, description="threads of DALI, processes of torch's DataLoader [count]"),
    ] = 2

    @property
    def resized(self) -> int:
        """Return `resize`, or its default for `size`: 256 for 224, as is usual."""
        assert self.size is not None
        return self.resize or round(min(self.size) / 0.875)

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises:
            EngineError: names the option and the remedy.
        """
        if self.size is None:
            options = ("resize", "scale")
            if given := [name for name in options if getattr(self, name)]:
                raise EngineError(
                    f"data.{given[0]} is for a folder of pictures that is streamed: set data.size"
                )
            if self.erase and self.cutout:
                raise EngineError(
                    "data.erase and data.cutout both set a part of an image to 0: drop one"
                )
            return
        if self.resized < min(self.size):
            raise EngineError(
                f"data.resize = {self.resize} is less than data.size = {min(self.size)}: the crop "
                "would be larger than the picture"
            )
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise EngineError(
                f"data.scale = {self.scale[0]:g},{self.scale[1]:g}: the smaller share comes first"
            )
        if self.scale is not None and self.pad:
            raise EngineError(
                "data.pad shifts the centre crop, and data.scale draws another: drop one"
            )
        if given := [name for name in ("cutout", "cutmix", "erase") if getattr(self, name)]:
            raise EngineError(f"data.{given[0]} is for images in memory: drop it, or data.size")
        if self.loader == "resident":
            raise EngineError(
                "data.loader = resident is for images in memory: pictures are streamed by dali or "
                "torch"
            )

    def held_out(self, total: int) -> int:
        """Return how many of `total` training images are held out for validation.

        A count that leaves no image to train on becomes a fifth; at least one image is held out.
        """
        size = 0.2 if self.validation >= total else self.validation
        return max(1, round(size * total) if size < 1 else int(size))


@dataclass(frozen=True)
class Model:
    name: Annotated[
        str, Field(description="network; or timm/NAME, torchvision/NAME, one from --import")
    ] = "tiny-cnn"
    width: Annotated[
        int | None,
        Field(
            ge=1,
            description="ResNet-18s: channels of the first stage; left out: 64, the literature's "
            "[count]",
        ),
    ] = None
    drop_path: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="networks of timm and torchvision with residual branches: probability that "
            "the deepest is left out for an image (stochastic depth); left out: the network's own "
            "[0..1)",
        ),
    ] = None
    pretrained: Annotated[
        str | None,
        AfterValidator(_absolute_path),
        Field(
            description="file of weights to start from, .safetensors or .pt, whose head may be of "
            "other classes; left out: random"
        ),
    ] = None
    normalise: Annotated[
        bool,
        Field(description="subtract the dataset's mean and divide by its deviation, in the model"),
    ] = False


@dataclass(frozen=True)
class Optim:
    name: Annotated[
        str,
        AfterValidator(optimisers.checked),
        Field(
            description="optimiser: ours (sgd, adamw), torch's fused ones, or NVIDIA apex's where "
            "it is built, or one from --import"
        ),
    ] = "adamw"
    lr: Annotated[Number, Field(gt=0, description="peak learning rate")] = 3e-3
    weight_decay: Annotated[Number, Field(ge=0, description="weight decay")] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1, description="sgd: momentum [0..1)")] = 0.9
    batch_size: Annotated[int, Field(ge=1, description="batch size [images]")] = 256
    epochs: Annotated[int, Field(ge=1, description="passes over the training set [count]")] = 10
    replays: Annotated[
        int,
        Field(
            ge=1,
            description="steps in a row on every batch (Free-AT's m); an epoch has as many times "
            "more steps [count]",
        ),
    ] = 1
    ema: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="decay of the weights' moving average, which is evaluated; 0: none",
        ),
    ] = 0.0


@dataclass(frozen=True)
class StepOptions:
    precision: Annotated[
        Precision,
        Field(
            description="arithmetic of the network's passes: auto is bf16 on GPUs that have it, "
            "fp32 elsewhere"
        ),
    ] = "auto"
    capture: Annotated[
        Literal["auto", "on", "off"],
        Field(description="one CUDA graph for the whole step: auto is on where there is a GPU"),
    ] = "auto"
    compile: Annotated[
        Literal["auto", "on", "off"],
        BeforeValidator(_on_or_off),
        Field(
            description="torch.compile the network's passes (slower on the CPUs measured): auto "
            "times a long run's step with and without, and remembers the faster form"
        ),
    ] = "off"
    deterministic: Annotated[
        bool,
        Field(
            description="on a GPU: cuDNN takes algorithms that give the same bits each time, so "
            "that a resumed run ends as an unbroken one does (slower)"
        ),
    ] = False
    sync_batch_norm: Annotated[
        bool,
        Field(
            description="several GPUs: BatchNorm over the whole batch in training passes, not each "
            "process's part"
        ),
    ] = False


@dataclass(frozen=True)
class Validation:
    steps: Annotated[int, Field(ge=1, description="PGD steps on the validation split [count]")] = 10
    loss: Annotated[
        PgdLoss,
        Field(
            description="what those steps climb: the cross-entropy, or the margin between the best "
            "wrong logit and the label's"
        ),
    ] = "cross-entropy"
    step: Annotated[
        PgdStep,
        Field(
            description="size of those steps: eps / 4 throughout, or decaying from eps to nothing, "
            "which is the more honest at a large radius"
        ),
    ] = "constant"
    every: Annotated[int, Field(ge=1, description="epochs between validations [count]")] = 1


@dataclass(frozen=True)
class CheckpointOptions:
    seconds: Annotated[
        Number,
        Field(ge=0, description="between the checkpoints that `--resume` goes on from [seconds]"),
    ] = 60.0
    keep: Annotated[int, Field(ge=1, description="how many of them are kept [count]")] = 2


@dataclass(frozen=True)
class Evaluation:
    examples: Annotated[
        int | None, Field(ge=1, description="first N test images; left out: all [count]")
    ] = None
    pgd_steps: Annotated[int, Field(ge=1, description="PGD steps [count]")] = 50
    pgd_restarts: Annotated[int, Field(ge=1, description="PGD restarts [count]")] = 10
    autoattack: Annotated[
        Literal["standard", "apgd", "none"],
        Field(description="AutoAttack: standard, only its two APGD attacks, or none"),
    ] = "standard"
    judge: Annotated[
        Literal["pyautoattack", "engine"],
        Field(
            description="AutoAttack by its authors' package, or by the engine's own form of the "
            "same attacks (docs/autoattack.md); networks of two or three classes: always the "
            "engine's"
        ),
    ] = "pyautoattack"
    precision: Annotated[
        EvaluationPrecision,
        Field(
            description="arithmetic of the attacks' passes; in bf16 an adversary counts only if "
            "the float32 network falls for it, and judge must be engine"
        ),
    ] = "fp32"
    batch_size: Annotated[int, Field(ge=1, description="evaluation batch [images]")] = 500


@dataclass(frozen=True)
class Log:
    to: Annotated[
        tuple[LoggerName, ...],
        Field(
            description="loggers of the epochs' rows beside metrics.jsonl: tensorboard, wandb, "
            "mlflow; on the command line with commas between, or none"
        ),
    ] = ("tensorboard",)


@dataclass(frozen=True)
class Recipe:
    """Hold all settings of a run."""

    name: str = "unnamed"
    seed: Annotated[int, Field(ge=0, lt=1 << 31, description="seed of everything random")] = 0
    threads: Annotated[
        int | None,
        Field(ge=1, le=1024, description="CPU threads; left out: torch's own choice [count]"),
    ] = None
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    threat: ThreatModel = field(default_factory=ThreatModel)
    attack: Attack = field(default_factory=Attack)
    objective: AnyObjective = field(default_factory=LocalBall)
    weights: Weights = field(default_factory=Weights)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    step: StepOptions = field(default_factory=StepOptions)
    validation: Validation = field(default_factory=Validation)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    evaluation: Evaluation = field(default_factory=Evaluation)
    log: Log = field(default_factory=Log)

    def passes(self) -> Passes:
        """Return the passes of one step; with perturbed weights the loss is computed twice."""
        passes = self.objective.passes(self.attack)
        return passes + self.objective.loss_passes() if self.weights.perturb else passes

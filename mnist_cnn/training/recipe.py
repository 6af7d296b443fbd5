"""Training recipes, and the configuration that selects and adjusts one.

The README of this room has the measurements behind the presets.
"""

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from mnist_cnn.device import Precision

Preset = Literal["quick", "standard", "best"]


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """Hyperparameters of training; each preset is a recipe."""

    epochs: float = Field(
        gt=0, le=1000, description="Images shown, in multiples of the training images."
    )
    hard_share: float = Field(
        gt=0,
        le=1,
        description="Share of the images that later epochs show, several times each: those whose "
        "loss was largest when they were last shown. The first epoch shows all.",
    )
    batch_size: int = Field(ge=1, le=65536, description="Images a step.")
    norm_group: int = Field(ge=2, description="Images that share batch normalisation's statistics.")
    channels: tuple[int, int, int, int] = Field(
        description="Filters of the four convolutions, in their order."
    )
    filter_rate: float = Field(gt=0, le=10, description="Peak learning rate of filters.")
    momentum: float = Field(ge=0, lt=1, description="Momentum of filters.")
    learning_rate: float = Field(gt=0, le=10, description="Peak learning rate of all else.")
    weight_decay: float = Field(ge=0, le=1, description="AdamW's, of all but filters.")
    warmup: float = Field(ge=0, lt=1, description="Share of the steps with a rising rate.")
    label_smoothing: float = Field(ge=0, lt=1, description="Share of the target spread evenly.")
    shift: int = Field(ge=0, le=4, description="Most shift of an image each way, pixels.")
    degrees: float = Field(ge=0, le=45, description="Most rotation of an image each way, degrees.")
    stretch: float = Field(
        ge=0, le=0.5, description="Most shear and stretch of an image, share of its size."
    )
    blur_every: int = Field(ge=0, description="One of this many images is blurred; 0: none.")


# Chosen on the last 10,000 of MNIST's training images, never on its test split.
_STANDARD = Recipe(
    epochs=2,
    hard_share=0.2,
    batch_size=256,
    norm_group=256,
    channels=(16, 32, 64, 64),
    filter_rate=0.1,
    momentum=0.6,
    learning_rate=0.01,
    weight_decay=0.01,
    warmup=0.2,
    label_smoothing=0.1,
    shift=1,
    degrees=5,
    stretch=0.05,
    blur_every=16,
)
RECIPES: dict[Preset, Recipe] = {
    "quick": _STANDARD.model_copy(update={"epochs": 0.5, "degrees": 0, "stretch": 0}),
    "standard": _STANDARD,
    "best": _STANDARD.model_copy(
        update={
            "epochs": 4,
            "channels": (32, 64, 64, 128),
            "degrees": 10,
            "stretch": 0.1,
        }
    ),
}


PROCEDURE = (
    "Cross entropy with label smoothing; filters by orthogonalised momentum (Muon), everything "
    "else by AdamW; the rates rise linearly, then fall linearly to zero; the first epoch shows "
    "every image, later ones several times those whose loss was largest; images are shifted, "
    "some are blurred, and, except with the preset `quick`, they are turned and stretched, afresh "
    "each time."
)
"""Description of training for the model card, true of every preset; the numbers are in a recipe."""


class TrainingConfig(BaseModel, frozen=True, extra="forbid"):
    """Configuration of training. The defaults are production's; an empty field is the preset's."""

    preset: Preset = Field(
        "standard",
        description="quick: for a trial, in seconds; standard: for every week; best: the highest "
        "accuracy, in several times the time.",
    )
    epochs: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Images shown, in multiples of the training images; empty: the preset's.",
    )
    batch_size: int | None = Field(
        None, ge=2, le=65536, description="Images a step; empty: the preset's."
    )
    learning_rate: float | None = Field(
        None, gt=0, le=10, description="Peak rate of all but filters; empty: the preset's."
    )
    min_steps: int = Field(
        100,
        ge=0,
        le=1_000_000,
        description="Least number of optimizer steps; a small data set is shown in more epochs to "
        "reach it.",
    )
    seed: int = Field(
        0, ge=0, lt=2**40, description="The same seed on the same machine gives the same weights."
    )
    validation_share: float = Field(
        0.0, ge=0, le=0.5, description="Share of the training images held out for validation."
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Epochs without a better validation accuracy after which training stops; "
        "empty: never. Needs a validation share.",
    )
    time_budget_seconds: float | None = Field(
        None,
        gt=0,
        description="Longest training time. When it is spent, training ends with the model it has; "
        "empty: no limit.",
    )
    precision: Precision = Field(
        "auto", description="Number format of convolutions; auto: bf16 where the hardware has it."
    )
    deterministic: bool = Field(
        default=True,
        description="On a GPU: bitwise the same weights for the same seed, at the cost of speed. A "
        "CPU gives the same weights anyway.",
    )
    compile: Literal["auto", "never", "always"] = Field(
        "auto",
        description="Use of torch.compile, during warm-up; auto: on cuda alone. A CPU needs a C++ "
        "compiler for it, and compiling takes longer than it saves.",
    )
    checkpoint_every_steps: int = Field(
        100, ge=1, description="Steps between checkpoints, where a store is given."
    )
    micro_batch: int | None = Field(
        None,
        ge=2,
        description="Images on the device at a time; their gradients are accumulated. Empty: by "
        "the device.",
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.patience is not None and not self.validation_share:
            raise ValueError(
                f"patience is {self.patience} but validation_share is 0, so there is nothing to "
                "wait for; set validation_share, for example to 0.1"
            )
        return self

    def recipe(self) -> Recipe:
        """Return the preset's recipe with the fields that are set here."""
        knobs = ("epochs", "batch_size", "learning_rate")
        given = {knob: getattr(self, knob) for knob in knobs if getattr(self, knob) is not None}
        preset = RECIPES[self.preset]
        batch = given.get("batch_size", preset.batch_size)
        # A batch that the preset's groups do not divide is one group.
        group = preset.norm_group if batch % preset.norm_group == 0 else batch
        return preset.model_copy(update={**given, "norm_group": group})

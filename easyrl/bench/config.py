"""The flags that every benchmark has."""

import dataclasses
from pathlib import Path

from easyrl.bench.shapes import shape
from easyrl.core.config import flag
from easyrl.core.dtypes import DTYPES
from easyrl.core.files import check_folder, check_writable
from easyrl.models.llama import LlamaConfig


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """How a benchmark computes, how often, and where its figures go."""

    dtype: str = flag("fp32", "Format of activations and of frozen models.", choices=tuple(DTYPES))
    json: str = flag("", "File for the figures. Empty: the table on the screen only.")

    def __post_init__(self) -> None:
        if self.json:
            check_writable(self.json, "--json")


@dataclasses.dataclass(frozen=True)
class ModelBenchConfig(BenchConfig):
    """A benchmark that runs a model."""

    model: str = flag("34m", "Shape of the models: debug, 34m, 270m, 1b, 3b or 8b. Weights are random.")
    layers: int = flag(0, "Layers of the models. 0: as many as the shape has.", least=0)
    mesh_dim: str = flag("1,-1,1", "Sizes of the mesh axes dp,fsdp,mp.")
    micro_batch_size: int = flag(
        0,
        "Packed rows that go through a model at once; a multiple of dp x fsdp. 0: enough for 1,024 tokens a device.",
        least=0,
    )
    warmup: int = flag(2, "Laps that are not counted, compilation among them.", least=1)
    repeats: int = flag(5, "Laps that are counted.", least=1)
    profile: str = flag("", "Folder for a trace of one more lap, which XProf and Perfetto open. Empty: none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile:
            check_folder(Path(self.profile).expanduser(), f"--profile={self.profile}")

    @property
    def cfg(self) -> LlamaConfig:
        """The model's configuration."""
        layers = {"num_layers": self.layers} if self.layers else {}
        return shape(self.model, dtype=DTYPES[self.dtype], **layers)


@dataclasses.dataclass(frozen=True)
class TrainingBenchConfig(ModelBenchConfig):
    """A benchmark that trains a model."""

    param_dtype: str = flag("fp32", "Format of the weights in training.", choices=tuple(DTYPES))
    remat: str = flag("none", "What the backward pass recomputes.", choices=("none", "dots", "full"))

    @property
    def cfg(self) -> LlamaConfig:
        return dataclasses.replace(super().cfg, remat=self.remat)

# SPDX-License-Identifier: Apache-2.0
"""One model for the ds_config block, a JSON file and keyword arguments (docs/configuration.md).

Each field's description is its documentation; `LayerwiseConfig.model_json_schema()` exports them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from layerwise_dist.config.parts import (
    CommitConfig,
    IntervalConfig,
    PreemptionConfig,
    ReaderConfig,
    Strict,
    TelemetryConfig,
    WriterConfig,
)
from layerwise_dist.errors import ConfigError

BLOCK = "layerwise_checkpoint"


class LayerwiseConfig(Strict):
    enabled: bool = Field(True, description="false: attach() hooks nothing and every call is a no-op.")
    dir: str = Field("checkpoints", min_length=1, description="Directory of the checkpoints; ~ is expanded.")
    every_n_steps: int | Literal["auto"] | None = Field(
        1,
        json_schema_extra={"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}, {"type": "null"}]},
        description="Save each step that is a multiple of this; auto: of a number chosen from what checkpoints cost "
        "(`interval`); null: only when asked.",
    )
    interval: IntervalConfig = Field(default_factory=IntervalConfig)
    save_last: bool = Field(
        True,
        description="Also save the last step of a loop over steps() and the step that close() ends, even if "
        "they are no multiples of every_n_steps.",
    )
    keep_last: int = Field(
        2,
        ge=1,
        description="How many of the lineage's newest commits to keep.",
    )
    keep_every_n_steps: int | None = Field(
        None,
        ge=1,
        description="Commits at multiples of this step are never removed.",
    )
    keep_tags: int | None = Field(
        None,
        ge=1,
        description="Among tags that differ only in their digits (global_step100, global_step200), how many of the "
        "newest to keep; null: all. Other tags are kept.",
    )
    mode: Literal["direct", "monitor", "mock"] = Field(
        "direct",
        description="direct: this process writes; monitor: a separate process writes, and finishes what all "
        "ranks have staged even if the training is killed; mock: everything but the writing, "
        "which is counted (no directory).",
    )
    update: Literal["auto", "whole", "pipelined_step", "in_backward"] = Field(
        "auto",
        description="whole: the optimizer steps as it does alone; pipelined_step: a saved step goes layer by "
        "layer; in_backward: each layer is updated during the backward, where that is exact; "
        "auto: whole.",
    )
    capture: Literal["auto", "lease", "stage"] = Field(
        "auto",
        description="lease: tensors are read in place until the next update; stage: they are copied right "
        "after the update; auto: lease for host memory, stage for device memory.",
    )
    replicas: Literal["together", "apart"] = Field(
        "together",
        description="together: what a wrapper keeps equal on several ranks is written once and checked for "
        "equality; apart: each rank writes all that it holds, for replicas that are meant to "
        "differ.",
    )
    replica_drift: Literal["raise", "warn", "off"] = Field(
        "raise",
        description="Whether what a wrapper keeps equal on several ranks still is: each checkpoint compares the next "
        "hundredth. Where parameters differ, raise: all ranks stop, and that checkpoint is not committed; warn: one "
        "warning, counted in stats(), and it is; off: nothing is compared after the first checkpoint.",
    )
    max_in_flight: int = Field(
        2,
        ge=1,
        le=64,
        description="Checkpoints in flight: begun and not yet decided.",
    )
    when_full: Literal["wait", "skip"] = Field(
        "wait",
        description="When max_in_flight checkpoints are undecided. wait: the update waits for a decision; "
        "skip: this step has no checkpoint.",
    )
    pool_mb: Literal["auto"] | int = Field(
        "auto",
        description="Memory for bounce buffers, evacuation and staging, in MiB, 8 or more; auto: chosen and "
        "logged at the first checkpoint.",
    )
    hash: bool = Field(
        True,
        description="false: data is written without hashes, so damage to it cannot be found.",
    )
    fence_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Longest time an update waits for its tensors to be written, in seconds.",
    )
    audit: Literal["auto", "always"] = Field(
        "auto",
        description="Read leased memory again and compare. auto: all of it in the first three checkpoints, "
        "then a hundredth in each; always: all of it in each.",
    )
    writer: WriterConfig = Field(default_factory=WriterConfig)
    reader: ReaderConfig = Field(default_factory=ReaderConfig)
    commit: CommitConfig = Field(default_factory=CommitConfig)
    preemption: PreemptionConfig = Field(default_factory=PreemptionConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    file_mode: str = Field(
        "0600",
        description="Mode of the files, in octal; directories get the search bits added.",
    )

    @field_validator("dir", mode="wrap")
    @classmethod
    def _any_path(cls, value: Any, check: Callable[[Any], str]) -> str:
        # As os.fsdecode() gives a path that is not UTF-8, which pydantic does not take for text.
        return value if type(value) is str and not value.isascii() and "\0" not in value else check(value)

    @field_validator("every_n_steps", mode="before")
    @classmethod
    def _every(cls, value: Any) -> Any:
        if value is not None and value != "auto" and (type(value) is not int or value < 1):
            raise ValueError("must be an integer greater than or equal to 1, 'auto' or null")
        return value

    @field_validator("pool_mb", mode="before")
    @classmethod
    def _pool(cls, value: Any) -> Any:
        # In one place, since the errors of a union name every branch of it.
        if value != "auto" and (type(value) is not int or value < 8):
            raise ValueError("must be 'auto' or a whole number of MiB, 8 or more")
        return value

    @field_validator("file_mode")
    @classmethod
    def _octal(cls, value: str) -> str:
        if len(value) != 4 or value[0] != "0" or any(digit not in "01234567" for digit in value):
            raise ValueError("must be four octal digits such as '0600' or '0640'")
        if int(value, 8) & 0o600 != 0o600:
            raise ValueError("the owner must be able to read and write: at least '0600'")
        return value

    @model_validator(mode="after")
    def _room(self) -> LayerwiseConfig:
        if self.pool_mb != "auto" and self.pool_mb << 20 < self.bounce_bytes:
            raise ValueError(
                f"pool_mb = {self.pool_mb}: the writer alone takes writer.queue_depth x writer.block_kb = "
                f"{self.bounce_bytes >> 10} KiB of the pool"
            )
        return self

    @model_validator(mode="after")
    def _monitored(self) -> LayerwiseConfig:
        if self.mode != "monitor":
            return self
        if self.capture == "lease":
            raise ValueError(
                "capture = 'lease' with mode 'monitor': another process cannot read a tensor in place, and what it "
                "has must outlive this one; use 'auto' or 'stage', or mode 'direct'"
            )
        if self.commit.transport == "mpi":
            raise ValueError(
                "commit.transport = 'mpi' with mode 'monitor': monitors are not processes of mpirun's; use 'auto' or "
                "'store' with torch.distributed initialized, or mode 'direct'"
            )
        if self.writer.backend == "nvm":
            raise ValueError(
                "writer.backend = 'nvm' with mode 'monitor': handing data to another process costs as much as "
                "writing it to persistent memory; use mode 'direct', or another backend"
            )
        return self

    @model_validator(mode="after")
    def _events_somewhere(self) -> LayerwiseConfig:
        events = self.telemetry.events
        if self.mode == "mock" and events is not None and not os.path.isabs(events):
            raise ValueError(
                f"telemetry.events = {events!r} with mode 'mock', which makes no directory: give an absolute path"
            )
        return self

    @property
    def captured_by(self) -> Literal["auto", "lease", "stage"]:
        """`capture`; "stage" where another process writes."""
        return "stage" if self.mode == "monitor" else self.capture

    @property
    def bounce_bytes(self) -> int:
        """What the writer takes of the pool for itself."""
        return self.writer.queue_depth * self.writer.block_kb << 10

    @property
    def file_bits(self) -> int:
        return int(self.file_mode, 8)

    @property
    def dir_bits(self) -> int:
        """The file mode with a search bit wherever there is a read bit: 0600 gives 0700."""
        bits = self.file_bits
        return bits | ((bits & 0o444) >> 2)

    @property
    def path(self) -> str:
        return os.path.abspath(os.path.expanduser(self.dir))


_PARTS: dict[str, type[BaseModel]] = {
    "interval": IntervalConfig, "writer": WriterConfig, "reader": ReaderConfig, "commit": CommitConfig,
    "preemption": PreemptionConfig, "telemetry": TelemetryConfig,
}  # fmt: skip


def load_config(
    source: LayerwiseConfig | Mapping[str, Any] | str | os.PathLike[str] | None, **overrides: Any
) -> LayerwiseConfig:
    """Builds the configuration from a mapping, a JSON file or nothing, with keyword arguments on top.

    A mapping or file that has a ``layerwise_checkpoint`` block (as a ds_config has) is read from that block.
    Raises ConfigError naming each bad key, its value and what is allowed.
    """
    where = "config"
    if source is None:
        data: dict[str, Any] = {}
    elif isinstance(source, LayerwiseConfig):
        data = source.model_dump(exclude_unset=True)
    elif isinstance(source, Mapping):
        data = dict(source)
    elif isinstance(source, (str, os.PathLike)):
        where = str(source)
        data = _read_json(Path(source))
    else:
        raise ConfigError(f"config must be a mapping, a path of a JSON file or None, not {type(source).__name__}")
    if BLOCK in data:
        where, data = f"{where}[{BLOCK!r}]", data[BLOCK]
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: expected an object, found {type(data).__name__}")
    try:
        return LayerwiseConfig.model_validate({**data, **overrides})
    except ValidationError as error:
        raise ConfigError(_explain(where, error)) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"config file {path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path}: expected an object, found {type(data).__name__}")
    return data


def _explain(where: str, error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            model: type[BaseModel] = LayerwiseConfig
            for part in item["loc"][:-1]:
                model = _PARTS[str(part)]
            lines.append(f"{where}: unknown key {key!r}; known are {', '.join(sorted(model.model_fields))}")
        elif not key:  # of the whole; the message names the keys
            lines.append(f"{where}: {item['msg']}")
        else:
            lines.append(f"{where}: {key} = {item['input']!r}: {item['msg']}")
    return "\n".join(lines)

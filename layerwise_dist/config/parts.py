# SPDX-License-Identifier: Apache-2.0
"""The objects within the block of keys. Each field's description is its documentation."""

from __future__ import annotations

import os
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WriterConfig(Strict):
    backend: Literal["auto", "uring", "posix", "nvm"] = Field(
        "auto",
        description="uring: io_uring; posix: pwrite threads; nvm: mapped persistent memory (a file system "
        "mounted with -o dax); auto: uring where the system allows it, else posix. Asking for "
        "uring or nvm where it is refused is a ConfigError.",
    )
    queue_depth: int = Field(
        4,
        ge=1,
        le=64,
        description="Writes in flight at once on this rank.",
    )
    block_kb: int = Field(
        1024,
        ge=4,
        le=65536,
        multiple_of=4,
        description="Largest write, and the unit of hashing, in KiB.",
    )
    recycle: Literal["auto", True, False] = Field(
        "auto",
        description="Overwrite files of retired checkpoints; auto: except on network file systems.",
    )
    huge_pages: Literal["auto", "off"] = Field(
        "auto",
        description="auto: back leased memory with huge pages, which makes direct I/O cheaper, unless the "
        "system says never; off: leave memory as it is.",
    )
    direct_io: Literal["auto", "off"] = Field(
        "auto",
        description="auto: O_DIRECT where the file system supports it; off: through the page cache.",
    )

    @model_validator(mode="after")
    def _possible(self) -> WriterConfig:
        if self.backend == "nvm" and self.direct_io == "off":
            raise ValueError("backend 'nvm' has no page cache to go through: direct_io must be 'auto' with it")
        return self


class ReaderConfig(Strict):
    direct_io: Literal["auto", "off"] = Field(
        "auto",
        description="How a restore reads a file. auto: out of the page cache where that holds most of it, else with "
        "O_DIRECT where the file system supports it; off: always through the page cache, with the kernel's read-ahead.",
    )


class CommitConfig(Strict):
    transport: Literal["auto", "store", "mpi"] = Field(
        "auto",
        description="How ranks exchange messages. store: TCP connections, found over torch.distributed; mpi: "
        "a separate MPI communicator; auto: store where torch.distributed is initialized, else "
        "mpi under mpirun.",
    )
    timeout_s: float = Field(
        300.0,
        gt=0,
        description="Deadline of every wait for another rank, in seconds.",
    )
    on_failure: Literal["warn", "raise"] = Field(
        "warn",
        description="warn: a failed checkpoint is logged and training continues; raise: all ranks raise.",
    )
    raise_after: int = Field(
        5,
        ge=1,
        description="With warn: raise anyway after this many failures in a row.",
    )


class PreemptionConfig(Strict):
    enabled: bool = Field(
        False,
        description="On SIGTERM of any rank, all ranks commit one common step and leave; false: SIGTERM keeps "
        "its meaning.",
    )
    grace_s: float = Field(
        25.0,
        gt=0,
        description="The process leaves within this many seconds of the signal, whatever happens.",
    )
    exit_code: int = Field(
        143,
        ge=0,
        le=255,
        description="Exit code of a process that leaves this way; 143 is SIGTERM's.",
    )


class TelemetryConfig(Strict):
    events: str | None = Field(
        None,
        description="File for events, one JSON object a line (docs/telemetry.md): a file name in dir or an absolute "
        "path, ending in .jsonl. Other ranks add their number: events.00001.jsonl.",
    )
    tensorboard: str | None = Field(
        None,
        min_length=1,
        description="Directory for TensorBoard, where rank 0 writes scalars; ~ is expanded. Needs the package "
        "tensorboard.",
    )
    prometheus_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="TCP port on which rank 0 serves metrics to Prometheus. Needs the package prometheus-client.",
    )
    prometheus_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address that this port listens on; 0.0.0.0: every address of the machine.",
    )

    @field_validator("events")
    @classmethod
    def _lines(cls, value: str | None) -> str | None:
        if value is not None and re.search(r"(\A|/)\.jsonl\Z|\.[0-9]{5}\.jsonl\Z", value):
            raise ValueError("must have a name before .jsonl, and no number of a rank there (.00001.jsonl)")
        plain = value is None or ("\0" not in value and (os.path.isabs(value) or os.sep not in value))
        if value is None or (plain and value.endswith(".jsonl")):
            return value
        raise ValueError("must be a file name, or an absolute path, that ends in .jsonl")

    @property
    def on(self) -> bool:
        return self.events is not None or self.tensorboard is not None or self.prometheus_port is not None


class IntervalConfig(Strict):
    max_overhead: float | None = Field(
        None,
        gt=0,
        le=1,
        description="With every_n_steps 'auto': what checkpoints may cost, as a share of training without them. null: "
        "0.02, or with mtbf_s no limit.",
    )
    mtbf_s: float | None = Field(
        None,
        gt=0,
        description="With 'auto': mean seconds between failures of the whole job. Limits how often "
        "checkpoints are made, by Young's and Daly's rule.",
    )
    min_steps: int = Field(1, ge=1, description="With 'auto': the smallest interval, in steps.")
    max_steps: int | None = Field(None, ge=1, description="With 'auto': the largest interval, whatever that costs.")

    @model_validator(mode="after")
    def _ordered(self) -> IntervalConfig:
        if self.max_steps is not None and self.max_steps < self.min_steps:
            raise ValueError(f"max_steps = {self.max_steps} is less than min_steps = {self.min_steps}")
        return self

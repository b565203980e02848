"""Every setting of the service, from ``CHUNKPLAN_*`` variables or a TOML file
(``CHUNKPLAN_SETTINGS_FILE``).
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from chunkplan.engine.errors import InputError

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30

AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
Seconds = Annotated[float, Field(gt=0)]
Positive = Annotated[int, Field(gt=0)]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Quota(BaseModel):
    """How much of a server one project, and one key of it, may take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_open_jobs: Positive = 10_000
    """Jobs that have not ended."""
    max_stored_bytes: Positive = 100 * GIBIBYTE
    """Uploads together."""
    max_streams: Positive = 200
    """Event streams that are open at the same time."""
    max_plans_at_once: Positive = 4
    """Requests that may be with the planner at the same time."""
    max_waiting_plans: Annotated[int, Field(ge=0)] = 100
    """Further ones that may wait for that."""
    requests_per_second: Annotated[float, Field(gt=0)] = 200.0
    """Requests of one key per second, in the long run."""
    requests_burst: Positive = 400
    """Requests of one key at once."""


class DeviceSetting(BaseModel):
    """One device that jobs may run on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^(cpu(:\d{1,4})?|cuda:\d{1,4})$")]
    """``cuda:N`` by the number that the driver's tool shows, ``cpu``, or ``cpu:N`` for a part of the
    processor."""
    gpu: str | None = None
    """A name in the catalog, where the driver does not tell what it is."""
    memory_bytes: Positive | None = None
    """Use at most this much of it."""
    max_jobs: Positive | None = None
    """Jobs of this device, instead of ``max_jobs_per_device``."""


class Settings(BaseSettings):
    """Settings of one server process."""

    model_config = SettingsConfigDict(
        env_prefix="CHUNKPLAN_", env_nested_delimiter="__", frozen=True, extra="forbid", validate_default=True
    )

    data_dir: AbsolutePath = Path("var")
    """Everything that the service writes: database, uploads, runs, locks."""
    database_url: str = Field(default_factory=lambda data: f"sqlite:///{data['data_dir'] / 'chunkplan.db'}")
    """``sqlite:///PATH`` or ``postgresql://…``."""
    database_timeout_seconds: Seconds = 15.0
    """How long anything waits for a lock or a connection before it fails, and Postgres for a server that has
    stopped in the middle of a unit of work before it undoes it."""
    models_dir: AbsolutePath = Field(default_factory=lambda data: data["data_dir"] / "models")
    """A catalog id resolves to the folder of that name in here when a job trains it."""
    model_roots: list[AbsolutePath] = [Path()]
    """Model folders given by path must lie below one of these (``models_dir`` is always allowed)."""
    dataset_roots: list[AbsolutePath] = [Path()]
    """Datasets given by path must lie below one of these (``data_dir`` is always allowed)."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8321
    """0 takes a free port."""
    trusted_network: bool = False
    """Allows a host other than loopback before there are API keys: only where the network itself is closed,
    such as in a container whose port is published on the host's loopback."""
    allowed_hosts: list[str] = []
    """Names besides ``localhost`` under which browsers and programs may ask without a key."""
    log_format: str = Field("console", pattern="^(console|json)$")

    max_body_bytes: Annotated[int, Field(gt=0)] = 2 * MEBIBYTE
    max_upload_bytes: Annotated[int, Field(gt=0)] = 4 * GIBIBYTE
    max_json_depth: Annotated[int, Field(gt=0)] = 64
    max_timeline_points: Annotated[int, Field(gt=0)] = 5_000

    plan_timeout_seconds: Seconds = 120.0
    """A plan that takes longer is abandoned and its worker process replaced."""
    plan_queue_seconds: Seconds = 60.0
    """How long a request waits for the planner before it is told to come back."""
    plan_memory_bytes: Annotated[int, Field(ge=512 * MEBIBYTE)] = 4 * GIBIBYTE
    """Data that one process of the planner may hold, torch's 350 MB among them."""
    plan_processes: Annotated[int, Field(ge=1, le=64)] = Field(default_factory=lambda: min(os.cpu_count() or 1, 4))
    """Plans that are computed at the same time; each process takes about 400 MB while it is warm."""
    max_plans_at_once: Positive = 8
    """Requests of all projects that may hold a thread for a plan; others wait without one."""

    quota: Quota = Quota()
    """Quota of every project that is not named in ``project_quotas``."""
    project_quotas: dict[str, Quota] = {}
    """By project; what is left out is taken from ``quota``."""

    refusals_per_second: Annotated[float, Field(gt=0)] = 5.0
    """Requests without a valid key that one address is told about, in the long run; further ones are told to
    wait."""
    refusals_burst: Positive = 100
    """Refusals of one address at once."""

    devices: list[DeviceSetting] = []
    """What jobs may run on; by default every accelerator that the driver shows, and the processor."""
    max_jobs_per_device: Positive = 1
    """How many jobs may share a device, as far as their plans' upper bounds fit together. Sharing slows them.
    """
    priority_point_seconds: Annotated[float, Field(gt=0, le=30 * 86_400)] = 3600.0
    """For which a job must have waited longer to come before one whose priority is a point higher."""

    max_attempts: Annotated[int, Field(ge=1)] = 3
    """Failed attempts in a row, none of which got past the checkpoint it started from, that end a job."""
    lease_seconds: Seconds = 30.0
    stop_grace_seconds: Seconds = 120.0
    """Between the request to stop and the kill."""
    retry_delay_seconds: Seconds = 5.0
    """Before a requeued job is tried again."""
    min_free_bytes: Annotated[int, Field(ge=0)] = GIBIBYTE
    """No job is started while the disk of ``data_dir`` has less than this left."""
    poll_seconds: Seconds = 0.25
    """How often the supervisor looks after its attempts, and streams after new events."""

    samples_retention_days: Annotated[int, Field(ge=1)] = 30
    """Raw profile samples of jobs that have ended, and step events, are deleted after this; what was added up
    stays."""
    idempotency_retention_hours: Annotated[int, Field(ge=1)] = 24
    prune_every_seconds: Seconds = 3600.0
    """How often the service deletes what is past its retention."""
    prune_batch_rows: Annotated[int, Field(ge=1, le=10_000)] = 2_000
    """How many rows of it are deleted in one unit of work."""

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, url: str) -> str:
        if not url.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://", "postgres://")):
            raise ValueError("should be sqlite:///PATH or postgresql://USER@HOST/NAME")
        return url

    @field_validator("devices")
    @classmethod
    def _no_device_twice(cls, devices: list[DeviceSetting]) -> list[DeviceSetting]:
        names = [device.name for device in devices]
        if len(set(names)) < len(names):
            raise ValueError("every device should be named once")
        if "cpu" in names and any(name.startswith("cpu:") for name in names):
            raise ValueError("name the processor as a whole, or its parts cpu:0, cpu:1, …, not both")
        return devices

    @field_validator("project_quotas", mode="before")
    @classmethod
    def _quotas_start_from_the_common_one(cls, given: Any, info: ValidationInfo) -> Any:
        common = info.data.get("quota")
        if not isinstance(given, dict) or not isinstance(common, Quota):
            return given
        start = common.model_dump()
        return {name: start | quota if isinstance(quota, dict) else quota for name, quota in given.items()}

    @property
    def requires_keys(self) -> bool:
        """Whether every request needs a key, also while there is none."""
        return not _is_loopback(self.host) and not self.trusted_network

    def quota_of(self, project: str) -> Quota:
        """How much a project may take."""
        return self.project_quotas.get(project, self.quota)

    @property
    def runs_dir(self) -> Path:
        """One folder per job."""
        return self.data_dir / "jobs"

    @property
    def files_dir(self) -> Path:
        """Uploads."""
        return self.data_dir / "files"

    @property
    def locks_dir(self) -> Path:
        """Device locks."""
        return self.data_dir / "locks"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments win over the environment, the environment over the file.

        Raises:
            InputError: the file cannot be read.
        """
        given = os.environ.get("CHUNKPLAN_SETTINGS_FILE")
        if not given:
            return init_settings, env_settings
        try:
            Path(given).read_bytes()
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Path(given))
        except (OSError, ValueError) as error:
            raise InputError("settings_file", f"cannot read {given}: {error}") from error

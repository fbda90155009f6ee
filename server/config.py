"""The server's settings: defaults < YAML file < RETRIEVAL_* environment < flags.

Owns names, units, reasons and ranges of every key (`--help` prints the docstrings below; `configs/default.yaml`
repeats them and a test holds both together). Knows nothing of what the values do.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from server.engine.config import EngineConfig

ENV_PREFIX = "RETRIEVAL_"
DEMO_MODEL = Path(__file__).parent / "demo_model"
DEMO_NAME = "demo"


def _split(value: object) -> object:
    """Accepts `a,b` (environment, flags) beside real lists (YAML); several flags add up."""
    if value is None:
        return []
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    return [word for part in parts for word in (part.split(",") if isinstance(part, str) else [part]) if word != ""]


def _existing_file(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise ValueError(f"no such file: {path}")
    return path


Words = Annotated[list[str], NoDecode, BeforeValidator(_split)]
Secrets = Annotated[list[SecretStr], NoDecode, BeforeValidator(_split)]
ExistingFile = Annotated[Path | None, AfterValidator(_existing_file)]


class Settings(BaseSettings):
    """Everything that can be configured; unknown keys are errors."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        cli_prog_name="retrieval-server serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_show_env_vars=True,
        cli_parse_none_str="none",
    )

    # HTTP
    host: str = "127.0.0.1"
    """Address to listen on. Only this machine by default: there is no key unless --api-key is given."""
    port: int = Field(8000, ge=0, le=65535)
    """TCP port to listen on; 0 takes a free one. vLLM's default."""
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = "info"
    """Log level of the HTTP server; it logs paths and status codes, never prompts."""
    served_model_name: Words = Field(default_factory=list)
    """Names clients may use for the model (repeat the flag or separate by commas); the first one is reported.
    Default: --model as given, or `demo` for the bundled model."""
    api_key: Secrets = Field(default_factory=list)
    """Keys accepted as `Authorization: Bearer KEY` (repeat the flag or separate by commas); none: open to all.
    /health stays open."""
    open_metrics: bool = False
    """Let /metrics be read without a key, for a Prometheus that has none."""
    max_concurrency_per_key: int = Field(0, ge=0)
    """Generations one API key may have running or waiting at once; one more gets 429. 0: no limit, as without keys."""
    request_timeout: float = Field(0.0, ge=0)
    """Seconds a request may take from arrival to its last token; 0: no limit, since a cold 1M prompt takes long."""
    drain_timeout: float = Field(30.0, ge=0)
    """Seconds running streams get to finish after SIGTERM; the rest end with an error event. Kubernetes' grace."""
    sse_keepalive_seconds: float = Field(5.0, gt=0)
    """Seconds of silence after which a stream sends an SSE comment; proxies cut silent streams after 30 to 60."""
    max_body_bytes: ByteSize = Field(ByteSize(64 * 2**20), gt=0)
    """Largest request body read, as bytes or with a unit (64MiB); a million tokens are about 5 MB of text."""
    cors_allow_origins: Words = Field(default_factory=list)
    """Browser origins that may call the API (repeat or separate by commas, `*` for all); none: CORS is off."""
    ssl_keyfile: ExistingFile = None
    """File of the TLS private key; with --ssl-certfile the server speaks HTTPS."""
    ssl_certfile: ExistingFile = None
    """File of the TLS certificate chain."""
    chat_template: ExistingFile = None
    """File of a Jinja chat template used instead of the model's own."""
    tool_call_parser: Literal["auto", "hermes", "llama3_json"] = "auto"
    """How the model writes tool calls; auto: as its chat template does, else in Hermes' tags."""
    reasoning_parser: Literal["auto", "think", "none"] = "auto"
    """Whether text in <think> tags is reasoning_content; auto: if the chat template knows these tags."""

    # Model
    model: str | None = None
    """Folder or hub name of the model; none: the small bundled one, served as `demo`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of weights and activations; auto: as the checkpoint has them."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu, cuda or cuda:N; auto: a GPU when there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint; off, since that is somebody else's code."""
    enforce_eager: bool = False
    """Run transformers' own forward even for model families that the fused one knows; slower, for comparison."""
    seed: int = Field(0, ge=0)
    """Seed of everything random in the engine that no request seeds itself."""

    # Scheduling
    max_model_len: int | None = Field(None, ge=1)
    """Tokens of prompt and answer together; none: what the model was made for (max_position_embeddings)."""
    max_num_seqs: int = Field(16, ge=1)
    """Sequences generated at once; more share a step's weights but add to its latency."""
    max_num_batched_tokens: int = Field(2048, ge=1)
    """Tokens of one step: every running sequence's next one and one chunk of a prefill."""
    max_queue_len: int = Field(256, ge=0)
    """Requests that may wait; one more gets 429, which clients retry, instead of waiting without end."""
    max_queued_tokens: int | None = Field(None, ge=1)
    """Prompt tokens that may wait in all; none: no limit."""
    step_time_budget_ms: int = Field(100, ge=0)
    """Milliseconds a step may take while others decode; prefill chunks are cut to fit. 0: no budget."""

    # Attention
    attention: Literal["retrieval", "full", "streaming", "snapkv"] = "retrieval"
    """Which keys a decode step attends to: retrieval (sink, window and an index's hits), full (all of them),
    streaming (sink and window: StreamingLLM), snapkv (those the end of the prompt looked at)."""
    index: Literal["auto", "flat", "ivf", "pq", "hnsw", "roar", "rabitq"] = "auto"
    """Kind of index over the keys; auto: the best this machine has."""
    index_options: dict[str, Any] = Field(default_factory=dict)
    """Options of that kind as a JSON object, such as {"ef_search": 256}."""
    num_sink_tokens: int = Field(128, ge=0)
    """Tokens at the start that are always attended exactly; RetrievalAttention's figure."""
    window_size: int = Field(512, ge=1)
    """Newest tokens that are always attended exactly; RetrievalAttention's figure."""
    num_retrieved: int = Field(0, ge=0)
    """Keys fetched per head and query from the index; 0: as many as matter (rabitq tells by its bounds), 256 for
    the other kinds. More is slower and closer to full attention."""
    seal_tokens: int = Field(2048, ge=1)
    """Tokens by which the newest part may outgrow the window before its old end is sealed and indexed."""
    num_index_queries: int = Field(8192, ge=1)
    """Prefill queries sampled per layer and KV head for kinds that learn from them."""
    live_recall_interval: int = Field(64, ge=0)
    """Decode steps between two exact checks of one random head, exported as live recall; more where checks would take
    more than a hundredth of a thread's time. 0: off."""

    # Memory
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """Type of stored keys and values; auto: the model's. int8 halves their memory (a scale per token and head)."""
    kv_host_memory: ByteSize = Field(ByteSize(0), ge=0)
    """Host memory for keys, values and indexes, as bytes or with a unit (8GiB); 0: from what the machine has."""
    kv_disk: ByteSize = Field(ByteSize(0), ge=0)
    """Disk space for them below --kv-disk-path, as bytes or with a unit (100GiB); 0: half of what is free there."""
    kv_disk_path: str | None = None
    """Directory where keys, values and indexes outlive memory and the process, for one server at a time; none: they
    are kept in memory only. Files hold what prompts said: they are readable by this user alone."""
    max_sessions: int = Field(1024, ge=1)
    """Named sessions that are neither pinned nor saved, beyond which the longest unused name is forgotten (not its
    cache); as many may be pinned, and as many saved. Each holds 4 bytes a token."""
    prefix_caching: bool = True
    """Reuse what was read before when a prompt starts with the same tokens."""
    num_threads: int = Field(0, ge=0)
    """Compute threads; 0: one per physical core."""

    @model_validator(mode="after")
    def _disk_has_a_place(self) -> Self:
        if self.kv_disk and self.kv_disk_path is None:
            raise ValueError("kv_disk is of no use without kv_disk_path (--kv-disk-path)")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and the file come in through `load`; secrets and .env files are not read."""
        return init_settings, env_settings

    @model_validator(mode="after")
    def _check_tls(self) -> Settings:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("--ssl-keyfile needs --ssl-certfile")
        return self

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names a client may use, the reported one first."""
        return tuple(self.served_model_name) or (self.model or DEMO_NAME,)

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The accepted keys in clear."""
        return tuple(key.get_secret_value() for key in self.api_key)

    def engine_config(self) -> EngineConfig:
        """The engine's part, as plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(EngineConfig)}
        values["model"] = self.model or str(DEMO_MODEL)
        values["kv_host_memory"], values["kv_disk"] = int(self.kv_host_memory), int(self.kv_disk)
        return EngineConfig(**values)


def load(arguments: Sequence[str] = ()) -> Settings:
    """Reads flags, environment and the file named by `--config` (or RETRIEVAL_CONFIG).

    Raises ValueError (pydantic's ValidationError) that names a wrong or unknown key; exits on wrong flags and
    on `--help`, as argparse does.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, default=os.environ.get(f"{ENV_PREFIX}CONFIG"))
    known, rest = first.parse_known_args(list(arguments))
    _refuse_unknown_environment()
    source = _sources(known.config)
    parser = argparse.ArgumentParser(
        prog="retrieval-server serve",
        description="Serves a model behind OpenAI's API. Priority: defaults < --config < environment < flags.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these keys, written with underscores")
    flags: Any = CliSettingsSource(source, cli_parse_args=rest, root_parser=parser)
    hidden: dict[str, Any] = {"_cli_settings_source": flags}  # a keyword of BaseSettings that type checkers lose
    return source(**hidden)


def _sources(file: Path | None) -> type[Settings]:
    """`Settings` that also reads `file`, below the environment."""
    if file is None:
        return Settings
    if not file.is_file():
        raise ValueError(f"--config: no such file: {file}")

    class FileSettings(Settings):
        __doc__ = Settings.__doc__

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            above = Settings.settings_customise_sources(settings_cls, *sources, **named)
            return *above, YamlConfigSettingsSource(settings_cls, yaml_file=file)

    return FileSettings


def _refuse_unknown_environment() -> None:
    known = {f"{ENV_PREFIX}{name}".upper() for name in Settings.model_fields} | {f"{ENV_PREFIX}CONFIG"}
    unknown = sorted(name for name in os.environ if name.upper().startswith(ENV_PREFIX) and name.upper() not in known)
    if unknown:
        raise ValueError(f"unknown environment variables: {', '.join(unknown)}")

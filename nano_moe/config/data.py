"""`data`: the text and its tokens."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from nano_moe.config.section import FieldFault, Section

DOMAINS = (
    "fiction_en",
    "fiction_fr",
    "geography",
    "law",
    "religion",
    "encyclopedia_en",
    "encyclopedia_es",
    "code_python",
)


class HubConfig(Section):
    """A dataset of the Hugging Face hub, or a folder laid out like one, read as a stream."""

    dataset: str = Field(min_length=1, description="owner/name on the hub, or a folder here")
    config: str | None = Field(
        default=None, min_length=1, description="its configuration; omitted: its default"
    )
    split: str = Field(
        default="train", min_length=1, description="what is read of it; we hold out a part of it"
    )
    revision: str = Field(
        default="main", min_length=1, description="branch, tag or commit; not of a folder"
    )
    column: str = Field(default="text", min_length=1, description="the column that holds text")
    document_start: str | None = Field(
        default=None,
        min_length=1,
        description="a regular expression: rows that match it begin a document; omitted: all do",
    )
    take_bytes: int | None = Field(
        default=None,
        ge=1,
        le=2**50,
        description="UTF-8 bytes taken from its start at most, in whole documents; omitted: all",
    )

    @field_validator("document_start")
    @classmethod
    def _is_expression(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"no regular expression ({error}); correct it") from error
        return pattern


class DataConfig(Section):
    """Where text comes from and how it becomes tokens."""

    files: tuple[str, ...] = Field(
        default=(), description="own files or folders (.txt .jsonl .parquet), instead of domains"
    )
    hub: HubConfig | None = Field(
        default=None, description="a dataset of the Hugging Face hub, instead of domains"
    )
    domains: tuple[str, ...] = Field(
        default=DOMAINS, description="embedded domains, read from installed packages"
    )
    bytes_per_domain: int = Field(
        default=2_500_000, ge=1, le=2**40, description="UTF-8 bytes taken of each domain at most"
    )
    tokenizer: Literal["bpe", "byte", "gpt2", "char", "file"] = Field(
        default="bpe", description="bpe is trained on the training split; file is tokenizer_file"
    )
    gpt2_ranks: str | None = Field(
        default=None, description="path of the r50k_base.tiktoken file; only for tokenizer: gpt2"
    )
    tokenizer_file: str | None = Field(
        default=None,
        min_length=1,
        description="a tokenizer.json, of Hugging Face or of a run, or its folder; only for "
        "tokenizer: file",
    )
    val_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="share of documents held out for validation"
    )
    cache: str = Field(default="data", description="folder in which prepared tokens land")

    @model_validator(mode="before")
    @classmethod
    def _own_files_replace_domains(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if isinstance(values.get("files"), str):
            values["files"] = [values["files"]]
        if isinstance(values.get("files"), list | tuple) and "" in values["files"]:
            raise FieldFault("files", "an empty path; name a file or folder")
        if values.get("files") or values.get("hub"):
            named = values.get("domains")
            if isinstance(named, list | tuple) and named and tuple(named) != DOMAINS:
                raise FieldFault(
                    "domains",
                    f"data.{'files' if values.get('files') else 'hub'} is read instead of "
                    f"{', '.join(map(str, named))}; drop one of the two (data.domains=[])",
                )
            values["domains"] = []
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    @field_validator("domains")
    @classmethod
    def _known_domains(cls, domains: tuple[str, ...]) -> tuple[str, ...]:
        for name in domains:
            if name not in DOMAINS:
                raise ValueError(f"no domain '{name}'; there are {', '.join(DOMAINS)}")
        if len(set(domains)) < len(domains):
            raise ValueError("a domain is named twice; name each once")
        return domains

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.files and self.hub:
            raise FieldFault("hub", "text is named twice; give data.files or data.hub, not both")
        if not self.files and not self.hub and not self.domains:
            raise FieldFault("files", "no text is named; add data.files=PATH (a file or folder)")
        if self.tokenizer == "gpt2" and not self.gpt2_ranks:
            raise FieldFault(
                "gpt2_ranks",
                "tokenizer gpt2 needs it; set data.gpt2_ranks=PATH of r50k_base.tiktoken",
            )
        if (self.tokenizer == "file") != (self.tokenizer_file is not None):
            raise FieldFault(
                "tokenizer_file",
                f"tokenizer={self.tokenizer}, and tokenizer_file={self.tokenizer_file}; set both "
                "tokenizer=file and tokenizer_file=PATH of a tokenizer.json, or neither",
            )
        return self

"""Settings of the proxy: a TOML file, or options of the command."""

from __future__ import annotations

import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from tagstore.errors import InvalidInput, NotFound
from tuna_model.inference.tag_style import TagStyle

_STRICT = ConfigDict(extra="forbid", frozen=True)
_STYLE = TypeAdapter(TagStyle)


class Upstream(BaseModel):
    """A server that answers."""

    model_config = _STRICT

    url: str
    """Up to and including /v1, as its clients write it."""
    models: tuple[str, ...] = ()
    """Names of the models that it has; the first upstream has all others."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("it must begin with http:// or https://")
        return url.rstrip("/")


class ProxySettings(BaseModel):
    """All settings of a proxy."""

    model_config = _STRICT

    upstreams: tuple[Upstream, ...] = Field(min_length=1)
    stores: dict[str, str] = Field(min_length=1)
    """Name -> URL of a tag source; the first is asked unless a request names another one."""
    tags: TagStyle = TagStyle()
    models: dict[str, dict[str, Any]] = {}
    """Name of a model -> fields of `tags` that differ for it."""
    neighbours: int = Field(10, ge=1, le=1000)
    """Similar images to take tags from."""
    deadline: float = Field(1.0, gt=0)
    """Seconds that the store has for all pictures of a request; then it is forwarded untouched."""
    max_pictures: int = Field(16, ge=1)
    """Pictures of a request; one with more is forwarded untouched."""
    cache_entries: int = Field(4096, ge=0)
    """Answers of the store that are kept, by the picture's sha256."""
    cache_seconds: float = Field(10.0, ge=0)
    """Seconds for which they are kept: so late is a new version of the store seen."""
    upstream_timeout: float = Field(600.0, gt=0)
    """Seconds that an upstream may be silent."""

    @model_validator(mode="after")
    def _models_are_styles(self) -> Self:
        for name in self.models:
            self.style_of(name)
        return self

    def style_of(self, model: str) -> TagStyle:
        """How tags are written for a model."""
        if model not in self.models:
            return self.tags
        return _STYLE.validate_python({**asdict(self.tags), **self.models[model]})

    def upstream_of(self, model: str) -> Upstream:
        """The upstream that has a model."""
        return next((u for u in self.upstreams if model in u.models), self.upstreams[0])

    @classmethod
    def of(cls, values: dict[str, Any], where: str) -> ProxySettings:
        """Check values. Raises `InvalidInput`, naming the one that is wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        path = ".".join(map(str, first["loc"]))
        raise InvalidInput(f"{where}: '{path}': {first['msg'].removeprefix('Value error, ')}")

    @classmethod
    def read(cls, path: str | Path) -> ProxySettings:
        """Read a TOML file. Raises `NotFound`, `InvalidInput`."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise NotFound(f"there is no file {path}") from error
        except tomllib.TOMLDecodeError as error:
            raise InvalidInput(f"{path}: {error}") from error
        return cls.of(values, str(path))

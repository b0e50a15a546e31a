"""Read a fleet file: YAML, then environment variables, then overrides; every finding at once.

The loader knows the vocabulary and nothing of plugins: which components there are and what options they have is
checked when the pipeline is built. So a broken plugin never keeps anybody from reading a configuration.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from ruamel.yaml import YAML

from kvfleet.config.checks import check_data, check_stages, model_names
from kvfleet.config.convert import read, unstructure
from kvfleet.config.env import Layers
from kvfleet.config.findings import Finding
from kvfleet.config.origin import Origin
from kvfleet.config.schema import FleetConfig
from kvfleet.config.secrets import Resolver, SecretReader
from kvfleet.config.wording import wanted
from kvfleet.config.yaml import parse_yaml, scalar_value
from kvfleet.errors import ConfigError

__all__ = ["check_config", "check_text", "dump_yaml", "load_config", "save_config"]


def load_config(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    resolvers: Sequence[Resolver] = (),
) -> FleetConfig:
    """Read a fleet file.

    Args:
        path: The file; ``KVFLEET_CONFIG`` names it if None.
        overrides: Merged over what file and environment say: sections deeply, lists as a whole.
        environ: The environment; the process's own if None.
        resolvers: Resolve references to secrets other than ``env:`` and ``file:``.

    Raises:
        ConfigError: with every finding.
        FileNotFoundError: if there is no such file.
    """
    config, findings = check_config(path, overrides, environ=environ, resolvers=resolvers)
    if findings or config is None:
        raise ConfigError(findings)
    return config


def check_config(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    resolvers: Sequence[Resolver] = (),
) -> tuple[FleetConfig | None, tuple[Finding, ...]]:
    """As `load_config`, but give the findings instead of raising them.

    The configuration comes beside its findings if they can be passed over in order to look further (unknown keys,
    unknown models, unset secrets); it must not be used to serve then. It is None otherwise.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    environ = os.environ if environ is None else environ
    path = path or environ.get("KVFLEET_CONFIG") or None
    if path is None:
        return check_text("", overrides=overrides, environ=environ, resolvers=resolvers)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        return None, (Finding(f"cannot be read: {reason}", "give a fleet file", file=str(path), code="file"),)
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8"
        return None, (Finding(what, "save the file as UTF-8", file=str(path), code="file"),)
    return check_text(text, file=str(path), overrides=overrides, environ=environ, resolvers=resolvers)


def check_text(
    text: str,
    *,
    file: str = "",
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    resolvers: Sequence[Resolver] = (),
) -> tuple[FleetConfig | None, tuple[Finding, ...]]:
    """As `check_config`, for a fleet file's text; `file` is its name in findings."""
    environ = os.environ if environ is None else environ
    parsed = parse_yaml(text, file=file)
    if not parsed.is_yaml:
        return None, parsed.findings
    data = {} if parsed.data is None else parsed.data
    if not isinstance(data, dict):
        what = f"a fleet file must be a mapping, not {wanted(type(data))}"
        return None, (*parsed.findings, parsed.origin.finding((), what, "begin with `models:`", code="type"))
    layers = Layers(data, dict(parsed.origin.positions))
    layers.add_environment(environ)
    layers.add_overrides(overrides or {})
    origin = Origin(file, layers.positions, layers.others, SecretReader(environ, tuple(resolvers)))
    config, findings = read(FleetConfig, layers.data, origin=origin, models=model_names(layers.data))
    findings = [*parsed.findings, *layers.findings, *findings, *check_data(layers.data, origin)]
    if config is not None:
        config = attrs.evolve(config, origin=origin)
        told = {one.path for one in findings}
        # A key whose reference could not be read is found already, and is not a key that nobody gave.
        findings += [one for one in check_stages(config) if (*one.path, "key") not in told]
    return config, _in_order(findings, file)


def _in_order(findings: Sequence[Finding], file: str) -> tuple[Finding, ...]:
    """Without repeats, from the file's first line to its last, and then what comes from elsewhere."""
    unique = dict.fromkeys(findings)
    return tuple(sorted(unique, key=lambda one: (one.file != file, one.line, one.column)))


def save_config(config: FleetConfig, path: str | Path) -> None:
    """Write a configuration as a fleet file that reads back as an equal one; parent folders are made.

    Defaults are left out. Secrets are written as the references they were read from; those that have none are left
    out, so that no saved file ever holds one.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = dump_yaml(unstructure(config))
    # Written beside it and moved into place: a reader never sees half a file.
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `kvfleet.config.yaml` reads back as the same data."""
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # keep the order of the fields
    writer.width = 120
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.representer.add_representer(str, _represent_text)
    stream = io.StringIO()
    writer.dump(data, stream)
    return stream.getvalue()


def _represent_text(representer: Any, value: str) -> Any:
    """Quote what would be read as something else; the writer's own idea of that is wider, and does no harm."""
    style = None if scalar_value(value) is value and value != "<<" else '"'
    return representer.represent_scalar("tag:yaml.org,2002:str", value, style=style)

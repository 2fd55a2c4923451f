"""Training options in a YAML file: what a run writes beside its log, and what `ffvt train --config FILE` reads."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.yaml"  # in a run's folder
LARGEST_FILE = 1 << 20  # bytes
OF_THE_START = ("resume", "overwrite")  # say how a run begins, not what it is
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
EMPTY = ("", "null", "~")


def config_flags(path: str | Path, known: Mapping[str, Any]) -> list[str]:
    """The flags that say what a YAML file says: a mapping from options' names to values. An empty value is left out.

    Args:
        path: the file.
        known: every option's name with its default; one of False is a switch.

    Raises:
        ValueError: it is no such file; the message names the file, and the option.
        ImportError: PyYAML is not installed.
    """
    flags = []
    for name, value in _read_mapping(Path(path)).items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"config: {path} must name training options; got {name[:80]!r}{hint}")
        default = known[name]
        parts = value if isinstance(value, list) and isinstance(default, tuple) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"config: {path} must give {name} a plain value; got {str(value)[:80]!r}")
        if default is False:
            if value.lower() not in SWITCHES:
                raise ValueError(f"config: {path} must give {name} true or false; got {value[:80]!r}")
            flags.append(f"--{name}" if SWITCHES[value.lower()] else f"--no-{name}")
        elif isinstance(default, tuple):
            flags += [f"--{name}", *parts] if parts else []
        elif isinstance(default, str) or value not in EMPTY:
            flags.append(f"--{name}={value}")
    return flags


def _read_mapping(path: Path) -> Mapping[Any, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("--config needs PyYAML: pip install 'ffvt[train]'") from error
    if not path.is_file():
        raise ValueError(f"config: must be a file; got {str(path)!r}")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"config: {path} must have at most {LARGEST_FILE} bytes; got {path.stat().st_size}")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # all scalars stay the text they are
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"config: {path} must be YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"config: {path} must map options to values; got {type(found).__name__}")
    return found


def _yaml(value: Any) -> str:
    """A value as JSON, which is YAML but for the letters beyond U+FFFF, which YAML does not write as two."""
    pairs = re.compile(r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}")
    return pairs.sub(lambda pair: f"\\U{ord(json.loads(chr(34) + pair[0] + chr(34))):08x}", json.dumps(value))


def config_text(options: Any) -> str:
    """A dataclass of options as YAML, by topic, each with its meaning, but for those of the start alone."""
    lines, group = ["# The options of a run. ffvt train --config FILE reads them; flags beside it override them."], ""
    for declared in (declared for declared in fields(options) if declared.name not in OF_THE_START):
        if declared.metadata["group"] != group:
            group = declared.metadata["group"]
            lines += ["", f"# {group}"]
        value = getattr(options, declared.name)
        shown = "" if value is None else f" {_yaml(value)}"
        lines.append(f"{declared.name}:{shown}  # {declared.metadata['help']}")
    return "\n".join(lines) + "\n"

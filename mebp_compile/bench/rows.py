"""Contestants that a file names: each has the settings of the command line with some of them replaced."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mebp_compile.bench.race import Contestant
from mebp_compile.errors import OptionError
from mebp_compile.finetune import Settings

ROW_FIX = 'write a list such as [{"name": "3B, 256", "model": "qwen2.5-3b", "sequence": 256, "budget": "76MB"}]'


def read_races(path: Path, settings: Settings) -> list[list[Contestant]]:
    """What a JSON file names: a list of objects with a "name" and the settings that differ, each a contestant that runs alone, and of lists of such
    objects, each of which is a race. A "kind" makes a contestant a peer. Raises OptionError."""
    try:
        races = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"can't read the rows {path}: {error}", ROW_FIX) from error
    if not isinstance(races, list):
        raise OptionError(f"{path} holds no list", ROW_FIX)
    return [[_contestant(path, row, settings) for row in rows] for rows in (each if isinstance(each, list) else [each] for each in races)]


def _contestant(path: Path, row: Any, settings: Settings) -> Contestant:
    known = {field.name for field in fields(Settings)}
    own = ("name", "kind")
    if not isinstance(row, dict) or "name" not in row or not row.keys() - set(own) <= known:
        raise OptionError(f"{path}: a row {row!r} has no name, or names an unknown setting", ROW_FIX)
    given = {key: Path(item) if key in ("offload", "store") and item is not None else item for key, item in row.items() if key not in own}
    if "model" in given and "store" not in given and settings.store is not None:
        given["store"] = settings.store.parent / f"{Path(given['model']).name}-{given.get('weights', settings.weights)}"
    return Contestant(row["name"], row.get("kind", "ours"), replace(settings, **given))

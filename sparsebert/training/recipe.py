"""Recipes: several models fine-tuned by one file."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import yaml

from sparsebert.config import TaskConfig, TrainConfig, validated
from sparsebert.encoders import Progress, no_progress
from sparsebert.errors import InputError, first_line
from sparsebert.training.finetune import TrainResult, train


def train_recipe(
    model: str | Path,
    task: str | TaskConfig,
    output: str | Path,
    recipe: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, TrainResult]:
    """Fine-tunes every model of a recipe into `output`/<name>, in order; resumes as `train` does.

    recipe: a YAML file with `models` (name -> fields of TrainConfig) and `common` fields, or the name of a packaged
    recipe. Raises InputError for a file of another form.
    """
    configs = read_recipe(recipe)
    results = {}
    for name, config in configs.items():

        def update(done: int, total: int, what: str = "", name=name) -> None:
            progress(done, total, name)

        results[name] = train(model, task, Path(output) / name, config, overwrite=overwrite, progress=update)
    return results


def read_yaml(kind: str, name: str | Path) -> tuple[Path, object]:
    """(path, content) of the packaged YAML file assets/<kind>s/<name>.yaml, or else of the YAML file `name`. If there
    is no such YAML file, InputError, which names the flag --<kind>.
    """
    packaged = resources.files("sparsebert") / "assets" / f"{kind}s" / f"{name}.yaml"
    path = Path(str(packaged)) if packaged.is_file() else Path(name)
    try:
        return path, yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{kind} {name} must be a YAML file: {first_line(error)}", fix=f"correct --{kind}") from error


def read_recipe(recipe: str | Path) -> dict[str, TrainConfig]:
    """The configurations in a recipe file, or in the packaged recipe of that name."""
    path, content = read_yaml("recipe", recipe)
    if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
        raise InputError(f"recipe {path} must map `models` to names and settings", fix="see recipe quick-soup")
    configs = {}
    for name, fields in content["models"].items():
        if not isinstance(fields, dict) or not re.fullmatch(r"[\w.-]+", str(name)):
            raise InputError(f"recipe {path}: model {name!r} must be a plain name with settings", fix="correct it")
        configs[str(name)] = validated(
            TrainConfig, {**(content.get("common") or {}), **fields}, f"recipe {path}: {name}: ", "correct the recipe"
        )
    return configs

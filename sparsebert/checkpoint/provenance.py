"""Records in a recipe which model it was made from, by path and content hash, and finds that model again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sparsebert.checkpoint.missing import PACKAGED
from sparsebert.checkpoint.reading import read_manifest, read_recipe, resolve, source_sha256
from sparsebert.errors import CheckpointError


def made_from(model: str | Path, sha256: str) -> dict[str, str]:
    """The fields of a recipe that name its source, valid in any working directory. sha256: by `source_sha256`."""
    is_path = model != PACKAGED and Path(model).is_dir()  # a Path is never equal to a name
    return {"model": str(Path(model).resolve()) if is_path else str(model), "model_sha256": sha256}


def ancestors(source: Path) -> Iterator[tuple[Path, dict]]:
    """A model and the models that it was made from by `train`, `prune` and `soup`, nearest first, each with its recipe.
    The recipe is empty if this package did not make the model. CheckpointError if the next one is missing or has
    changed.
    """
    while True:
        recipe = read_recipe(source) if read_manifest(source) is not None else {}
        yield source, recipe
        if recipe.get("model") is None:
            return
        source = _found(source, recipe["model"], recipe.get("model_sha256"))


def _found(made: Path, model: str, sha256: str | None) -> Path:
    """The directory that `made` was made from: at the noted path, or beside `made` if both were moved."""
    is_path = Path(model).is_absolute()
    places = [Path(model), made.resolve().parent / Path(model).name] if is_path else [model]
    if not is_path and model != PACKAGED and sha256 is None:
        raise CheckpointError(  # made by a version that noted paths relative to the working directory
            f"{made} was made from {model!r}, and does not say where that is", fix="make it again from an absolute path"
        )
    there = [resolve(place) for place in places if not is_path or place.is_dir()]
    if not there:
        raise CheckpointError(f"{made} was made from {model}, which is not there any more", fix="put it back")
    for directory in there:
        if sha256 is None or source_sha256(directory) == sha256:
            return directory
    raise CheckpointError(
        f"{made} was made from {model}, which has changed since", fix="put back the one it was made from"
    )

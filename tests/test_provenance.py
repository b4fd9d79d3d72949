"""A model's source is found again by place and content, even if both models have moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import models
import pytest
import yaml

from sparsebert import checkpoint
from sparsebert.checkpoint import provenance
from sparsebert.errors import CheckpointError


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return models.saved(tmp_path_factory.mktemp("provenance") / "m")


@pytest.fixture
def chain(built, tmp_path):
    """A folder with `dense`, which was made from the packaged encoder, and `pruned`, which was made from `dense`."""
    folder = tmp_path / "work"
    sources = {"dense": "minilm", "pruned": folder / "dense"}
    for name, source in sources.items():
        shutil.copytree(built, folder / name)
        noted = provenance.made_from(source, checkpoint.source_sha256(source))
        write_recipe(folder / name, {"command": "test", **noted})
    return folder


def write_recipe(directory: Path, recipe: dict) -> None:
    (directory / "sparsebert" / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def damage(directory: Path) -> None:
    """Turns the directory into another model: other normalisation, no seal."""
    models.stock(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 1e-6}))


def names(directory: Path) -> list[str]:
    return [path.name for path, _ in provenance.ancestors(directory)]


def test_ancestors_are_the_nearest_first_each_with_its_recipe(chain):
    found = list(provenance.ancestors(chain / "pruned"))
    assert [path for path, _ in found] == [chain / "pruned", chain / "dense", checkpoint.resolve("minilm")]
    assert [recipe.get("model") for _, recipe in found] == [str(chain / "dense"), "minilm", None]
    assert found[-1][1] == {}, "of what this package did not make"


def test_a_path_is_noted_whole_and_a_name_as_it_is(built, monkeypatch):
    monkeypatch.chdir(built.parent)
    assert provenance.made_from("m", "ab") == {"model": str(built.resolve()), "model_sha256": "ab"}
    assert provenance.made_from("minilm", "cd") == {"model": "minilm", "model_sha256": "cd"}
    assert provenance.made_from("who/what", "ef") == {"model": "who/what", "model_sha256": "ef"}
    Path("minilm").mkdir(exist_ok=True)  # it still names the packaged encoder
    assert provenance.made_from("minilm", "cd")["model"] == "minilm"


def test_models_that_moved_together_are_found(chain, tmp_path):
    moved = chain.rename(tmp_path / "elsewhere")
    assert names(moved / "pruned") == ["pruned", "dense", "model"]


def test_the_one_of_the_noted_content_is_taken_whichever_place_it_is_at(chain, tmp_path):
    copy = shutil.copytree(chain, tmp_path / "copy")
    damage(chain / "dense")
    found = [path for path, _ in provenance.ancestors(copy / "pruned")]
    assert found[1] == copy / "dense", "the one at the noted place is another by now"


def test_a_source_that_changed_or_is_gone_is_refused_by_name(chain):
    damage(chain / "dense")
    with pytest.raises(CheckpointError, match=r"pruned was made from .*/dense, which has changed since"):
        names(chain / "pruned")
    shutil.rmtree(chain / "dense")
    with pytest.raises(CheckpointError, match=r"pruned was made from .*/dense, which is not there any more"):
        names(chain / "pruned")


def test_recipes_of_earlier_versions_are_followed_as_far_as_they_say(chain):
    write_recipe(chain / "pruned", {"command": "test", "model": str(chain / "dense")})  # without a hash
    damage(chain / "dense")
    assert names(chain / "pruned") == ["pruned", "dense"]
    write_recipe(chain / "pruned", {"command": "test", "model": "minilm"})
    assert names(chain / "pruned") == ["pruned", "model"]
    write_recipe(chain / "pruned", {"command": "test", "model": "dense"})
    with pytest.raises(CheckpointError, match=r"was made from 'dense', and does not say where that is"):
        names(chain / "pruned")

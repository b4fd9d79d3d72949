"""Lists how each table of bench/results was made: machine, command and environment variables.

python -m bench.tables

They are read from the heads of the tables; `MADE_OF` says what DIR, MODEL and PATH in a command stand for.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
HEAD = re.compile(r"^Machine: (.+)\.  \nCommand: `(.+)`  \nEnvironment: (.+)\.(?:  )?$", re.M)
DENSE = "sparsebert train minilm --task sst2 --recipe bench/recipes/three-dense.yaml -o DENSE"
CELLS = "; its cells: the same command with --dense DENSE/plain-"
SERVED = "frontier/ and DENSE/: as for the table frontier"
CHECKOUTS = "DIR: checkouts of IST-DASLab/OBC and IST-DASLab/sparsegpt"
# Table -> how the files were made that its command names, or the cells that it reads.
MADE_OF = {
    "attack_kills": DENSE,
    "attacks": DENSE,
    "attacks_more": DENSE,
    "attacks_pruned": "frontier/: as for the table frontier",
    "attack_times": "DENSE/plain-0: as for frontier; DENSE/agnews: as for frontier_agnews; DENSE/imdb: `sparsebert "
    "train minilm --task imdb --n 4000 --epochs 1 --lr 1e-4 --hold-out 1000 -o DENSE/imdb`",
    "bf16": "MODEL: MiniLM fine-tuned on MNLI, 69.4 % of dev_matched; its settings are not recorded",
    "calibration": "mr-0 to mr-2: `sparsebert train minilm --task mr --epochs 2 --seed 0` (1, 2); outside: "
    "`python -m bench.make_outside`",
    "calibration_choose": "agnews-0: `sparsebert train minilm --task agnews --n 6000 --epochs 1`; qnli-0: the same of "
    "qnli",
    "end_to_end": "PATH: the python of an environment with deepsparse 1.8.0",
    "end_to_end_bert_base": "PATH: the python of an environment with deepsparse 1.8.0",
    "end_to_end_int8": "V: an environment of Python 3.11 with deepsparse 1.8.0",
    "frontier": "DENSE/plain-0: `sparsebert train minilm --task sst2 --epochs 1 --lr 1e-4 --hold-out 2000 -o "
    "DENSE/plain-0`; frontier/: python -m bench.study_frontier DENSE/plain-0 --prune frontier",
    "frontier_agnews": "DENSE/agnews: `sparsebert train minilm --task agnews --n 12000 --epochs 1 --lr 1e-4 --hold-out "
    "1000 -o DENSE/agnews`; the models: `sparsebert prune DENSE/agnews --task agnews --pattern PATTERN --sparsity "
    "0.875` with `--tier 2` and `sparsebert quantize`, as their names say",
    "frontier_amx": "DENSE/plain-0: as for frontier; the models: `sparsebert prune DENSE/plain-0 --task sst2 --pattern "
    "PATTERN --sparsity SPARSITY`, and `sparsebert quantize` for int8, as their names say",
    "mutants": "DIR: a checkout of 37f01f4; --seed 0 drew 300 mutants of its data.py, ledger.py, checkpoint/ and "
    "engine/engine.py; they ran against test_data, test_ledger, test_checkpoint and test_engine, about half of them "
    "without a limit on the time of their tests",
    "obs_prune": CHECKOUTS,
    "obs_sweep": CHECKOUTS,
    "obs_sweep_avx2": CHECKOUTS,
    "obs_sweep_cuda": CHECKOUTS,
    "prune": "DIR: MiniLM fine-tuned on a task, which is not recorded and does not change the time",
    "prune_avx2": "DIR: MiniLM fine-tuned on a task, which is not recorded and does not change the time",
    "pruning_groups": "plain-0 to plain-2: `sparsebert train minilm --task sst2 --epochs 1 --lr 1e-4 --hold-out 2000 "
    "--seed 0` (1, 2); its cells: the same command with --dense plain-0 plain-1 plain-2 --draws 0 --spaces '87.5 %' "
    "4x1 8x1 --only 'knowledge 1' 'knowledge 2'; the other rows, and some of 8x1, of fewer models",
    "pruning_ladder": f"{DENSE}{CELLS}0",
    "pruning_main": f"{DENSE}{CELLS}0 DENSE/plain-1 DENSE/plain-2 --draws 0 1",
    "pruning_patterns": f"{DENSE}{CELLS}0 DENSE/plain-1",
    "serving": SERVED,
    "serving_overload": SERVED,
    "serving_soak": SERVED,
    "srnets_hans": "DIR: the folder of the command of srnets",
    "versions": "DIR: a checkout of 138a072, the last commit before the core was rewritten for int8, and built",
}


def head(page: str) -> dict[str, str] | None:
    """Machine, command and environment of a table; None if its head lacks one of them."""
    found = HEAD.search(page)
    return None if found is None else dict(zip(("machine", "command", "environment"), found.groups(), strict=True))


def main() -> int:
    for path in sorted(RESULTS.glob("*.md")):
        facts = head(path.read_text(encoding="utf-8"))
        if facts is None:
            raise SystemExit(f"{path} must begin with its machine, command and environment")
        made = [f"made of: {MADE_OF[path.stem]}"] if path.stem in MADE_OF else []
        print("\n  ".join([path.stem, *(f"{name}: {value}" for name, value in facts.items()), *made]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Long work: one key, one way to write, one rule for resuming, refusing and overwriting.

`Job` is a piece of work with its own output. Its key is made of everything that decides the result, and its unfinished
parts are kept in `<output>.partial`. `Ledger` keeps many small results in one file. `writing` and `replacing` are the
only ways this package writes files and directories: whole or not at all. Needs neither torch nor transformers.
"""

from sparsebert.jobs.files import place, replacing, require_place, require_space, require_writable, write, writing
from sparsebert.jobs.job import Job, code_of, core_sha256, digest, file_sha256, told
from sparsebert.jobs.ledger import Ledger, OtherVersion, key_of

__all__ = [
    "Job",
    "Ledger",
    "OtherVersion",
    "code_of",
    "core_sha256",
    "digest",
    "file_sha256",
    "key_of",
    "place",
    "replacing",
    "require_place",
    "require_space",
    "require_writable",
    "told",
    "write",
    "writing",
]

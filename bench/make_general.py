"""Makes the packaged set of general texts: sentences of Open English WordNet, its examples and definitions.

python -m bench.make_general WORDNET.zip    # in WNDB layout: data.noun, data.verb, data.adj, data.adv

Writes sparsebert/assets/general/texts.txt.xz, one text per line. The same dictionary gives the same bytes: the choice
of texts and their order follow from their hashes.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import sys
import zipfile
from pathlib import Path

EXAMPLES, DEFINITIONS = 9000, 5000
WORDS = range(5, 41)  # per text
TARGET = Path(__file__).parents[1] / "sparsebert" / "assets" / "general" / "texts.txt.xz"


def texts_of(archive: Path) -> tuple[set[str], set[str]]:
    """(examples, definitions) of all synsets, without those whose length is not in WORDS."""
    examples, definitions = set(), set()
    with zipfile.ZipFile(archive) as files:
        for name in files.namelist():
            if re.search(r"/data\.(noun|verb|adj|adv)$", name):
                for line in files.read(name).decode().splitlines():
                    gloss = line.partition("| ")[2].strip()
                    examples |= set(re.findall(r'"([^"]+)"', gloss))
                    definitions.add(re.sub(r';?\s*"[^"]*"', "", gloss).strip(" ;:"))
    return tuple({text for text in found if len(text.split()) in WORDS} for found in (examples, definitions))


def drawn(texts: set[str], count: int) -> list[str]:
    """The `count` texts with the lowest hashes, sorted by hash."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:count]


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    examples, definitions = texts_of(Path(sys.argv[1]))
    chosen = drawn({*drawn(examples, EXAMPLES), *drawn(definitions, DEFINITIONS)}, EXAMPLES + DEFINITIONS)
    packed = lzma.compress("".join(f"{text}\n" for text in chosen).encode(), preset=9 | lzma.PRESET_EXTREME)
    TARGET.write_bytes(packed)
    print(f"{len(chosen)} texts, {len(packed)} bytes in {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

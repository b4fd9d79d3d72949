"""Makes three .csv files: review sets that bench.study_calibration reports on, and that we may not ship.

python -m bench.make_outside TEXTFOOLER NLTK_DATA FOLDER

TEXTFOOLER: a checkout of github.com/jind11/TextFooler (data/yelp: 1,000 reviews of restaurants and shops). NLTK_DATA:
a checkout of github.com/nltk/nltk_data (packages/corpora: the customer reviews of Hu & Liu 2004 and Ding et al. 2008,
the film reviews of Pang & Lee 2004). The sets: sentences of product reviews of at least 4 words, labelled by the sign
of the sum of their opinions; reviews of restaurants and shops of at least 100 words; film reviews of at least 200.
"""

from __future__ import annotations

import csv
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

Row = tuple[str, int]  # text, and 1 if it is positive


def restaurants_and_shops(textfooler: Path) -> Iterator[Row]:
    for line in (textfooler / "data" / "yelp").read_text(encoding="utf-8").splitlines():
        label, text = line.split(" ", 1)
        yield text, int(label)


def products(corpora: Path) -> Iterator[Row]:
    """Lines are `feature[+2], feature[-1]##sentence`."""
    for archive in ("product_reviews_1.zip", "product_reviews_2.zip"):
        for name, body in _files(corpora / archive):
            if not name.endswith("README.txt"):
                for line in body.splitlines():
                    opinions, _, text = line.partition("##")
                    strength = sum(map(int, re.findall(r"\[([+-]\d)\]", opinions)))
                    if strength and text.strip():
                        yield " ".join(text.split()), int(strength > 0)


def films(corpora: Path) -> Iterator[Row]:
    for name, body in _files(corpora / "movie_reviews.zip"):
        if name.endswith(".txt"):
            yield " ".join(body.split()), int("/pos/" in name)


def _files(archive: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(archive) as files:
        for name in files.namelist():
            if not name.endswith("/"):
                yield name, files.read(name).decode(errors="replace")


def main() -> int:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    textfooler, corpora, folder = Path(sys.argv[1]), Path(sys.argv[2]) / "packages" / "corpora", Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    sets = {
        "restaurants_and_shops_100": (restaurants_and_shops(textfooler), 100),
        "product_reviews": (products(corpora), 4),
        "film_reviews_200": (films(corpora), 200),
    }
    for name, (rows, words) in sets.items():
        kept = list(dict.fromkeys((text, label) for text, label in rows if len(text.split()) >= words))
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("text", "label"), *kept])
        print(f"{name}: {len(kept)}, of which {sum(label for _, label in kept)} are positive")
    return 0


if __name__ == "__main__":
    sys.exit(main())

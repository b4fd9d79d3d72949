"""What attacks read: neighbours of words, WordNet's synonyms, a tagger, stop words, a sentence encoder. What ships with
the package is used where nothing better is at hand, and a result names what was used.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path

import numpy as np

from sparsebert import data, environment, jobs
from sparsebert.engine.sentences import SentenceEncoder
from sparsebert.errors import DataError, first_line
from sparsebert.robustness.attacks.tagger import Tagger

_TAGGER, _STOPWORDS = "averaged_perceptron_tagger_eng", "stopwords"
NEIGHBOURS = 50  # of a word, nearest first: as many as any attack asks for

# The parts of speech of WordNet, and what the endings of a word may be in place of [Miller 1995, morphy].
_PARTS = ("noun", "verb", "adj", "adv")
_ENDINGS = {
    "noun": (("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
             ("men", "man"), ("ies", "y")),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}  # fmt: skip


@dataclass(frozen=True)
class Neighbours:
    """Words of similar meaning. of(word, least): at most NEIGHBOURS of a word, nearest first, lower case; those whose
    vectors have a cosine of at least `least`, where vectors are known. name, sha256: of the source.
    """

    name: str
    sha256: str
    of: Callable[[str, float], list[str]]

    @classmethod
    def packaged(cls) -> Neighbours:
        """Up to 8 a word, nearest first by counter-fitted vectors, of a cosine above 0.5 [Jia et al. 2019]."""
        table = data.word_neighbors()
        return cls("counter-fitted-8", jobs.digest(table), lambda word, least: table.get(word.lower(), []))

    @classmethod
    def read(cls, path: Path) -> Neighbours:
        """From word vectors (a line a word: the word and its numbers, as counter-fitted-vectors.txt), or from JSON:
        word -> words, nearest first. DataError if the file is neither.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"neighbours {path} cannot be read: {error.strerror}", fix="check the path") from error
        sha256 = hashlib.sha256(content).hexdigest()
        if content.lstrip()[:1] == b"{":
            try:
                table = {word.lower(): near for word, near in json.loads(content).items()}
                if not all(isinstance(near, list) and all(isinstance(n, str) for n in near) for near in table.values()):
                    raise ValueError("a value is no list of words")
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"neighbours {path} must be JSON, word -> list of words: {first_line(error)}",
                    fix="correct the file",
                ) from error
            return cls(path.name, sha256, lambda word, least: table.get(word.lower(), [])[:NEIGHBOURS])
        words, vectors = _vectors(content, path)
        rows = {word: i for i, word in enumerate(words)}

        @cache
        def nearest(word: str) -> list[tuple[str, float]]:
            row = rows.get(word)
            if row is None:
                return []
            cosines = vectors @ vectors[row]
            cosines[row] = -np.inf
            best = np.argpartition(-cosines, min(NEIGHBOURS, len(words) - 1))[:NEIGHBOURS]
            best = best[np.argsort(-cosines[best], kind="stable")]
            return [(words[i], float(cosines[i])) for i in best if i != row]

        def of(word: str, least: float) -> list[str]:
            return [near for near, cosine in nearest(word.lower()) if cosine >= least]

        return cls(path.name, sha256, of)


def _vectors(content: bytes, path: Path) -> tuple[list[str], np.ndarray]:
    """(words, float32 [words, n] of length 1)."""
    words, rows = [], []
    for number, line in enumerate(io.BytesIO(content), 1):
        word, _, numbers = line.decode("utf-8", "replace").strip().partition(" ")
        if not word:
            continue
        try:
            with np.errstate(over="ignore"):  # a number too large becomes infinite, which is refused
                row = np.array(numbers.split(), dtype=np.float32)
        except ValueError:
            row = np.empty(0, np.float32)
        if not len(row) or (rows and len(row) != len(rows[0])) or not np.isfinite(row).all():
            raise DataError(
                f"{path}, line {number}: must be a word and its {len(rows[0]) if rows else ''} numbers".replace(
                    "  ", " "
                ),
                fix="give counter-fitted-vectors.txt, or JSON of word -> words",
            )
        words.append(word.lower())
        rows.append(row)
    if not rows:
        raise DataError(
            f"{path} holds no word vectors", fix="give counter-fitted-vectors.txt, or JSON of word -> words"
        )
    vectors = np.stack(rows)
    return words, vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class Synonyms:
    """Open English WordNet: the single words that share a sense with a word. sha256: of the table."""

    def __init__(self):
        packed = (resources.files("sparsebert") / "assets" / "attack" / "oewn_synonyms.txt.xz").read_bytes()
        self.sha256 = hashlib.sha256(packed).hexdigest()
        self._table = data.word_table(packed)
        self.of = cache(self._of)

    def _of(self, word: str) -> list[str]:
        """Synonyms of a word and of what it may be an inflection of, as any part of speech, in the order of senses.
        They are not inflected themselves.
        """
        found: dict[str, None] = {}
        for part in _PARTS:
            for base in self._bases(word.lower(), part):
                found |= dict.fromkeys(self._table[f"{base}|{part}"])
        found.pop(word, None)
        return list(found)

    def parts(self, word: str) -> set[str]:
        """The parts of speech that a word may have."""
        return {part for part in _PARTS if self._bases(word.lower(), part)}

    def _bases(self, word: str, part: str) -> list[str]:
        if f"{word}|{part}" in self._table:
            return [word]
        cut = [word[: -len(end)] + instead for end, instead in _ENDINGS[part] if word.endswith(end)]
        return [base for base in dict.fromkeys(cut) if f"{base}|{part}" in self._table]


class Resources:
    """Everything that attacks may ask for, read on first use.

    neighbours: a file for Neighbours.read, else the packaged ones. encoder: the directory of a sentence encoder, or
    none. masked_lm: the directory of a masked-language model, for the attacks that need one. stored: a parquet file of
    rows that `sparsebert attack -o` has written.
    """

    def __init__(
        self,
        neighbours: str | Path | None = None,
        encoder: str | Path = "minilm",
        masked_lm: str | Path | None = None,
        stored: str | Path | None = None,
    ):
        self._neighbours, self._encoder, self._masked_lm, self._stored = neighbours, encoder, masked_lm, stored

    @cached_property
    def neighbours(self) -> Neighbours:
        return Neighbours.packaged() if self._neighbours is None else Neighbours.read(Path(self._neighbours))

    @cached_property
    def synonyms(self) -> Synonyms:
        return Synonyms()

    @cached_property
    def tagger(self) -> tuple[Tagger, str] | None:
        """The tagger and the sha256 of its file; None if NLTK's data is not here."""
        found = _nltk(f"taggers/{_TAGGER}")
        if found is None:
            return None
        parts = [found(f"{_TAGGER}.{name}.json") for name in ("weights", "tagdict", "classes")]
        try:
            return Tagger.read(*parts), hashlib.sha256(b"".join(parts)).hexdigest()
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"NLTK's {_TAGGER} is damaged: {first_line(error)}", fix="download it again: nltk.download"
            ) from error

    @cached_property
    def stopwords(self) -> tuple[frozenset[str], str] | None:
        """NLTK's English stop words and their sha256; None if NLTK's data is not here."""
        found = _nltk(f"corpora/{_STOPWORDS}")
        if found is None:
            return None
        content = found("english")
        try:
            words = frozenset(content.decode("utf-8").split())
        except UnicodeDecodeError as error:
            raise DataError(
                f"NLTK's {_STOPWORDS} are damaged: {first_line(error)}", fix="download them again: nltk.download"
            ) from error
        return words, hashlib.sha256(content).hexdigest()

    @cached_property
    def encoder(self) -> SentenceEncoder | None:
        """The sentence encoder; None if none is wanted, so that no similarity is asked for."""
        return None if str(self._encoder) == "none" else SentenceEncoder.load(self._encoder)

    @cached_property
    def stored(self) -> Stored:
        """DataError if no file was named."""
        if self._stored is None:
            raise DataError("the attack transfer needs stored adversarial texts", fix="give --stored FILE.parquet")
        return Stored(Path(self._stored))

    @cached_property
    def masked_lm(self):
        """The masked-language model. DataError if none was named."""
        from sparsebert.robustness.attacks.masked_lm import MaskedLM

        if self._masked_lm is None:
            raise DataError(
                "this attack needs a masked-language model, none was named", fix="give --masked-lm DIR, such as a BERT"
            )
        return MaskedLM.load(self._masked_lm)


class Stored:
    """Texts that fooled another model. of(text, other): those of a text, beside the other one of a pair, in the order
    of the file. name, sha256: of the file. pairs: whether it is of pairs.
    """

    def __init__(self, path: Path):
        """DataError for a file without the columns original, perturbed and outcome."""
        import pyarrow
        import pyarrow.parquet

        columns = ["original", "perturbed", "outcome"]
        try:
            self.sha256 = jobs.file_sha256(path)
            self.pairs = "other" in pyarrow.parquet.read_schema(path).names
            columns += ["other"] if self.pairs else []
            rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{path} must be rows that an attack has written, with {', '.join(columns)}: {first_line(error)}",
                fix="make it: sparsebert attack DIR --task T --attack A -o FILE.parquet",
            ) from error
        self.name = path.name
        self._texts: dict[tuple[str, str | None], list[str]] = {}
        for row in rows:
            if row["outcome"] == "succeeded":
                self._texts.setdefault((row["original"], row.get("other")), []).append(row["perturbed"])

    def of(self, text: str, other: str | None) -> list[str]:
        return self._texts.get((text, other), [])


def _nltk(name: str) -> Callable[[str], bytes] | None:
    """A function that reads a file of NLTK's data package `name`, in a folder or a zip, where NLTK looks and in
    SPARSEBERT_DATA/attack/nltk. None if the package is in none of them.
    """
    kind, package = name.split("/")
    root = environment.data_dir()
    places = [] if root is None else [root / "attack" / "nltk" / package]
    places += [folder / kind / package for folder in environment.nltk_data()]
    for place in places:
        if place.is_dir():
            return lambda file, place=place: _read(place / file)
        packed = place.with_name(f"{package}.zip")
        if packed.is_file():
            return lambda file, packed=packed: _read_zipped(packed, f"{package}/{file}")
    return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", fix="download NLTK's data again") from error


def _read_zipped(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as packed:
            return packed.read(name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}", fix="download NLTK's data again") from error

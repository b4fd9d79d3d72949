"""TextAttack's own recipes with the resources of `bench.bench_attacks`, which starts this file in TextAttack's
environment. It imports nothing of sparsebert.

It reads JSON, one request per line, and answers each with one line. First {model, encoder, max_length, threads, seed,
neighbours: {attack: {word: [word]}}, synonyms: {word: [word]}}; the answer is the versions. Then {attack, padded,
trace, examples: [[text, label]]}: the answer is a row for each example.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from functools import partial
from types import SimpleNamespace


def below(n: int, seed: int, text: str, *what: str) -> int:
    """What sparsebert.robustness.attacks.transformations.Draws draws."""
    name = "\0".join((str(seed), text, *what))
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") % n


class Runner:
    """Both victims, and what stands in for the parts of TextAttack that draw at random or would download something.

    text, word: under attack. threshold: of the encoder's similarity, None without an encoder. similarity: text ->
    similarity to what it was compared with, since the attack began.
    """

    def __init__(self, setup: dict):
        import torch
        from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

        torch.set_num_threads(setup["threads"])
        self.setup, self.torch = setup, torch
        self.tokenizer = AutoTokenizer.from_pretrained(setup["model"], local_files_only=True)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            setup["model"], local_files_only=True, dtype=torch.float32
        ).eval()
        self.encoder_tokenizer = AutoTokenizer.from_pretrained(setup["encoder"], local_files_only=True)
        self.encoder = AutoModel.from_pretrained(setup["encoder"], local_files_only=True, dtype=torch.float32).eval()
        self.text, self.word, self.threshold, self.similarity = "", "", None, {}
        self.attacks: dict[tuple[str, bool], object] = {}

    def embed(self, texts: list[str]):
        """Means over the tokens, float32 [texts, H], in batches of texts of similar length, as sentence-transformers
        makes them.
        """
        torch, order = self.torch, sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        rows = torch.empty(len(texts), self.encoder.config.hidden_size)
        for start in range(0, len(order), 32):
            batch = order[start : start + 32]
            encoded = self.encoder_tokenizer(
                [texts[i] for i in batch], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            with torch.inference_mode():
                states = self.encoder(**encoded).last_hidden_state
            mask = encoded["attention_mask"][..., None]
            rows[batch] = (states * mask).sum(1) / mask.sum(1)
        return rows

    def wrapper(self, padded: bool):
        """The victim as TextAttack wraps it, or padded to the longest text of a batch."""
        from textattack.models.wrappers import HuggingFaceModelWrapper

        if not padded:
            return HuggingFaceModelWrapper(self.model, self.tokenizer)
        torch, max_length = self.torch, self.setup["max_length"]

        class PaddedWrapper(HuggingFaceModelWrapper):
            def __call__(self, texts):
                encoded = self.tokenizer(
                    texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
                )
                with torch.inference_mode():
                    return self.model(**encoded).logits

        return PaddedWrapper(self.model, self.tokenizer)

    def attack(self, name: str, padded: bool):
        """A recipe of TextAttack, built by TextAttack, with our resources in place of the classes that it names."""
        if (name, padded) in self.attacks:
            return self.attacks[name, padded]
        from textattack import transformations as swaps
        from textattack.attack_recipes import (
            deepwordbug_gao_2018,
            pwws_ren_2019,
            textbugger_li_2018,
            textfooler_jin_2019,
        )  # fmt: skip
        from textattack.constraints.semantics import WordEmbeddingDistance

        module, recipe = {
            "textfooler": (textfooler_jin_2019, "TextFoolerJin2019"),
            "textbugger": (textbugger_li_2018, "TextBuggerLi2018"),
            "deepwordbug": (deepwordbug_gao_2018, "DeepWordBugGao2018"),
            "pwws": (pwws_ren_2019, "PWWSRen2019"),
        }[name]
        table = self._embedding(name)
        instead = {
            "WordSwapEmbedding": partial(swaps.WordSwapEmbedding, embedding=table),
            "WordEmbeddingDistance": partial(WordEmbeddingDistance, embedding=table),
            "UniversalSentenceEncoder": self._encoder(),
            "WordSwapWordNet": self._synonyms(),
            "WordSwapHomoglyphSwap": _homoglyphs,
            "WordSwapNeighboringCharacterSwap": self._drawn(swaps.WordSwapNeighboringCharacterSwap, "swap"),
            "WordSwapRandomCharacterDeletion": self._drawn(swaps.WordSwapRandomCharacterDeletion, "delete"),
            "WordSwapRandomCharacterInsertion": self._drawn(swaps.WordSwapRandomCharacterInsertion, "insert"),
            "WordSwapRandomCharacterSubstitution": self._drawn(swaps.WordSwapRandomCharacterSubstitution, "substitute"),
        }
        for replaced in instead.keys() & vars(module).keys():
            setattr(module, replaced, instead[replaced])
        self.attacks[name, padded] = getattr(module, recipe).build(self.wrapper(padded))
        return self.attacks[name, padded]

    def _embedding(self, name: str):
        from textattack.shared import AbstractWordEmbedding

        table = self.setup["neighbours"].get(name, {})

        class Neighbours(AbstractWordEmbedding):
            """Words are their own indices; whatever is in the table is near enough."""

            def __getitem__(self, index):
                raise NotImplementedError

            def get_mse_dist(self, a, b):
                raise NotImplementedError

            def get_cos_sim(self, a, b):
                return 1.0

            def word2index(self, word):
                if word not in table:
                    raise KeyError(word)
                return word

            def index2word(self, index):
                return index

            def nearest_neighbours(self, index, topn):
                return table[index][:topn]

        return Neighbours()

    def _encoder(self):
        from textattack.constraints.semantics.sentence_encoders import SentenceEncoder

        runner = self

        class Encoder(SentenceEncoder):
            """With the defaults of UniversalSentenceEncoder."""

            def __init__(self, threshold=0.8, metric="angular", **kwargs):
                super().__init__(threshold=threshold, metric=metric, **kwargs)

            def encode(self, sentences):
                return runner.embed(sentences)

            def _check_constraint_many(self, transformed_texts, reference_text):
                kept = super()._check_constraint_many(transformed_texts, reference_text)
                runner.threshold = self.threshold
                runner.similarity |= {t.text: t.attack_attrs["similarity_score"] for t in transformed_texts}
                return kept

        return Encoder

    def _synonyms(self):
        from textattack.transformations import WordSwap

        table = self.setup["synonyms"]

        class Synonyms(WordSwap):
            def _get_replacement_words(self, word):
                return table.get(word, [])

        return Synonyms

    def _drawn(self, base: type, what: str) -> type:
        """A transformation whose places and letters are drawn by `below`."""
        runner = self

        def draw(n: int, what: str) -> int:
            return below(n, runner.setup["seed"], runner.text, what, runner.word)

        class Drawn(base):
            def _get_replacement_words(self, word):
                runner.word = word
                return super()._get_replacement_words(word)

            def _get_random_letter(self):
                letters = self.letters_to_insert
                return letters[draw(len(letters), f"{what}: letter")]

        # The module asks numpy for nothing else.
        randint = SimpleNamespace(randint=lambda low, high: low + draw(high - low, what))
        sys.modules[base.__module__].np = SimpleNamespace(random=randint)
        return Drawn

    def run(self, name: str, text: str, label: int, *, padded: bool, trace: bool) -> dict:
        """outcome, perturbed, queries and seconds of an attack on a text, with `trace` also what it looked at."""
        attack = self.attack(name, padded)
        self.text, self.threshold, self.similarity = text, None, {}
        seen = _Trace(attack.search_method) if trace else None
        start = time.perf_counter()
        result = attack.attack(text, label)
        row = {
            "outcome": {"SuccessfulAttackResult": "succeeded", "FailedAttackResult": "failed"}.get(
                type(result).__name__, "skipped"
            ),
            "perturbed": result.perturbed_result.attacked_text.text,
            "queries": result.num_queries,
            "seconds": time.perf_counter() - start,
        }
        if seen is not None:
            seen.stop()
            row["trace"] = {
                "importance": seen.importance, "steps": seen.steps, "similarity": self.similarity,
                "threshold": self.threshold,
            }  # fmt: skip
        return row


def _homoglyphs():
    """The wheel lacks a file that the constructor reads last, for another attack."""
    from textattack.transformations import WordSwapHomoglyphSwap

    made = WordSwapHomoglyphSwap.__new__(WordSwapHomoglyphSwap)
    try:
        made.__init__()
    except FileNotFoundError:
        pass
    return made


class _Trace:
    """What a search asks for. importance: [word index, score] of each word left out. steps: [text, word index, [[text,
    score]]] of each word for which candidates were made, in their order.
    """

    def __init__(self, search):
        self.search, self.importance, self.steps, self._indices = search, [], [], []
        self._kept = {
            name: getattr(search, name) for name in ("get_indices_to_order", "get_transformations", "get_goal_results")
        }
        for name in self._kept:
            setattr(search, name, getattr(self, name))

    def stop(self) -> None:
        for name, call in self._kept.items():
            setattr(self.search, name, call)

    def get_indices_to_order(self, text, **kwargs):
        found = self._kept["get_indices_to_order"](text, **kwargs)
        self._indices = found[1]
        return found

    def get_transformations(self, text, **kwargs):
        found = self._kept["get_transformations"](text, **kwargs)
        self.steps.append([text.text, int(kwargs["indices_to_modify"][0]), []])
        return found

    def get_goal_results(self, texts):
        results, over = self._kept["get_goal_results"](texts)
        scores = [result.score for result in results]
        if self.steps:
            self.steps[-1][2] = [[text.text, score] for text, score in zip(texts, scores, strict=True)]
        else:
            self.importance = [[int(i), score] for i, score in zip(self._indices, scores, strict=True)]
        return results, over


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print to what they think is the output

    def answer(what: object) -> None:
        print(json.dumps(what), file=answers, flush=True)

    runner = Runner(json.loads(sys.stdin.readline()))
    from importlib.metadata import version

    answer({name: version(name) for name in ("textattack", "transformers", "torch", "nltk")})
    for line in sys.stdin:
        asked = json.loads(line)
        answer([
            runner.run(asked["attack"], text, label, padded=asked["padded"], trace=asked["trace"])
            for text, label in asked["examples"]
        ])  # fmt: skip


if __name__ == "__main__":
    main()

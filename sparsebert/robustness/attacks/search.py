"""Searches: how an attack goes from the original to a text that fools the victim."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sparsebert.robustness.attacks.attack import Attack, Candidate, Scored, Steps
from sparsebert.robustness.attacks.words import Text

UNKNOWN = "[UNK]"


def greedy(ranking: str) -> Callable[[Attack], Steps[Scored]]:
    """Greedy search [Jin et al. 2020, Algorithm 1]: words in the order of their importance, each replaced by the
    candidate with the highest score if that is higher than before. Of several candidates that fool the victim it takes
    the one that is most similar, if similarity was measured, else the one with the highest score.

    ranking: by the score of the text without the word ("delete"), with [UNK] in its place ("unknown"), or with the
    softmax of the latter times the highest score of a candidate for the word ("saliency", [Ren et al. 2019]).
    """

    def search(attack: Attack) -> Steps[Scored]:
        best = attack.start
        for index in (yield from _order(attack, ranking)):
            if attack.over:
                break
            candidates = yield from attack.candidates(best.text, index)
            if not candidates:
                continue
            scored = yield from attack.query([candidate.text for candidate in candidates])
            ranked = sorted(zip(scored, candidates, strict=False), key=lambda pair: -pair[0].score)
            if not ranked or not ranked[0][0].score > best.score:
                continue
            best = ranked[0][0]
            if best.fooled:
                return _most_similar(ranked)
        return best

    return search


def _most_similar(ranked: list[tuple[Scored, Candidate]]) -> Scored:
    best, similarity = ranked[0][0], -np.inf
    for scored, candidate in ranked:
        if not scored.fooled or candidate.similarity is None:
            break
        if candidate.similarity > similarity:
            best, similarity = scored, candidate.similarity
    return best


def _order(attack: Attack, ranking: str) -> Steps[list[int]]:
    """The modifiable words, the most important first. Empty if the limit of queries is reached before that is known."""
    text = attack.original
    indices = attack.modifiable(text)
    word = "" if ranking == "delete" else UNKNOWN
    found = yield from attack.scores((text.with_word(i, word).text for i in indices), len(indices))
    if attack.over:
        return []
    importance = np.array([score for score, _ in found], dtype=np.float32)
    if ranking == "saliency" and len(importance):
        raised = np.exp(importance - importance.max())
        gains = np.zeros(len(indices))
        for n, index in enumerate(indices):
            candidates = yield from attack.candidates(text, index)
            scored = yield from attack.query([candidate.text for candidate in candidates])
            gains[n] = max((float(one.score) for one in scored), default=0.0)
            if attack.over:
                break
        importance = raised / raised.sum() * gains
    return [indices[n] for n in np.argsort(-importance, kind="stable")]


def worst_of(samples: int, share: float) -> Callable[[Attack], Steps[Scored]]:
    """The worst of `samples` random texts: each word that has candidates is replaced with probability `share`, by any
    of them. Which texts are tried does not depend on the victim.
    """

    def search(attack: Attack) -> Steps[Scored]:
        draws, text = attack.source.draws, attack.original
        choices: dict[int, list[str]] = {}
        for index in attack.modifiable(text):
            candidates = yield from attack.candidates(text, index)
            found = [c.text.words[index] for c in candidates if len(c.text.words) == len(text.words)]
            if found:
                choices[index] = found
        tried = []
        for sample in range(samples if choices else 0):
            made = text
            for index, words in choices.items():
                if draws.below(1000, "replace", sample, index) < 1000 * share:
                    made = made.with_word(index, words[draws.below(len(words), "by", sample, index)])
            tried.append(made)
        scored = yield from attack.query(tried)
        return max((attack.start, *scored), key=_goodness)

    return search


def stored(attack: Attack) -> Steps[Scored]:
    """The worst of the texts that fooled another model (Stored)."""
    found = attack.resources.stored.of(attack.original.text, attack.other)
    scored = yield from attack.query([Text(text) for text in found])
    return max((attack.start, *scored), key=_goodness)


def swarm(particles: int, rounds: int) -> Callable[[Attack], Steps[Scored]]:
    """Particle swarm optimisation over word substitutions [Zang et al. 2020, Section 4], with TextAttack's constants.

    A particle is a text. In each round it meets its own best text and the best text of all: it becomes that text, with
    its own words where its velocities say so, if the constraints allow that. Then one of its words may be replaced by
    the candidate that raises the score most. The fewer words of a particle differ from the original, the more often
    that happens.
    """
    fastest, slow, inertia = 3.0, (0.8, 0.2), (0.8, 0.2)

    def search(attack: Attack) -> Steps[Scored]:
        rng = np.random.default_rng(attack.source.draws.below(1 << 62, "swarm"))
        words = len(attack.original.words)
        swarm = yield from _mutated(attack, [attack.start] * particles, rng)
        own, best = list(swarm), max(swarm, key=_goodness)
        velocity = np.repeat(rng.uniform(-fastest, fastest, (particles, 1)), words, axis=1)
        for step in range(rounds):
            if best.fooled or attack.over:
                break
            done = step / rounds
            weight = inertia[1] + (inertia[0] - inertia[1]) * (1 - done)
            to_own, to_best = slow[0] - done * (slow[0] - slow[1]), slow[1] + done * (slow[0] - slow[1])
            moved = []
            for k, particle in enumerate(swarm):
                pull = sum(_pull(particle.text, target.text, fastest) for target in (own[k], best))
                velocity[k] = weight * velocity[k] + (1 - weight) * pull
                turn = 1 / (1 + np.exp(-velocity[k]))
                text = particle.text
                for target, probability in ((own[k], to_own), (best, to_best)):
                    if rng.random() < probability:
                        text = _met(text, target.text, rng.random(words) < turn)
                if text is not particle.text and not (yield from attack.allowed([Candidate(text)], particle.text)):
                    text = particle.text
                moved.append(text)
            swarm = yield from attack.query(moved)
            if attack.over:
                best = max((best, *swarm), key=_goodness)
                break
            if not any(particle.fooled for particle in swarm):
                changed = [len(particle.text.changed) / max(1, words) for particle in swarm]
                again = [k for k in range(particles) if rng.random() < 1 - 2 * changed[k]]
                mutated = yield from _mutated(attack, [swarm[k] for k in again], rng)
                for k, particle in zip(again, mutated, strict=False):
                    swarm[k] = particle
            own = [max(pair, key=_goodness) for pair in zip(own, swarm, strict=True)]
            best = max((best, *own), key=_goodness)
        return best

    return search


def _goodness(scored: Scored) -> tuple[bool, float]:
    return scored.fooled, float(scored.score)


def _pull(text: Text, target: Text, fastest: float) -> np.ndarray:
    """float64 [words]: against moving where two texts of equally many words agree, for it where they differ."""
    return np.array([-fastest if a == b else fastest for a, b in zip(text.words, target.words, strict=True)])


def _met(text: Text, best: Text, turns: np.ndarray) -> Text:
    """`best` with the words of `text` where `turns` says so; a word of the original is no change."""
    made = best
    for index in np.flatnonzero(turns):
        if made.words[index] != text.words[index]:
            changed = (made.changed - {index}) | (text.changed & {index})
            made = made.with_word(int(index), text.words[index])
            made.changed = changed
    return made


def _mutated(attack: Attack, particles: list[Scored], rng: np.random.Generator) -> Steps[list[Scored]]:
    """Each particle with one word replaced: the word is drawn by how much its best candidate raises the score, and
    replaced by that. If no candidate of any word does, each word is as likely, and one without candidates stays. Equal
    particles are looked at once.
    """
    best: dict[str, list[Scored]] = {}
    for particle in particles:
        if particle.text.text in best:
            continue
        found = []
        for index in range(len(particle.text.words)):
            candidates = yield from attack.candidates(particle.text, index)
            same = [c.text for c in candidates if len(c.text.words) == len(attack.original.words)]
            scored = yield from attack.query(same)
            found.append(max(scored, key=_goodness) if scored else particle)
        best[particle.text.text] = found
    made = []
    for particle in particles:
        found = best[particle.text.text]
        gains = np.array([max(0.0, float(one.score - particle.score)) for one in found])
        weights = gains / gains.sum() if gains.any() else None  # None: uniform
        made.append(found[rng.choice(len(found), p=weights)] if found else particle)
    return made

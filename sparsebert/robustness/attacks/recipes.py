"""The attacks, each as its paper's table of goal, constraints, transformation and search.

Values are those of TextAttack 0.3.11, whose results people compare with; comments say where the paper or its authors'
code has others. Two things differ from every published run unless the user brings them along: the neighbours that ship
with the package are at most 8 a word, and the sentence encoder is all-MiniLM-L6-v2 in place of the Universal Sentence
Encoder. So the accuracies under attack compare models with each other, not with published ones.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace

from sparsebert.errors import InputError
from sparsebert.robustness.attacks import transformations as changes
from sparsebert.robustness.attacks.attack import MASKED_LM, Attack, Blank, Question, Recipe, Steps
from sparsebert.robustness.attacks.constraints import changed_at_most, edits_at_most, same_part_of_speech, similar
from sparsebert.robustness.attacks.search import greedy, stored, swarm, worst_of
from sparsebert.robustness.attacks.transformations import Transformation
from sparsebert.robustness.attacks.words import Text


def _by_word(*parts: Transformation) -> Callable[[Attack, Text, int], Steps[list[str]]]:
    """All that any of the transformations proposes for the word."""

    def transform(attack: Attack, text: Text, index: int) -> Steps[list[str]]:
        return [other for part in parts for other in part(text.words[index], attack.source)]
        yield  # never reached: it makes this a generator

    return transform


def _by_model(*, masked: bool, most: int) -> Callable[[Attack, Text, int], Steps[list[str]]]:
    """What a masked-language model proposes in the place of the word."""

    def transform(attack: Attack, text: Text, index: int) -> Steps[list[str]]:
        (words,) = yield Question(MASKED_LM, [Blank(text.text, *text.spans[index], masked, most)])
        return words

    return transform


_TEXTFOOLER = Recipe(
    name="textfooler",
    source="Jin et al. 2020",
    # The paper's δ = 0.7 is 0.5 in its code and its runs.
    transform=_by_word(changes.neighbours(50, 0.5)),
    constraints=(
        same_part_of_speech,
        # ε = 0.5 of the paper's runs, 1 - 0.5 / π: its code leaves π out. Its code allows a text shorter than the
        # window from 0.1 on; TextAttack allows it unseen.
        similar(0.840845057, window=15, to_original=False),
    ),
    # The authors' code ranks by the word replaced by <oov>, and adds what the new label gains.
    search=greedy("delete"),
    stopwords="textfooler",
    needs=("neighbours", "tagger", "encoder"),
)

_TABLE = (
    _TEXTFOOLER,
    # ε = 0.7, the default of the authors' code and of older TextAttack.
    replace(
        _TEXTFOOLER,
        name="textfooler-strict",
        constraints=(same_part_of_speech, similar(0.904507034, window=15, to_original=False)),
    ),
    Recipe(
        name="textbugger",
        source="Li et al. 2019",
        transform=_by_word(
            changes.insert_space,
            changes.inner(changes.delete_character),
            changes.inner(changes.swap_characters),
            changes.lookalikes,  # the paper also writes neighbouring keys
            changes.neighbours(5),  # GloVe in the paper
        ),
        constraints=(similar(0.8),),  # of the cosine in the paper, of the angle in TextAttack
        search=greedy("delete"),  # the paper ranks sentences first
        stopwords="nltk",
        needs=("neighbours", "stopwords", "encoder"),
    ),
    Recipe(
        name="deepwordbug",
        source="Gao et al. 2018",
        transform=_by_word(
            changes.swap_characters, changes.substitute_character, changes.delete_character, changes.insert_character
        ),
        constraints=(edits_at_most(30),),
        search=greedy("unknown"),  # the paper scores by temporal heads and tails of the text
        stopwords="nltk",  # the paper leaves none alone
        needs=("stopwords",),
    ),
    Recipe(
        name="pwws",
        source="Ren et al. 2019",
        transform=_by_word(changes.synonyms),  # the paper also replaces named entities, and asks for one part of speech
        constraints=(),
        search=greedy("saliency"),
        stopwords="nltk",
        needs=("synonyms", "stopwords"),
    ),
    Recipe(
        name="pso",
        source="Zang et al. 2020",
        transform=_by_word(changes.synonyms),  # sememes of HowNet in the paper and in TextAttack
        constraints=(),
        # In the paper and its code the particle takes words of the best texts; in TextAttack they take the particle's.
        search=swarm(60, 20),
        stopwords="nltk",
        needs=("synonyms", "stopwords"),
    ),
    Recipe(
        name="bert-attack",
        source="Li et al. 2020",
        # 48 in the paper and in TextAttack before 0.3.11. Of a word of several pieces both the paper and its code rank
        # the combinations by their perplexity; TextAttack means to, but takes the first ones.
        transform=_by_model(masked=False, most=8),
        constraints=(changed_at_most(0.4), similar(0.2, angular=False)),
        search=greedy("unknown"),
        stopwords="nltk",
        needs=("stopwords", "encoder", "masked_lm"),
    ),
    Recipe(
        name="bae",
        source="Garg & Ramakrishnan 2020, BAE-R",
        transform=_by_model(masked=True, most=50),  # the authors leave pieces of words out
        constraints=(same_part_of_speech, similar(0.936338023, window=15, angular=False)),
        search=greedy("delete"),
        stopwords="nltk",
        needs=("stopwords", "tagger", "encoder", "masked_lm"),
    ),
    Recipe(
        name="random-synonym",
        source="a control: it asks the same texts of every victim",
        transform=_by_word(changes.neighbours(50, 0.5)),
        constraints=(same_part_of_speech,),
        search=worst_of(200, 0.3),
        stopwords="textfooler",
        needs=("neighbours", "tagger"),
    ),
    Recipe(
        name="transfer",
        source="a control: texts that fooled another model",
        transform=_by_word(),
        constraints=(),
        search=stored,
        stopwords="none",
        needs=("stored",),
    ),
)
RECIPES = {recipe.name: recipe for recipe in _TABLE}


def named(names: str | Sequence[str]) -> list[Recipe]:
    """The attacks that `names` lists, separated by commas, each once. InputError for a name that is none."""
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    for name in wanted:
        if name not in RECIPES:
            like = difflib.get_close_matches(name, RECIPES, 1)
            raise InputError(
                f"attacks must be among {', '.join(RECIPES)}, got {name!r}",
                fix=f"did you mean {like[0]}?" if like else "choose from these",
            )
    return [RECIPES[name] for name in dict.fromkeys(wanted)]

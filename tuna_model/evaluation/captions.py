"""Captioning metrics by pycocoevalcap, the library behind published figures: BLEU-4, ROUGE-L, CIDEr, and
METEOR.

Published figures use the Stanford tokeniser, which needs Java as METEOR does: `tokeniser="ptb"`. "plain"
lower-cases, drops punctuation and splits at blanks. The two differ a little, so a report names the one that
was used.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import InvalidInput, MissingExtra
from tuna_model.evaluation.bootstrap import Metric, Rows, mean, metric

Tokeniser = Literal["plain", "ptb"]
_PUNCTUATION = re.compile(r"[^\w\s']|_|(?<!\w)'|'(?!\w)")


def caption_metrics(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    images: Sequence[Hashable],
    *,
    tokeniser: Tokeniser = "plain",
    meteor: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Metric]:
    """BLEU-4, ROUGE-L, CIDEr (not times 100) and METEOR of one caption per image.

    CIDEr weighs n-grams by their rarity in the references of the whole set: do not compare it over different
    sets of images. Its interval resamples the images' scores under the weights of the whole set.

    Raises:
        InvalidInput: an image has no references, or METEOR or "ptb" lacks Java.
        MissingExtra: pycocoevalcap is not installed.
    """
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ModuleNotFoundError as error:
        raise MissingExtra("captioning metrics need pycocoevalcap: pip install 'tagstore[eval]'") from error
    if empty := [str(image) for image, captions in zip(images, references, strict=True) if not captions]:
        raise InvalidInput(f"no reference caption for {', '.join(empty[:3])}: leave it out")
    if (meteor or tokeniser == "ptb") and shutil.which("java") is None:
        raise InvalidInput(
            "METEOR and the tokeniser 'ptb' are Java programs, and there is no java: "
            "install it or leave them out"
        )
    tokens = dict(enumerate(tokenise([[answer] for answer in answers], tokeniser)))
    truth = dict(enumerate(tokenise(references, tokeniser)))

    bleu = BleuScorer(n=4)
    for number, answer in tokens.items():
        bleu += (answer[0], truth[number])
    counts = _bleu_counts(bleu)
    metrics = [metric("BLEU-4", lambda rows: _bleu(counts, rows), images, resamples=resamples, seed=seed)]
    scores = {
        "ROUGE-L": Rouge().compute_score(truth, tokens)[1],
        "CIDEr": Cider().compute_score(truth, tokens)[1],
    }
    if meteor:
        scores["METEOR"] = _meteor(truth, tokens)
    return metrics + [
        mean(name, some, images, resamples=resamples, seed=seed) for name, some in scores.items()
    ]


def tokenise(captions: Sequence[Sequence[str]], tokeniser: Tokeniser = "plain") -> list[list[str]]:
    """Captions as tokens separated by blanks, without punctuation."""
    if tokeniser == "plain":
        return [[" ".join(_PUNCTUATION.sub(" ", c.lower()).split()) for c in some] for some in captions]
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    records = {i: [{"caption": " ".join(c.split()) or "."} for c in some] for i, some in enumerate(captions)}
    tokens = PTBTokenizer().tokenize(records)
    return [tokens[i] for i in range(len(captions))]


def _bleu_counts(scorer: object) -> NDArray[np.float64]:
    """Per caption: length, closest reference length, then matches and n-grams for n = 1 ... 4."""
    rows = []
    for caption in scorer.ctest:  # type: ignore[attr-defined]
        length = caption["testlen"]
        # of two references equally close the shorter counts, as in pycocoevalcap
        closest = min((abs(reference - length), reference) for reference in caption["reflen"])[1]
        rows.append([length, closest, *caption["correct"], *caption["guess"]])
    return np.asarray(rows, np.float64)


def _bleu(counts: NDArray[np.float64], rows: Rows) -> float:
    """Corpus BLEU-4 (Papineni et al., ACL 2002) of some captions, with pycocoevalcap's tiny constants."""
    length, reference, *rest = counts[rows].sum(axis=0)
    precisions = (np.asarray(rest[:4]) + 1e-15) / (np.asarray(rest[4:]) + 1e-9)
    ratio = (length + 1e-15) / (reference + 1e-9)
    return float(np.exp(np.log(precisions).mean()) * (np.exp(1 - 1 / ratio) if ratio < 1 else 1.0))


def _meteor(truth: dict[int, list[str]], tokens: dict[int, list[str]]) -> list[float]:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        scores: list[float] = scorer.compute_score(truth, tokens)[1]
    finally:
        scorer.meteor_p.kill()
        for stream in (scorer.meteor_p.stdin, scorer.meteor_p.stdout, scorer.meteor_p.stderr):
            stream.close()
        scorer.meteor_p.wait()
    return scores

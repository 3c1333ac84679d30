"""Examples for a report: the words that teacher and student predict for a [MASK] in the same sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distil_jax.data.loader import open_rows, positions
from distil_jax.data.manifest import read_manifest
from distil_jax.data.tokenizer import load_tokenizer, special_ids
from distil_jax.evaluation.fill_mask import fill_mask
from distil_jax.io import huggingface
from distil_jax.io.names import short_name
from distil_jax.reporting.page import Block, Paragraph, Table
from distil_jax.runtime.assemble import check_tokenizer
from distil_jax.runtime.run_folder import Model, open_model, read_config
from distil_jax.schema import InputError, require

_SENTENCES = 6
_ROWS = 96  # rows in which they are looked for
_FEWEST, _MOST = 5, 24  # tokens in a sentence; longer ones are cut after a whole word


def check_texts(run: Path, texts: Sequence[str]) -> None:
    """Checks the user's own sentences.

    Args:
      run: a run folder.
      texts: sentences.

    Raises:
      InputError: one of them does not have exactly one [MASK].
    """
    if texts:
        mask = load_tokenizer(run / "tokenizer").mask_token
        for text in texts:
            require(text.count(mask) == 1, f"--text {text!r} needs exactly one {mask}.")


def masked_word_examples(run: Path, texts: Sequence[str] = ()) -> list[Block]:
    """The table for a run's newest checkpoint and its teacher, or a line that says why it is missing.

    Args:
      run: a run folder. Its data and its teacher may have been moved or deleted.
      texts: sentences with one [MASK] each; if there are none, they come from the run's held-out rows.
    """
    config = read_config(run)
    try:
        if not (run / "checkpoints").is_dir():
            raise InputError("the run has no checkpoint yet.")
        student = open_model(run)
        teacher = _teacher(config.teacher.path, student) if config.teacher.path else None
        words = [""] * len(texts)
        if not texts:
            check_tokenizer(student.tokenizer, student.config, config.data.path, read_manifest(config.data.path))
            texts, words = zip(*held_out_examples(config.data.path, student.tokenizer), strict=True)
        return prediction_table(teacher, student, texts, words)
    except (InputError, OSError) as error:
        reason = str(error)
        for place in (config.data.path, config.teacher.path, str(run)):  # a page is shared, this machine is not
            if place:
                reason = reason.replace(place, short_name(place))
        return [Paragraph(f"No examples: {reason}")]


def prediction_table(
    teacher: Model | None, student: Model, texts: Sequence[str], words: Sequence[str] = ()
) -> list[Block]:
    """A table of the words that both models predict for the [MASK] of each text, and whether their first choices agree.

    Args:
      teacher: None for a table of the student alone.
      student: a model with the teacher's tokenizer.
      texts: sentences with one [MASK] each.
      words: the masked words; "" for those that are unknown.

    Raises:
      InputError: as `fill_mask`.
    """
    models = {"teacher": teacher, "student": student} if teacher else {"student": student}
    predictions = {name: fill_mask(model, list(texts)) for name, model in models.items()}
    first_choices = {name: [best[0][0] for best in of_model] for name, of_model in predictions.items()}
    columns = {"sentence": list(texts)}
    if any(words):
        columns["masked word"] = list(words)
    for name, of_model in predictions.items():
        columns[name] = [_describe(best) for best in of_model]
    notes = []
    if teacher:
        same = [ours == theirs for ours, theirs in zip(first_choices["student"], first_choices["teacher"], strict=True)]
        columns["agree"] = ["✓" if agree else "–" for agree in same]
        notes.append(f"The first choices agree (✓) in {sum(same)} of {len(same)} sentences.")
    if any(words):
        correct = {
            name: sum(choice == word for choice, word in zip(choices, words, strict=True))
            for name, choices in first_choices.items()
        }
        counts = " and ".join(f"{number} of the {name}'s" for name, number in correct.items())
        notes.append(f"The masked word is the first choice in {counts} predictions.")
    rows = list(zip(*columns.values(), strict=True))
    return [Table(tuple(columns), rows, text_columns=len(columns)), *([Paragraph(" ".join(notes))] if notes else [])]


def held_out_examples(data: str | Path, tokenizer: Path, *, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences of the held-out rows with one word masked, and that word; the same ones for the same rows and seed.

    The masked word is one token with a letter in it, and no `##` token follows. A sentence is the beginning of a
    sequence; short sequences come first. Tokenising the sentence gives back the tokens that it was decoded from.

    Args:
      data: a folder of prepared rows.
      tokenizer: a folder with tokenizer files.
      seed: of the random choice.

    Raises:
      InputError: there are no held-out rows, or none of them has such a sentence.
    """
    table, tokens = open_rows(data, "held_out"), load_tokenizer(tokenizer)
    generator = np.random.default_rng(seed)
    rows = table.gather(np.sort(generator.permutation(len(table))[:_ROWS]))
    starts_BxL = (rows.segment_ids != 0) & (positions(rows.segment_ids) == 0)
    sequences = []
    for ids_L, segments_L, starts_L in zip(rows.input_ids, rows.segment_ids, starts_BxL, strict=True):
        in_row = [ids_L[segments_L == segments_L[start]].tolist() for start in np.flatnonzero(starts_L)]
        # Two of a row at most, because neighbours in a row are often from the same text.
        sequences += [in_row[i] for i in generator.permutation(len(in_row))[:2]]
    generator.shuffle(sequences)
    examples: dict[str, str] = {}
    for ids in sorted(sequences, key=lambda ids: len(ids) > _MOST + 2):
        if len(examples) == _SENTENCES:
            break
        if example := _mask_word(tokens, ids, generator):
            examples.setdefault(*example)
    require(bool(examples), f"no held-out sentence of {data} reads as a few whole words.")
    return list(examples.items())


def _mask_word(tokenizer, ids: list[int], generator: np.random.Generator) -> tuple[str, str] | None:
    """The beginning of a sequence with a random word masked, and the word; None if it is not suitable."""
    special = set(special_ids(tokenizer))
    ids = [i for i in ids if i not in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    pieces = [*tokenizer.convert_ids_to_tokens(ids[: _MOST + 1]), ""][: _MOST + 1]
    ends = [i for i, piece in enumerate(pieces) if i <= min(len(ids), _MOST) and not _continues(piece)]
    end = max(ends, default=0)  # the sentence ends before this token, which begins a new word
    words = [
        i
        for i in range(end)
        if ids[i] not in special
        and any(map(str.isalpha, pieces[i]))
        and not _continues(pieces[i])
        and not _continues(pieces[i + 1])
    ]
    if end < _FEWEST or not words:
        return None
    position = int(generator.choice(words))
    masked = [*ids[:position], tokenizer.mask_token_id, *ids[position + 1 : end]]
    text = tokenizer.decode(masked)
    if tokenizer(text, add_special_tokens=False)["input_ids"] != masked or tokenizer.unk_token_id in masked:
        return None
    return text, tokenizer.decode([ids[position]])


def _continues(piece: str) -> bool:
    """Whether a WordPiece token continues the word before it."""
    return piece.startswith("##")


def _describe(predictions: list[tuple[str, float]]) -> str:
    return "\u00a0· ".join(f"{word}\u00a0{100 * probability:.0f}\u00a0%" for word, probability in predictions)


def _teacher(path: str, student: Model) -> Model:
    """Opens the teacher at `path`, and checks that it is still the one that the student was trained with."""
    teacher = open_model(path)
    if huggingface.fingerprint(teacher.params) != student.metadata["identity"].get("teacher"):
        raise InputError(f"{path} holds another teacher than the one that the run was trained with.")
    return teacher

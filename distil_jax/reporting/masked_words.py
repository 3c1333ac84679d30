"""Teacher and student side by side: what each puts in the gap of the same sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distil_jax.data.loader import open_rows, positions
from distil_jax.data.manifest import read_manifest
from distil_jax.data.tokenizer import load_tokenizer, special_ids
from distil_jax.evaluation.fill_mask import fill_mask
from distil_jax.io import huggingface
from distil_jax.reporting.page import Block, Paragraph, Table
from distil_jax.runtime.assemble import check_tokenizer
from distil_jax.runtime.run_folder import Model, open_model, read_config
from distil_jax.schema import InputError, require

_SENTENCES = 6
_ROWS = 96  # read to find so many sentences
_FEWEST, _MOST = 5, 24  # tokens of a sentence; longer ones are cut after a whole word


def check_texts(run: Path, texts: Sequence[str]) -> None:
    """Refuses a text of the user's own without exactly one gap.

    Raises:
      InputError: says which.
    """
    if texts:
        mask = load_tokenizer(run / "tokenizer").mask_token
        for text in texts:
            require(text.count(mask) == 1, f"--text {text!r} needs exactly one {mask}.")


def examples(run: Path, texts: Sequence[str] = ()) -> list[Block]:
    """The table for a run's newest checkpoint and its teacher, or one line that says why there is none.

    Args:
      run: a run folder; what it was trained on and with may have gone since.
      texts: with one gap each; none: sentences of the run's own held-out rows.
    """
    try:
        if not (run / "checkpoints").is_dir():
            raise InputError("the run has no checkpoint yet.")
        student, config = open_model(run), read_config(run)
        teacher = _teacher(config.teacher.path, student) if config.teacher.path else None
        words = [""] * len(texts)
        if not texts:
            check_tokenizer(student.tokenizer, student.config, config.data.path, read_manifest(config.data.path))
            texts, words = zip(*held_out_gaps(config.data.path, student.tokenizer), strict=True)
        return compare(teacher, student, texts, words)
    except (InputError, OSError) as error:
        return [Paragraph(f"No examples: {error}")]


def compare(teacher: Model | None, student: Model, texts: Sequence[str], words: Sequence[str] = ()) -> list[Block]:
    """The words that both models put in the gap of each text, and whether their first choices agree.

    Args:
      teacher: or None, and the student stands alone.
      student: of the same tokenizer.
      texts: with one gap each.
      words: that stood there, "" where that is not known.

    Raises:
      InputError: see `fill_mask`.
    """
    models = {"teacher": teacher, "student": student} if teacher else {"student": student}
    answers = {name: fill_mask(model, list(texts)) for name, model in models.items()}
    columns = {"sentence": list(texts)}
    if any(words):
        columns["the word"] = list(words)
    columns |= {name: [_choices(choices) for choices in of_model] for name, of_model in answers.items()}
    firsts = {name: [choices[0][0] for choices in of_model] for name, of_model in answers.items()}
    notes = []
    if teacher:
        same = [first == second for first, second in zip(firsts["teacher"], firsts["student"], strict=True)]
        columns["agree"] = ["✓" if agree else "–" for agree in same]
        notes.append(f"The first choices agree (✓) in {sum(same)} of {len(same)} sentences.")
    if any(words):
        right = [f"{sum(map(str.__eq__, choices, words))} of the {name}'s" for name, choices in firsts.items()]
        notes.append(f"The word that stood there is the first choice in {' and '.join(right)} answers.")
    rows = list(zip(*columns.values(), strict=True))
    return [Table(tuple(columns), rows, texts=len(columns)), *([Paragraph(" ".join(notes))] if notes else [])]


def held_out_gaps(data: str | Path, tokenizer: Path, *, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences of the held-out rows with one word masked, and that word: always the same ones for the same rows.

    A word is a token of letters that no `##` piece follows; a sentence is the beginning of a sequence, short ones
    first, and reads back as the very tokens that it is shown for.

    Raises:
      InputError: no rows there, or none with such a sentence.
    """
    table, tokens = open_rows(data, "held_out"), load_tokenizer(tokenizer)
    draw = np.random.default_rng(seed)
    rows = table.gather(np.sort(draw.permutation(len(table))[:_ROWS]))
    starts = (rows.segment_ids != 0) & (positions(rows.segment_ids) == 0)
    sequences = []
    for ids_L, segments_L, starts_L in zip(rows.input_ids, rows.segment_ids, starts, strict=True):
        in_row = [ids_L[segments_L == segments_L[start]].tolist() for start in np.flatnonzero(starts_L)]
        sequences += [in_row[i] for i in draw.permutation(len(in_row))[:2]]  # few of a row: its texts are neighbours
    draw.shuffle(sequences)
    texts: dict[str, str] = {}
    for ids in sorted(sequences, key=lambda ids: len(ids) > _MOST + 2):
        if len(texts) < _SENTENCES and (gap := _gap(tokens, ids, draw)):
            texts.setdefault(*gap)
    require(bool(texts), f"no held-out sentence of {data} reads as a few whole words.")
    return list(texts.items())


def _gap(tokens, ids: list[int], draw: np.random.Generator) -> tuple[str, str] | None:
    special = set(special_ids(tokens))
    ids = [i for i in ids if i not in (tokens.cls_token_id, tokens.sep_token_id)]
    pieces = [*tokens.convert_ids_to_tokens(ids[: _MOST + 1]), ""][: _MOST + 1]
    end = max((i for i, piece in enumerate(pieces) if i <= min(len(ids), _MOST) and not _inner(piece)), default=0)
    words = [
        i
        for i in range(end)
        if ids[i] not in special
        and any(map(str.isalpha, pieces[i]))
        and not _inner(pieces[i])
        and not _inner(pieces[i + 1])
    ]
    if end < _FEWEST or not words:
        return None
    place = int(draw.choice(words))
    masked = [*ids[:place], tokens.mask_token_id, *ids[place + 1 : end]]
    text = tokens.decode(masked)
    if tokens(text, add_special_tokens=False)["input_ids"] != masked or tokens.unk_token_id in masked:
        return None
    return text, tokens.decode([ids[place]])


def _inner(piece: str) -> bool:
    return piece.startswith("##")


def _choices(choices: list[tuple[str, float]]) -> str:
    return "\u00a0· ".join(f"{word}\u00a0{100 * probability:.0f}\u00a0%" for word, probability in choices)


def _teacher(path: str, student: Model) -> Model:
    """The teacher at `path`, if it is still the one that the student learnt from."""
    teacher = open_model(path)
    if huggingface.fingerprint(teacher.params) != student.metadata["identity"].get("teacher"):
        raise InputError(f"{path} holds another teacher than the run began with.")
    return teacher

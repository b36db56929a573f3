"""What a command is asked to run on: the options ``--prompt`` and ``--prompt-ids``, the ids that they mean, and the words for those.

Owns the way from the command line to ids.  Refuses an empty prompt, and a text where the model has no tokenizer.  Called by the commands
that run one model; importing it loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aprender._command import Parser, Usage, say

if TYPE_CHECKING:
    import argparse

    from aprender.sides.base import Side
    from aprender.text import Tokenizer

CANARY = "\"$(python -c 'import aprender; print(aprender.canary())')\""
"""The embedded model, for examples that work as they stand."""

SIDE_HELP = "GGUF file, or folder with model.safetensors and config.json; cpu: or cuda: before it; hf:NAME[@dtype]; llama.cpp:model.gguf"


def parse_ids(text: str) -> tuple[int, ...]:
    """Token ids of ``1,2,3``; :class:`Usage` if it is anything else."""
    try:
        ids = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise Usage(f"--prompt-ids {text!r} is not a list of integers such as 1,2,3") from None
    if any(i < 0 for i in ids):
        raise Usage(f"--prompt-ids {text!r}: an id cannot be negative")
    return ids


def add_prompt(parser: Parser) -> None:
    """Add the two options, one of which must be given."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--prompt", metavar="TEXT", help="raw text; special tokens are added as the model's own tokenizer declares")
    group.add_argument("--prompt-ids", metavar="1,2,3", help="token ids instead of a text")
    add_chat(parser)


def add_chat(parser: Parser) -> None:
    """Add the option that wraps a text as a conversation."""
    parser.add_argument("--chat", action="store_true", help="the text as a user's message in the model's own chat template")


def check_prompt(options: argparse.Namespace) -> None:
    """Complain about ids that are none before anything is loaded; raises Usage."""
    if options.prompt_ids is not None:
        parse_ids(options.prompt_ids)
        if options.chat:
            raise Usage("--chat needs a text: --prompt-ids are taken as they are")


def prompt_ids(side: Side, options: argparse.Namespace) -> tuple[int, ...]:
    """The token ids of a command line; whether the vocabulary has them is for the side to say.

    Raises
    ------
    CannotRun
        A text, and the model has no tokenizer; ``--chat``, and it has no template or transformers is missing.
    FormatError
        A text, and the model's tokenizer cannot be read.
    ArgumentError
        No token at all.
    """
    from aprender.errors import ArgumentError, CannotRun

    if options.prompt_ids is not None:
        ids = parse_ids(options.prompt_ids)
    else:
        known = tokenizer(side, options)
        if known is None:
            raise CannotRun(f"{side.spelling} has no tokenizer: give --prompt-ids 1,2,3", code="TOKENIZER", field="prompt")
        ids = tuple(encode(known, options.prompt, options.chat))
    if not ids:
        raise ArgumentError("the prompt is empty: a forward pass needs at least one token", code="ARGUMENT", field="prompt")
    return ids


def encode(known: Tokenizer, prompt: str, chat: bool) -> Sequence[int]:
    """Ids of a text as it is, or as a user's message."""
    if not chat:
        return known.encode(prompt)
    from aprender.text.chat import chat_ids

    return chat_ids(known, prompt)


def tokenizer(side: Side, options: argparse.Namespace) -> Tokenizer | None:
    """The side's tokenizer.  None if it has none, or one that cannot be read and only pieces would be missing, because ids were given."""
    from aprender.errors import ConfigError, FormatError

    try:
        return side.tokenizer()
    except (ConfigError, FormatError):
        if options.prompt_ids is None:
            raise
        return None


def warn_beyond_context(side: Side, tokens: int) -> None:
    """Say on stderr that positions were used for which the model was not made."""
    data = side.model_data()
    context = int(data["hparams"].get("context", 0)) if data else 0
    if context and tokens > context:
        say(f"aprender: note: {tokens} tokens are beyond the {context} that the model's file gives as its context")


def pieces(ids: Sequence[int], known: Tokenizer | None) -> list[str] | None:
    """What each id stands for; None without a tokenizer."""
    return None if known is None else [known.id_to_piece(token) for token in ids]


def tokens_text(ids: Sequence[int], words: Sequence[str] | None, most: int = 60) -> str:
    """Ids with their pieces, blanks shown as ``␣``; of many the first and the last."""
    shown = [str(i) if words is None else f"{i} {words[place].replace(' ', '␣')}" for place, i in enumerate(ids)]
    if len(shown) > most:
        shown = [*shown[: most // 2], f"… {len(shown) - most} more …", *shown[-(most // 2) :]]
    return " · ".join(shown)

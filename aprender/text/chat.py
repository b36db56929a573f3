"""A conversation as a model's own chat template writes it, when somebody asks for that.

Owns :func:`render_chat` and :func:`chat_ids`.  A template is a program from a stranger's file: nothing here looks at one on load, and it is
rendered by nothing but transformers' sandbox, which keeps it from files and attributes, though not from taking its time.  Refuses to
render without transformers.  Called by the commands for ``--chat``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aprender.errors import CannotRun, FormatError
from aprender.text import Tokenizer


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    named: Mapping[str, str] | None = None,
    source: str = "",
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation.

    Parameters
    ----------
    template : str
        Jinja, as :attr:`Tokenizer.chat_template` has it.
    messages : sequence of mapping
        Each with ``role`` and ``content``.
    named : mapping, optional
        Special tokens that the template may write, ``bos_token`` and the like (:attr:`Tokenizer.named`).
    source : str
        Where the template came from, for messages.
    add_generation_prompt : bool
        End where the model's answer begins.

    Raises
    ------
    CannotRun
        transformers or jinja2 is missing.
    FormatError
        The template cannot be rendered, or tried what the sandbox forbids.
    """
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise CannotRun(f"a chat template is rendered by transformers, which is missing: {error}", code="IMPORT", field="chat") from None
    try:
        made, _ = render_jinja_template(
            [list(messages)], chat_template=template, add_generation_prompt=add_generation_prompt, **(named or {})
        )
    except ImportError as error:
        raise CannotRun(f"a chat template cannot be rendered here: {error}", code="IMPORT", field="chat") from None
    except Exception as error:  # whatever a stranger's program may raise
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise FormatError(
            f"{source}: chat_template: it cannot be rendered: {why}", code="VALUE", path=source or None, field="chat_template"
        ) from None
    return str(made[0])


def chat_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt as a user's message in the model's own template, up to where the answer begins.

    The template writes every special token itself: none is added.

    Raises
    ------
    CannotRun
        The container has no chat template, or transformers is missing.
    FormatError, ArgumentError
        As :func:`render_chat` and :meth:`Tokenizer.encode`.
    """
    if tokenizer.chat_template is None:
        raise CannotRun(f"{tokenizer.source} has no chat template: leave --chat out", code="TOKENIZER", field="chat")
    message = {"role": "user", "content": prompt}
    return tokenizer.encode(render_chat(tokenizer.chat_template, [message], tokenizer.named, tokenizer.source), frame=False)

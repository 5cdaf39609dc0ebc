"""The text that a model is given for a task: the prompt itself, or a chat whose last turn the model continues."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import jinja2
from transformers import PreTrainedTokenizerBase

from dylo_moe.errors import PromptError

TEMPLATE_SECONDS = 10.0
TEMPLATE_CHARACTERS = 1_000_000
# EvalPlus 0.3.1's text that marks, inside the assistant's turn, where the model takes over.
SPLITTER = "-[[]]-this-is-really-our-highest-priority-[[]]-"


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    instruction: str | None,
    response: str | None,
    *,
    name: str = "model",
    seconds: float = TEMPLATE_SECONDS,
) -> str:
    """EvalPlus's chat prompt: the task in a user turn, and an assistant turn that is cut where the code begins.

    The text holds whatever special tokens the template writes: encode it without adding any.

    Raises:
        PromptError: a prefix is missing; the template fails, takes too long, writes too much, or loses the place where the
            model is to continue.
    """
    if instruction is None or response is None:
        raise PromptError(f"{name}: a chat prompt needs instruction_prefix and response_prefix; or use force_base_prompt")
    turns = [
        {"role": "user", "content": f"{instruction}\n```\n{task.strip()}\n```\n"},
        {"role": "assistant", "content": f"{response}\n```python\n{SPLITTER}\n```\n"},
    ]
    text = _within(seconds, lambda: tokenizer.apply_chat_template(turns, tokenize=False), name)
    if len(text) > TEMPLATE_CHARACTERS:
        raise PromptError(f"{name}: its chat template wrote {len(text)} characters, more than {TEMPLATE_CHARACTERS}")
    before, splitter, _ = text.partition(SPLITTER)
    if not splitter:
        raise PromptError(
            f"{name}: its chat template rewrites or drops the assistant's turn, so the model cannot continue it; "
            "use force_base_prompt"
        )
    return before


class _TimeIsUp(BaseException):
    """Raised inside the template's thread; not an Exception, so that no handler on the way swallows it."""


def _within(seconds: float, render: Callable[[], str], name: str) -> str:
    """Runs `render` in a thread and ends it after `seconds`: a template is code from a file, and may loop for ever."""
    outcome: list[str | Exception] = []

    def run() -> None:
        try:
            outcome.append(render())
        except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError, RecursionError) as error:
            outcome.append(error)
        except _TimeIsUp:
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_TimeIsUp))
        raise PromptError(f"{name}: its chat template ran for more than {seconds:g} s; use force_base_prompt")
    if not outcome:
        raise PromptError(f"{name}: its chat template failed")
    if isinstance(outcome[0], Exception):
        raise PromptError(f"{name}: its chat template failed: {' '.join(str(outcome[0]).split())[:200]}")
    return outcome[0]

"""What a check can end as, and the exceptions that say so.

pass            the check ran to its end
fail            an AssertionError, of which compare.Mismatch is one: the law does not hold
not applicable  NotApplicable(reason): the law says nothing about this checkpoint or subject
void            Void(reason): the check could not have failed, so that it passed means nothing
inconclusive    Inconclusive(reason): noise; the check escalated and still cannot tell
error           any other exception: the subject's, and the law is not shown to hold, or the judge's own (see
`is_subjects_fault`)
"""

from __future__ import annotations

from collections.abc import Iterable
from types import FrameType, TracebackType

PASS = "pass"
FAIL = "fail"
NOT_APPLICABLE = "not applicable"
VOID = "void"
INCONCLUSIVE = "inconclusive"
ERROR = "error"
OUTCOMES = (PASS, FAIL, NOT_APPLICABLE, VOID, INCONCLUSIVE, ERROR)

EXIT_PASSED = 0
EXIT_FAILED = 1
EXIT_UNUSABLE = 2
EXIT_JUDGE_FAILED = 3
EXIT_UNDECIDED = 4


class NotApplicable(Exception):
    """The law says nothing about this checkpoint or this subject; the text is the reason."""


class Void(Exception):
    """The check could not have failed: the experts' effect is not well above the tolerance."""


class Inconclusive(Exception):
    """The check escalated and the noise still hides the answer; the text says what was measured."""


class Unusable(Exception):
    """The command line, or a file that it names, cannot be used: one line for the user, exit code 2."""


def outcome_of(error: BaseException | None) -> str:
    """The outcome that an exception raised by a check stands for; None is a check that ran to its end."""
    if error is None:
        return PASS
    for kind, outcome in (
        (AssertionError, FAIL),
        (NotApplicable, NOT_APPLICABLE),
        (Void, VOID),
        (Inconclusive, INCONCLUSIVE),
    ):
        if isinstance(error, kind):
            return outcome
    return ERROR


def is_subjects_fault(error: BaseException, subjects_classes: Iterable[type]) -> bool:
    """Whose exception it is: True for the subject's (the law is not shown to hold), False for the judge's own failure.

    It is the subject's when a frame of its traceback runs in the subject's package, or in a method of an object of a
    class from there (so that a wrong signature, found by torch's `Module.__call__`, counts), or when the subject or its
    model lacks an attribute.
    """
    packages = {_package(kind.__module__) for kind in subjects_classes}
    missing_from = getattr(error, "obj", None) if isinstance(error, AttributeError) else None
    if missing_from is not None and _package(type(missing_from).__module__) in packages:
        return True
    return any(_belongs(frame, packages) for frame in _frames(error.__traceback__))


def is_raised_by_subject(error: BaseException, subjects_classes: Iterable[type]) -> bool:
    """Whether the subject's own code raised it, and nothing that it had called."""
    packages = {_package(kind.__module__) for kind in subjects_classes}
    *_, innermost = _frames(error.__traceback__)
    return _package(innermost.f_globals.get("__name__", "")) in packages


def _frames(traceback: TracebackType | None) -> Iterable[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _belongs(frame: FrameType, packages: set[str]) -> bool:
    if _package(frame.f_globals.get("__name__", "")) in packages:
        return True
    owner = frame.f_locals.get("self")
    return owner is not None and _package(type(owner).__module__) in packages


def _package(module: str) -> str:
    """The top package of a module; inside harness the module itself, because the judge's own subjects live there too."""
    return module if module.split(".")[0] == "harness" else module.split(".")[0]

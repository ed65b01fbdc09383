"""Which language a text is in: naive Bayes over byte n-grams (Lui and Baldwin 2012, langid.py, ACL demonstrations)."""

from collections.abc import Sequence

from poise.core.errors import MissingExtra, UsageError


def languages(texts: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Language of each text, as ISO 639-1 codes.

    Args:
        wanted: codes that the caller asks for, which must be among those that are told apart.

    Raises:
        MissingExtra: ``py3langid`` is not installed.
        UsageError: a code that is not known.
    """
    try:
        import py3langid
    except ImportError as error:
        raise MissingExtra("py3langid", "language") from error
    known = sorted(code for code, _ in py3langid.rank(""))
    if unknown := sorted(set(wanted) - set(known)):
        raise UsageError(
            f"language is a code of two letters, got {', '.join(unknown)}: there is {', '.join(known)}"
        )
    return [py3langid.classify(text)[0] for text in texts]

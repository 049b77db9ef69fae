"""Exercises of a page: predict, then look; and answers of the reader's that a cell tests."""

import hashlib
from collections.abc import Sequence

from IPython.display import HTML, Markdown

from nb_utils.text import verbatim

# The page needs no script: a choice that is made shows the reply that stands behind it.
STYLE = """<style>
.nb-ask { border: 1px solid; border-radius: 6px; padding: 0.4rem 1rem; margin: 0 0 1rem; }
.nb-ask legend { font-weight: 600; float: none; width: auto; font-size: inherit; padding: 0 0.4rem; }
.nb-ask p { display: none; margin: 0.2rem 0 0.4rem 1.5rem; }
.nb-ask input:checked ~ p { display: block; }
@media print { .nb-ask p { display: block; } .nb-ask p.nb-wrong { display: none; } }
</style>"""


def ask(question: str, choices: Sequence[str], right: int, because: str) -> HTML:
    """Ask a question whose reply appears once a choice is made: whether it is the one at ``right``, and why.

    All are text. Raises ValueError where ``right`` is no place in ``choices``.
    """
    if not 0 <= right < len(choices):
        raise ValueError(f"The right choice is {right}: it is one of 0 to {len(choices) - 1}.")
    name = "ask-" + hashlib.sha256(question.encode()).hexdigest()[:8]
    lines = [
        f'<div><input type="radio" name="{name}" id="{name}-{i}"> <label for="{name}-{i}">{verbatim(choice)}</label>'
        f"<p{' class=nb-wrong' * (i != right)}>{'Right' if i == right else 'No'}. {verbatim(because)}</p></div>"
        for i, choice in enumerate(choices)
    ]
    return HTML(f'{STYLE}<fieldset class="nb-ask"><legend>{verbatim(question)}</legend>{"".join(lines)}</fieldset>')


def check(given: float, true: float, within: float = 0.0) -> Markdown:
    """Say whether a number that the reader gave is right: at most ``within`` away."""
    if abs(given - true) <= within:
        return Markdown(f"**{given:g} is right.**")
    far = "low" if given < true else "high"
    return Markdown(f"**{given:g} is too {far}.** Change the number and run the cell again.")

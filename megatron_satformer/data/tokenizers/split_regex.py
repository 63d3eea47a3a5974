r"""Which split regexes mean the same to the two engines behind a tokenizer.json.

`tokenizers` runs a regex on Oniguruma, the fast backend on PCRE2. They agree on the syntax listed
here, compared over every code point with letters, digits, spaces and line ends around it. They
differ on what is left out: `\w` and `\b` (marks, enclosed letters), `\h` (a hex digit, a space),
`^` and `$` (of a line, of the text), `{1,3}+` (a repeat, possessive), `\p{Han}` (Unicode
versions), POSIX classes, nested classes, folding of case. On U+180E they disagree whether it is a
space, and on U+017F whether it is an s where case is folded: texts with one of these two are for
the exact tokenizer.
"""

import re

# In texts with one of these the two engines may differ even on the syntax below.
DISPUTED = ("\u180e", "\u017f")
# Groups without case that only these published patterns have; folding meets U+017F alone in them.
_FOLDED = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:[sdmt]|ll|ve|re)")
_CATEGORIES = "L|Lu|Ll|Lt|Lm|Lo|M|N|Nd|Nl|P|S|Z"
_ESCAPE = rf"\\[pP]\{{(?:{_CATEGORIES})\}}|\\[sSdDrnt]|\\[^\w\s]"
_CLASS = rf"\[\^?(?:{_ESCAPE}|[^\\\[\]&]|&(?!&))+\]"
_GROUP = r"\((?!\?)|\(\?(?::|=|!|<=|<!)|\)"
_REPEAT = r"(?:[?*+]|\{\d+(?:,\d*)?\}(?!\+))"
_LITERAL = r"[^\\\[\](){}^$?*+]"
SAFE = re.compile(rf"(?:{_ESCAPE}|{_CLASS}|{_GROUP}|{_REPEAT}|{_LITERAL})*", re.DOTALL)


def means_the_same(regex: str) -> bool:
    """Whether both engines cut every text without a DISPUTED character alike by this regex."""
    for group in _FOLDED:
        regex = regex.replace(group, "(?:x)")
    return SAFE.fullmatch(regex) is not None

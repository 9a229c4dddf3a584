"""Fill-in-the-middle: prefix, suffix, then middle (DeepSeek-V3, arXiv 2412.19437, section 4.1).

    <|fim_begin|> prefix <|fim_hole|> suffix <|fim_end|> middle <|endoftext|>

It is applied when a dataset is built, as in that paper to the text of whole documents before tokenizing: a cut may then
fall anywhere, also inside what would have been one token, as an editor's cursor does. At training time only tokens are
left, and a document's length in tokens, and so where it is packed, would depend on the random cut. Whether and where a
document is cut is a pure function of its key.
"""

from __future__ import annotations

from dryvine.trainer.data.encoding import TextPart
from dryvine.trainer.data.sampling import uniform


def rearrange(text: str, key: bytes, rate: float, markers: tuple[int, int, int] | None) -> tuple[TextPart, ...]:
    """The parts of a whole document in packing order: three for a share `rate` of all documents, else one. `markers`
    are the token ids before prefix, suffix and middle; without them no document is cut."""
    if not rate or markers is None or uniform("fim", key) >= rate:
        return (TextPart(None, text),)
    first, second = sorted(int(uniform(purpose, key) * (len(text) + 1)) for purpose in ("cut", "other cut"))
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    begin, hole, end = markers
    return (
        TextPart(begin, prefix, ends=not middle + suffix),
        TextPart(hole, suffix, starts=not prefix + middle),
        TextPart(end, middle, starts=not prefix, ends=not suffix),
    )

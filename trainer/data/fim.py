"""Fill-in-the-middle: prefix, suffix, then middle (DeepSeek-V3, arXiv 2412.19437, section 4.1).

    <|fim_begin|> prefix <|fim_hole|> suffix <|fim_end|> middle <|endoftext|>

Done when a dataset is built, on the text of whole documents before tokenizing, as there: a cut may then fall anywhere,
also inside what would have been one token, which is where a cursor stands. At reading time only tokens are left, and a
document's length in tokens, so its place in the packing, would depend on the draw. Whether and where a document is cut
is a pure function of its key.
"""

from __future__ import annotations

from dryvine.trainer.data.draw import draw
from dryvine.trainer.data.tokenizer import Vocabulary

Part = tuple[int | None, str]  # a special token, if any, and the text after it


def arrange(text: str, key: bytes, rate: float, vocabulary: Vocabulary) -> tuple[Part, ...]:
    """The parts of a document in the order in which they are packed: one, or three at the given rate."""
    if vocabulary.fim is None or draw("fim", key) >= rate:
        return ((None, text),)
    first, second = sorted(int(draw(use, key) * (len(text) + 1)) for use in ("cut", "other cut"))
    begin, hole, end = vocabulary.fim
    return (begin, text[:first]), (hole, text[second:]), (end, text[first:second])

"""The text files beside the weights: tokenizer, chat template, generation config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from dryvine.trainer.data import tokenizer as tokenizers
from dryvine.trainer.data.atomic import CannotWrite, write_atomically
from dryvine.trainer.data.tokenizer import Vocabulary
from dryvine.trainer.hand_off.errors import HandOffError

CONFIG = "tokenizer_config.json"
# Files of a released tokenizer beside its tokenizer.json.
COMPANIONS = (CONFIG, "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
# A base model was not trained on roles. This template asks for the next line of a plain-text dialogue.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class TokenizerFiles(NamedTuple):
    """A tokenizer.json, whatever its name, read."""

    file: Path
    vocabulary: Vocabulary
    chat_template: str

    @property
    def folder(self) -> Path:
        """Where its companions are."""
        return self.file.parent

    @property
    def end_text(self) -> str:
        return str(self.vocabulary.tokenizer.id_to_token(self.vocabulary.end))


def open_tokenizer(
    found: Path | None, given: Path | None, chat_template: Path | None, vocab: int, tuned: str | None = None
) -> TokenizerFiles:
    """Of `given` (a tokenizer.json, or its folder) if there is one, else of the run's own, `found`. `tuned`: the
    template that the run was fine-tuned with. Raises HandOffError or DataError."""
    path = given or found
    if path is None:
        raise HandOffError("the run's dataset is gone and with it the tokenizer: name one with --tokenizer PATH")
    file = path / "tokenizer.json" if path.is_dir() else path
    if given is None and not file.exists():
        raise HandOffError(f"{file}: the tokenizer is not there: name it with --tokenizer PATH")
    vocabulary = tokenizers.load(file)
    if vocabulary.size > vocab:
        raise HandOffError(f"{path}: has {vocabulary.size} token ids, and the model {vocab}: not its tokenizer")
    template = chat_template.read_text() if chat_template else tuned or _released_template(file.parent)
    return TokenizerFiles(file, vocabulary, template or PLAIN_TEMPLATE)


def _released_template(folder: Path) -> str | None:
    """The one that came with the tokenizer."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    if not (folder / CONFIG).exists():
        return None
    template = json.loads((folder / CONFIG).read_text()).get("chat_template")
    return template if isinstance(template, str) else None


def write_tokenizer(tokenizer: TokenizerFiles, out: Path, max_position: int) -> None:
    """Write tokenizer.json unchanged, its config, the chat template, and generation_config.json. Raises
    CannotWrite."""
    _copy(tokenizer.file, out / "tokenizer.json")
    end = tokenizer.end_text
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_position,
    }
    released = tokenizer.folder / CONFIG
    if released.exists():
        config = json.loads(released.read_text())
    write_json(out / CONFIG, config | {"chat_template": tokenizer.chat_template})
    write_atomically(out / "chat_template.jinja", tokenizer.chat_template)
    generation = {"eos_token_id": tokenizer.vocabulary.end, "pad_token_id": tokenizer.vocabulary.end}
    write_json(out / "generation_config.json", {"do_sample": False, **generation})


def copy_released(folder: Path, out: Path) -> bool:
    """Keep the tokenizer of a released checkpoint for a later export. Returns whether it has one. Raises
    CannotWrite."""
    if not (folder / "tokenizer.json").exists():
        return False
    with CannotWrite.naming(out):
        out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", *COMPANIONS):
        if (folder / name).exists():
            _copy(folder / name, out / name)
    return True


def _copy(file: Path, to: Path) -> None:
    with CannotWrite.naming(to):
        shutil.copyfile(file, to)


def write_json(path: Path, tree: object) -> None:
    """Raises CannotWrite."""
    write_atomically(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")

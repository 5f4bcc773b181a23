"""HYTokenizer: the tokenizer of a checkpoint that brings hy.tiktoken, for transformers and so for vLLM.

Ids come from tiktoken (text_encoder.py); decoding, streaming, offsets and saving from `tokenizers` (vocab.py).
"""

import logging
import unicodedata
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer, BatchEncoding, TokenizersBackend
from transformers.models.auto import tokenization_auto

from hunyuan_vllm import envs
from hunyuan_vllm.chat_template import CHAT_TEMPLATE, known_faults, replacement
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.errors import UserError
from hunyuan_vllm.text_encoder import TextEncoder
from hunyuan_vllm.vocab import END_OF_TEXT, EOS, PAD, SPECIAL_TOKENS, START_OF_TEXT, build_tokenizer, read_tokens

__all__ = ["HYTokenizer", "load_tokenizer", "register_tokenizer"]

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name

# Arguments of `_encode_plus` that one text, neither padded nor made a tensor, can be encoded with by tiktoken.
_PLAIN = {
    "add_special_tokens", "max_length", "pad_to_multiple_of", "padding_side", "padding_strategy",
    "return_attention_mask", "split_special_tokens", "truncation_strategy", "verbose",
}  # fmt: skip

_Text = TypeVar("_Text")


class HYTokenizer(TokenizersBackend):
    """Tokenizer of the Hunyuan-Large family, named as the published tokenizer_config.json names it.

    Text is brought to NFC first. A plain text gets <|startoftext|> in front (unless `add_bos_token`, or the published
    `add_bod_token`, is false) and <|endoftext|> behind only if `add_eos_token` or `add_eod_token` is true.
    A checkpoint without a chat template, or with one that is known to be wrong (see `known_faults`), gets the built-in
    one. A tokenizer.json, where there is one, is used as it is.

    Raises:
        ValueError: neither file is there, or hy.tiktoken is damaged (see `read_tokens`).
    """

    vocab_files_names = {"vocab_file": "hy.tiktoken", "tokenizer_file": "tokenizer.json"}

    def __init__(self, vocab_file: str | None = None, tokenizer_file: str | None = None, **kwargs: Any) -> None:
        self._as_given = tokenizer_file is not None
        self._text_encoder: TextEncoder | None = None
        if kwargs.get("chat_template") is None:
            kwargs["chat_template"] = CHAT_TEMPLATE
        if tokenizer_file is not None:
            self._tokenizer = Tokenizer.from_file(tokenizer_file)
        elif vocab_file is not None:
            tokens = read_tokens(vocab_file)
            self._tokenizer = build_tokenizer(tokens)
            self._text_encoder = TextEncoder(tokens)
            kwargs = _with_defaults(kwargs)
        else:
            raise ValueError(
                f"{kwargs.get('name_or_path', 'The checkpoint')} has neither hy.tiktoken nor tokenizer.json. Copy it "
                "there from the published checkpoint, or name another folder as the tokenizer"
            )
        super().__init__(vocab_file=vocab_file, **kwargs)

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Leave the files to `__init__`; the base class knows no format of this name."""
        return kwargs

    def get_chat_template(self, chat_template: str | None = None, tools: list[dict[str, Any]] | None = None) -> str:
        """The template that a conversation is rendered with: the one asked for, else the checkpoint's unless it is
        known to be wrong, else the built-in one."""
        template: str = super().get_chat_template(chat_template, tools)
        if chat_template is not None or envs.checkpoint_chat_template() or not (faults := known_faults(template)):
            return template
        _say_replaced(faults)
        return CHAT_TEMPLATE

    def update_post_processor(self) -> None:
        """Put the document's start and end around a text as `add_bos_token` and `add_eos_token` say."""
        if self._as_given:
            return super().update_post_processor()
        head = [START_OF_TEXT] if self.add_bos_token else []
        tail = [END_OF_TEXT] if self.add_eos_token else []
        self._head, self._tail = self.convert_tokens_to_ids(head), self.convert_tokens_to_ids(tail)
        self._tokenizer.post_processor = TemplateProcessing(
            single=[*head, "$A", *tail],
            pair=[*head, "$A", *tail, *head, "$B:1", *tail],
            special_tokens=[*zip(head, self._head, strict=True), *zip(tail, self._tail, strict=True)],
        )

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        added = super()._add_tokens(new_tokens, special_tokens)
        if self._text_encoder is not None and len(self) > self._text_encoder.n_vocab:
            self._text_encoder = None  # its vocabulary is fixed; the pipeline encodes alike, only slower
        return added

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """Where every public way to encode ends: one text goes to tiktoken, anything else to the pipeline."""
        pipeline = super()._encode_plus
        if self._as_given:
            return pipeline(text, text_pair, **kwargs)

        def by_pipeline() -> BatchEncoding:
            return pipeline(self._normalised(text), self._normalised(text_pair), **kwargs)

        if (
            self._text_encoder is None
            or not isinstance(text, str)
            or text_pair is not None
            or not self._is_plain(kwargs)
        ):
            return by_pipeline()
        ids = self._text_encoder(_nfc(text), special_tokens=not kwargs.get("split_special_tokens"))
        head, tail = (self._head, self._tail) if kwargs.get("add_special_tokens", True) else ([], [])
        if kwargs.get("truncation_strategy", "do_not_truncate") != "do_not_truncate":
            room = max(kwargs["max_length"] - len(head) - len(tail), 0)
            ids = ids[:room] if self.truncation_side == "right" else ids[max(len(ids) - room, 0) :]
        data = {"input_ids": [*head, *ids, *tail]}
        if kwargs.get("return_attention_mask") is not False:
            data["attention_mask"] = [1] * len(data["input_ids"])
        return _LateEncoding(data, lambda: by_pipeline().encodings)

    def _is_plain(self, kwargs: dict[str, Any]) -> bool:
        """Whether one text under these arguments of `_encode_plus` needs nothing but its ids and a mask of ones."""
        return (
            kwargs.get("padding_strategy", "do_not_pad") == "do_not_pad"
            and kwargs.get("truncation_strategy", "do_not_truncate") != "only_second"
            and all(name in _PLAIN or not value for name, value in kwargs.items())
            and self.model_input_names == ["input_ids", "attention_mask"]
        )

    def _normalised(self, text: _Text) -> _Text:
        """`text`, or each of a list, so that the pipeline's own NFC, which knows an older Unicode, leads to today's.

        Text on which both agree stays as it is, so that offsets count its characters.
        """
        if isinstance(text, list | tuple):
            return type(text)(map(self._normalised, text))
        if not isinstance(text, str):
            return text
        well_formed, nfc = _well_formed(text), _nfc(text)
        agreed = well_formed == nfc or self._tokenizer.normalizer.normalize_str(well_formed) == nfc
        return well_formed if agreed else nfc  # type: ignore[return-value]


class _LateEncoding(BatchEncoding):
    """Ids and mask at once; the alignment with the text (`tokens()`, `char_to_token()`, …) when first asked for."""

    def __init__(self, data: dict[str, Any], align: Callable[[], list[Encoding]]) -> None:
        super().__init__(data, n_sequences=1)
        self._align = align
        del self._encodings  # set by the base class; from here on the property below answers

    @cached_property
    def _encodings(self) -> list[Encoding]:
        return self._align()


def register_tokenizer() -> None:
    """Make `AutoTokenizer`, and through it vLLM, load Hunyuan-Large checkpoints with `HYTokenizer`. Idempotent."""
    model_type = HunYuanConfig.model_type
    AutoTokenizer.register(HunYuanConfig, HYTokenizer, exist_ok=True)
    # Whatever class or remote code tokenizer_config.json names: transformers keeps a list of the model types whose
    # checkpoints name the wrong one, and loads those with the class that the model type maps to.
    tokenization_auto.TOKENIZER_MAPPING_NAMES[model_type] = HYTokenizer.__name__
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(model_type)


def load_tokenizer(name: str | Path) -> HYTokenizer:
    """The tokenizer in a checkpoint's folder, or of a hub name; without vLLM.

    Raises:
        UserError: there is none that can be read.
    """
    AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
    register_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the tokenizer of {name} does not load: {reason}") from None


@cache
def _say_replaced(faults: tuple[str, ...]) -> None:
    """Once a process."""
    logger.warning("For chats, %s", replacement(faults))


def _with_defaults(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json` completed by what the published class assumes where the file is silent."""
    starts = (kwargs.pop("add_bos_token", None), kwargs.pop("add_bod_token", None), True)
    ends = (kwargs.pop("add_eos_token", None), kwargs.pop("add_eod_token", None), False)
    given = kwargs.pop("extra_special_tokens", None) or kwargs.pop("additional_special_tokens", None) or ()
    return {
        "bos_token": START_OF_TEXT,
        "eos_token": EOS,
        "pad_token": PAD,
        **kwargs,
        "add_bos_token": next(flag for flag in starts if flag is not None),
        "add_eos_token": next(flag for flag in ends if flag is not None),
        "extra_special_tokens": [*SPECIAL_TOKENS, *(token for token in given if str(token) not in SPECIAL_TOKENS)],
    }


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", _well_formed(text))


def _well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, as tiktoken does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

"""HYTokenizer: the tokenizer of Hunyuan checkpoints, for transformers and so for vLLM.

Ids come from tiktoken (text_encoder.py); decoding, streaming, offsets and saving from `tokenizers` (vocab.py).
"""

import json
import logging
import unicodedata
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BatchEncoding,
    HunYuanDenseV1Config,
    HunYuanMoEV1Config,
    TokenizersBackend,
)
from transformers.models.auto import tokenization_auto

from hunyuan_vllm import envs
from hunyuan_vllm.bpe import (
    END_OF_TEXT,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    START_OF_TEXT,
    V1_SPECIAL_TOKENS,
    TextEncoder,
    build_tokenizer,
    read_tokens,
)
from hunyuan_vllm.chat_template import (
    CHAT_TEMPLATE,
    RenderedChat,
    SpecialTokens,
    known_faults,
    new_mark,
    prompt_time,
    replacement,
)
from hunyuan_vllm.config import CONFIG_CLASSES, HunYuanConfig
from hunyuan_vllm.util.errors import UserError

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name

# Arguments of `_encode_plus` that one text, neither padded nor made a tensor, can be encoded with by tiktoken.
_PLAIN = {
    "add_special_tokens", "max_length", "pad_to_multiple_of", "padding_side", "padding_strategy",
    "return_attention_mask", "split_special_tokens", "truncation_strategy", "verbose",
}  # fmt: skip

# Arguments of `apply_chat_template` that are not for the template itself.
_NOT_RENDERED = {
    "add_generation_prompt", "chat_template", "continue_final_message", "max_length", "padding",
    "return_assistant_tokens_mask", "return_dict", "return_tensors", "truncation",
}  # fmt: skip
_FINISHING = {"pad_to_multiple_of", "padding_side", "padding_strategy", "return_tensors"}
_TOKENIZING = {"max_length", "padding", "return_tensors", "truncation"}

_Text = TypeVar("_Text")


class HYTokenizer(TokenizersBackend):
    """Tokenizer of Hunyuan checkpoints, named as the published tokenizer_config.json names it. Chats are rendered and
    encoded alike for all of them.

    A tokenizer.json, where there is one, is used as it is. With hy.tiktoken, text is brought to NFC first; a plain text
    gets <|startoftext|> in front (unless `add_bos_token`, or the published `add_bod_token`, is false) and <|endoftext|>
    behind only if `add_eos_token` or `add_eod_token` is true.
    A checkpoint without a chat template, or with one that is known to be wrong (see `known_faults`), gets the built-in
    one.

    Raises:
        ValueError: neither file is there, or hy.tiktoken is damaged (see `read_tokens`).
    """

    vocab_files_names = {"vocab_file": "hy.tiktoken", "tokenizer_file": "tokenizer.json"}

    def __init__(self, vocab_file: str | None = None, tokenizer_file: str | None = None, **kwargs: Any) -> None:
        self._as_given = tokenizer_file is not None
        self._clock = envs.prompt_clock()
        self._text_encoder: TextEncoder | None = None
        template: str | None = CHAT_TEMPLATE
        if tokenizer_file is not None:
            self._tokenizer = Tokenizer.from_file(tokenizer_file)
            if self._tokenizer.token_to_id(START_OF_TEXT) is None:  # the smaller vocabulary, of another format
                template = None
        elif vocab_file is not None:
            tokens = read_tokens(vocab_file)
            special = _special_tokens(Path(vocab_file).parent, len(tokens))
            self._tokenizer = build_tokenizer(tokens, special)
            self._text_encoder = TextEncoder(tokens, special)
            kwargs = _with_defaults(kwargs, special)
        else:
            raise ValueError(
                f"{kwargs.get('name_or_path', 'The checkpoint')} has neither hy.tiktoken nor tokenizer.json. Copy it "
                "there from the published checkpoint, or name another directory as the tokenizer"
            )
        if kwargs.get("chat_template") is None:
            kwargs["chat_template"] = template
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
        _warn_of_template(faults)
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

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        *args: Any,
        tokenize: bool = True,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base class, but special tokens in messages, tools, documents and template variables are plain text.

        The time in prompts changes each minute, or as HUNYUAN_VLLM_PROMPT_CLOCK says.
        A conversation that ends with an answer is left open where an answer is asked for: the model goes on with it.

        Args:
            tokenizer_kwargs: for the tokenizer. With {"split_special_tokens": False} special tokens in messages are
                special, as they are with the base class.
        """
        if kwargs.get("add_generation_prompt") and _ends_with_answer(conversation):
            kwargs |= {"add_generation_prompt": False, "continue_final_message": True}
        kwargs.setdefault("strftime_now", partial(prompt_time, self._clock))
        given = [conversation, tools, documents, {name: kwargs[name] for name in kwargs.keys() - _NOT_RENDERED}]
        mark = new_mark()
        special = (tokenizer_kwargs or {}).get("split_special_tokens") is False
        marked = given if special or args else self._special.mark(given, mark)
        if marked == given:
            return super().apply_chat_template(
                conversation, tools, documents, *args, tokenize=tokenize, tokenizer_kwargs=tokenizer_kwargs, **kwargs
            )
        *marked, variables = marked
        rendered = super().apply_chat_template(*marked, tokenize=False, **kwargs | variables)
        batch = not isinstance(rendered, str)
        text = [self._special.unmark(one, mark) for one in rendered] if batch else self._special.unmark(rendered, mark)
        if not tokenize:
            return text
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError("return_assistant_tokens_mask is not supported where messages quote special tokens")
        options = {name: kwargs[name] for name in kwargs.keys() & _TOKENIZING} | (tokenizer_kwargs or {})
        encoded = self(text, add_special_tokens=False, **options)
        return encoded if kwargs.get("return_dict", True) else encoded["input_ids"]

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self.get_added_vocab())

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        added = super()._add_tokens(new_tokens, special_tokens)
        self.__dict__.pop("_special", None)
        if self._text_encoder is not None and len(self) > self._text_encoder.n_vocab:
            self._text_encoder = None  # its vocabulary is fixed; the pipeline encodes alike, only slower
        return added

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """Where every public way to encode ends: one text goes to tiktoken, anything else to the pipeline."""
        pipeline = super()._encode_plus
        if isinstance(text, RenderedChat):
            return self._encode_rendered(text, kwargs)
        if isinstance(text, list) and any(isinstance(one, RenderedChat) for one in text):
            return self._encode_batch(text, kwargs)
        if self._as_given:
            return pipeline(text, text_pair, **kwargs)

        def by_pipeline() -> BatchEncoding:
            return pipeline(self._normalised(text), self._normalised(text_pair), **kwargs)

        plain = isinstance(text, str) and text_pair is None and self._is_plain(kwargs)
        if self._text_encoder is None or not plain:
            return by_pipeline()
        ids = self._text_encoder(_nfc(text), special_tokens=not kwargs.get("split_special_tokens"))
        head, tail = (self._head, self._tail) if kwargs.get("add_special_tokens", True) else ([], [])
        data = {"input_ids": [*head, *self._cut(ids, len(head) + len(tail), kwargs), *tail]}
        if kwargs.get("return_attention_mask") is not False:
            data["attention_mask"] = [1] * len(data["input_ids"])
        return _LateEncoding(data, lambda: by_pipeline().encodings)

    def _cut(self, tokens: list[Any], others: int, kwargs: dict[str, Any]) -> list[Any]:
        """`tokens` as truncated under these arguments of `_encode_plus`, with room left for `others` around them."""
        if kwargs.get("truncation_strategy", "do_not_truncate") == "do_not_truncate":
            return tokens
        room = max(kwargs["max_length"] - others, 0)
        return tokens[:room] if self.truncation_side == "right" else tokens[max(len(tokens) - room, 0) :]

    def _encode_rendered(self, text: RenderedChat, kwargs: dict[str, Any]) -> BatchEncoding:
        """A conversation piece by piece: ids, a mask of ones and, where asked for, the pieces' offsets."""
        tokens: list[tuple[int, tuple[int, int]]] = []
        want_offsets = bool(kwargs.get("return_offsets_mapping"))
        for piece, place, special in self._special.pieces(text):
            part = self._encode_plus(
                piece, add_special_tokens=False, split_special_tokens=not special, return_offsets_mapping=want_offsets
            )
            offsets = part["offset_mapping"] if want_offsets else [(0, 0)] * len(part["input_ids"])
            tokens += zip(part["input_ids"], [(place + start, place + end) for start, end in offsets], strict=True)
        around = self._encode_plus("")["input_ids"] if kwargs.get("add_special_tokens", True) else []
        head = around if self._as_given else around[: len(self._head)]
        tail = around[len(head) :]
        tokens = (
            [(id_, (0, 0)) for id_ in head] + self._cut(tokens, len(around), kwargs) + [(id_, (0, 0)) for id_ in tail]
        )
        data: dict[str, Any] = {"input_ids": [id_ for id_, _ in tokens], "attention_mask": [1] * len(tokens)}
        if want_offsets:
            data["offset_mapping"] = [offsets for _, offsets in tokens]
        return self._finished(BatchEncoding(data), kwargs, batch=False)

    def _encode_batch(self, texts: list[str], kwargs: dict[str, Any]) -> BatchEncoding:
        single = {name: value for name, value in kwargs.items() if name not in _FINISHING}
        rows = [self._encode_plus(text, **single) for text in texts]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return self._finished(BatchEncoding(columns), kwargs, batch=True)

    def _finished(self, encoded: BatchEncoding, kwargs: dict[str, Any], batch: bool) -> BatchEncoding:
        """Padded and made tensors as these arguments of `_encode_plus` say."""
        if kwargs.get("padding_strategy", "do_not_pad") != "do_not_pad":
            names = ("max_length", "pad_to_multiple_of", "padding_side")
            options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            encoded = self.pad(encoded, padding=kwargs["padding_strategy"], **options)
        if kwargs.get("return_tensors"):
            encoded.convert_to_tensors(kwargs["return_tensors"], prepend_batch_axis=not batch)
        return encoded

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
    """Make `AutoTokenizer`, and through it vLLM, load all Hunyuan checkpoints with `HYTokenizer`. Idempotent."""
    for config in (*CONFIG_CLASSES.values(), HunYuanMoEV1Config, HunYuanDenseV1Config):
        AutoTokenizer.register(config, HYTokenizer, exist_ok=True)
        # Whatever class or remote code tokenizer_config.json names: transformers keeps a list of the model types whose
        # checkpoints name the wrong one, and loads those with the class that the model type maps to.
        tokenization_auto.TOKENIZER_MAPPING_NAMES[config.model_type] = HYTokenizer.__name__
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(config.model_type)


def load_tokenizer(name: str | Path) -> HYTokenizer:
    """The tokenizer in a checkpoint's directory, or of a hub name; without vLLM."""
    AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
    register_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the tokenizer of {name} does not load: {reason}") from None


@cache
def _warn_of_template(faults: tuple[str, ...]) -> None:
    logger.warning("For chats, %s", replacement(faults))


def _ends_with_answer(conversation: Any) -> bool:
    """Whether the last message is the beginning of an answer: an assistant's, with a text and without calls."""
    last = conversation[-1] if isinstance(conversation, list) and conversation else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or last.get("tool_calls"):
        return False
    content = last.get("content")
    if isinstance(content, list):
        content = content[-1].get("text") if content and isinstance(content[-1], dict) else None
    return isinstance(content, str) and bool(content.strip())


def _special_tokens(directory: Path, ranks: int) -> tuple[str, ...]:
    """Those of V1 where config.json has a vocabulary of exactly their number; Hunyuan-Large's is padded."""
    try:
        vocab_size = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        vocab_size = None
    return V1_SPECIAL_TOKENS if vocab_size == ranks + len(V1_SPECIAL_TOKENS) else SPECIAL_TOKENS


def _with_defaults(kwargs: dict[str, Any], special: tuple[str, ...]) -> dict[str, Any]:
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
        "extra_special_tokens": [*special, *(token for token in given if str(token) not in special)],
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

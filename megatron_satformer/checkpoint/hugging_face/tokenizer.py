"""Gives an exported folder the tokenizer that the training data was made with, id for id.

Whatever the type, what is written is a `tokenizers` pipeline that AutoTokenizer loads without
further packages. What must agree is what the data tools, and Megatron, write into the data: with
SentencePiece, strings such as "</s>" in the text are text, and nothing is added at either end. Each
export is checked on thousands of texts; a tokenizer that cannot be carried over exactly is refused.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_satformer.checkpoint.hugging_face.tokenizer_source import WAY_OUT
from megatron_satformer.data.tokenizers.exact import (
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
)
from megatron_satformer.data.tokenizers.exportable import sentencepiece_obstacle
from megatron_satformer.data.tokenizers.hugging_face import (
    GPT2_END,
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
)
from megatron_satformer.data.tokenizers.options import TokenizerOptions
from megatron_satformer.data.tokenizers.sentencepiece_pipeline import (
    SAMPLE_TEXTS,
    SPACE,
    build_pipeline,
    control_pieces,
    random_texts,
    read_proto,
    unknown_piece,
)
from megatron_satformer.data.tokenizers.tiktoken_tokenizer import PATTERNS, TikTokenizer

# of a large vocabulary, so many pieces make the random texts
PIECES = 4000
# transformers 4 knows this class, and 5 takes it for its own TokenizersBackend
CLASS = "PreTrainedTokenizerFast"
# how a tokenizer was loaded here, which is nobody else's business
_TRACES = (
    *("is_local", "local_files_only", "trust_remote_code", "fix_mistral_regex", "name_or_path"),
    *("tokenizer_file", "special_tokens_map_file", "cache_dir", "token", "revision", "subfolder"),
)


def load_tokenizer(folder: Path, config: Any = None) -> Any:
    """Loads what was exported, without running code.

    Args:
        folder: With the tokenizer's files.
        config: Of the model, where its config.json lies beside them: it has a say in the class.
    """
    # False, not left out: transformers would ask the terminal
    return AutoTokenizer.from_pretrained(
        folder, config=config, local_files_only=True, trust_remote_code=False
    )


def save_tokenizer(tokens: Any, folder: Path) -> None:
    """Writes a tokenizer's files so that transformers 4.57 reads them, too, as they are.

    Args:
        tokens: From `build_transformers_tokenizer`.
        folder: Where.
    """
    tokens.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content = {k: v for k, v in content.items() if k not in _TRACES and not k.startswith("_")}
    if (folder / "tokenizer.json").is_file():
        content["tokenizer_class"] = CLASS
        # else that class has token_type_ids in transformers 4, which generate() refuses
        content.setdefault("model_input_names", ["input_ids", "attention_mask"])
        content.pop("backend", None)
    if isinstance(content.get("extra_special_tokens"), list):
        # its name in transformers 4, where the new one is a dictionary; 5 reads both
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(f"{text}\n", encoding="utf-8")


def build_transformers_tokenizer(
    options: TokenizerOptions, chat_template: str | None = None
) -> Any:
    """Builds the transformers tokenizer for the flags of any type that can be trained with.

    Args:
        options: The tokenizer flags.
        chat_template: In place of the tokenizer's own; None keeps it.

    Raises:
        ValueError: If a file is not what it must be, or cannot be carried over.
    """
    if options.tokenizer_type == "NullTokenizer":
        raise ValueError(f"tokenizer_type (NullTokenizer) has no text. {WAY_OUT}")
    reference = build_tokenizer(options)
    tokenizer: Any
    if isinstance(reference, SentencePieceTokenizer):
        tokenizer = _from_sentencepiece(Path(str(options.tokenizer_model)))
    elif isinstance(reference, HuggingFaceTokenizer):
        tokenizer = _from_hugging_face(reference)
    elif isinstance(reference, GPT2BPETokenizer):
        tokenizer = _wrap(reference.backend, dict.fromkeys(("bos", "eos", "unk", "pad"), GPT2_END))
    else:
        assert isinstance(reference, TikTokenizer)
        tokenizer = _from_tiktoken(reference, PATTERNS[options.tiktoken_pattern or "v2"])
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _wrap(backend: Any, names: dict[str, str], **options: bool) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": token for name, token in names.items()},
        **options,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
        padding_side="left",
    )


def _from_hugging_face(reference: HuggingFaceTokenizer) -> Any:
    tokenizer = reference.tokenizer
    # the reference has lifted the limit, to be quiet about long documents
    tokenizer.model_max_length = tokenizer.init_kwargs.get("model_max_length", int(1e30))
    if not reference.add_special_tokens and reference.fast is not None:
        reference.fast.backend.post_processor = None
    return tokenizer


def _from_tiktoken(reference: TikTokenizer, pattern: str) -> PreTrainedTokenizerFast:
    """Any two neighbours that make a token may merge, the best token first: ranks as merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    encoding, letters = reference.encoding, bytes_to_unicode()
    special = {encoding.encode_single_token(name): name for name in encoding.special_tokens_set}
    tokens = {
        "".join(letters[byte] for byte in encoding.decode_single_token_bytes(n)): n
        for n in range(len(special), reference.vocab_size)
    }
    merges = [
        (token[:cut], token[cut:])
        for token in tokens  # in the order of their ranks
        for cut in range(1, len(token))
        if token[:cut] in tokens and token[cut:] in tokens
    ]
    vocabulary = {name: n for n, name in special.items()} | tokens
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(special[n], normalized=False) for n in range(len(special))]
    )
    return _wrap(backend, {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"})


def _from_sentencepiece(model: Path) -> PreTrainedTokenizerFast:
    """Raises ValueError if the model has a feature that cannot be carried over."""
    from tokenizers import AddedToken

    proto = read_proto(model)
    obstacle = sentencepiece_obstacle(proto)
    if obstacle is not None:
        raise ValueError(
            f"tokenizer ({model}) has {obstacle}, which cannot be exported exactly. {WAY_OUT}"
        )
    tokenizer = build_pipeline(proto)
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False) for piece in control_pieces(proto)]
    )
    names = {"unk": unknown_piece(proto)} | {
        name: proto.pieces[index].piece
        for name in ("bos", "eos", "pad")
        if (index := getattr(proto.trainer_spec, f"{name}_id")) >= 0
    }
    names.setdefault("pad", names.get("eos", names["unk"]))
    return _wrap(tokenizer, names, split_special_tokens=True)  # "</s>" in a text is text


def check_same_ids(
    tokenizer: Any, options: TokenizerOptions, count: int = 3000, seed: int = 0
) -> int:
    """Compares ids with the reference's on awkward and on random texts; with SentencePiece, text.

    Args:
        tokenizer: A transformers tokenizer.
        options: Flags of the tokenizer that it stands for.
        count: Number of random texts, concatenations of the vocabulary's own pieces and bytes.
        seed: Of the random texts.

    Returns:
        Number of texts compared.

    Raises:
        ValueError: On the first text whose ids, or whose ids' text, differ.
    """
    reference = build_tokenizer(options)
    where = options.tokenizer_model or options.vocab_file
    if len(tokenizer) != reference.vocab_size:
        raise ValueError(
            f"tokenizer ({where}) has {reference.vocab_size} pieces, exported {len(tokenizer)}: "
            f"two of them are equal. {WAY_OUT}"
        )
    texts = [*SAMPLE_TEXTS, *random_texts(_pieces(reference), count, seed)]
    for text in texts:
        expected = reference.encode(text)
        actual = tokenizer(text).input_ids
        if actual != expected:
            raise ValueError(
                f"tokenizer ({where}) cannot be exported exactly: {text!r} gives {expected} in "
                f"training and {actual} in the exported tokenizer. {WAY_OUT}"
            )
        if isinstance(reference, SentencePieceTokenizer):
            _check_text(tokenizer, reference, expected)
    return len(texts)


def _check_text(tokenizer: Any, reference: SentencePieceTokenizer, ids: list[int]) -> None:
    if reference.processor.unk_id() in ids:
        return
    expected, decoded = reference.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)
    if decoded != expected:
        raise ValueError(
            f"tokenizer cannot be exported exactly: {ids} is the text {expected!r} in "
            f"sentencepiece and {decoded!r} in the exported tokenizer. {WAY_OUT}"
        )


def _pieces(reference: Tokenizer) -> list[str]:
    ids = range(0, reference.vocab_size, max(1, reference.vocab_size // PIECES))
    if isinstance(reference, SentencePieceTokenizer):
        return [reference.processor.id_to_piece(n).replace(SPACE, " ") for n in ids]
    return [reference.decode([n]) for n in ids]

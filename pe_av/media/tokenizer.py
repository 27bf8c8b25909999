"""Tokenizers: reading a checkpoint's own, and training a byte-level BPE for a model with random weights."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["[PAD]", "[CLS]", "[SEP]"]  # ids 0, 1, 2


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer, which can encode any text. It puts [CLS] before and [SEP] after.

    Args:
        captions: the text to learn merges from.
        vocab_size: upper limit of the vocabulary; at least 259, for the 256 bytes and three special tokens.
    Raises:
        ValueError: `vocab_size` is too small.
    """
    if vocab_size < 256 + len(SPECIAL):
        raise ValueError(f"vocab_size={vocab_size} cannot hold the 256 bytes and {len(SPECIAL)} special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The `tokenizer.json` in the folder `path`, or beside the file `path`.

    Raises:
        ValueError: there is none, or it is not a tokenizer.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; text weights are of no use without the tokenizer they were trained with"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer ({error}); replace it by the model's own") from None

"""A byte-level BPE tokenizer of about 384 tokens, trained on the fly on a few lines of Python."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
VOCAB_SIZE = 384

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "[{{ message['role'] }}]\n{{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)

CORPUS = (
    "def add(a, b):\n    return a + b\n\n\ndef scale(values, factor):\n    return [value * factor for value in values]\n",
    "import math\nfrom typing import List\n\n\ndef mean(numbers: List[float]) -> float:\n"
    '    """Return the mean of the numbers.\n\n    >>> mean([1.0, 2.0])\n    1.5\n    """\n'
    "    if not numbers:\n        raise ValueError('no numbers')\n    return sum(numbers) / len(numbers)\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    "        self.items.append(item)\n\n    def pop(self):\n        return self.items.pop()\n",
    "for index, value in enumerate(sorted(values)):\n    if value > limit:\n        break\n    else:\n        continue\n",
    "while left < right:\n"
    "    middle = (left + right) // 2\n    if values[middle] < target:\n        left = middle + 1\n"
    "    else:\n        right = middle\nreturn left\n",
    "def count_words(text: str) -> dict:\n    counts = {}\n    for word in text.split():\n"
    "        counts[word] = counts.get(word, 0) + 1\n    return counts\n",
    "assert is_prime(7) == True\nassert is_prime(8) == False\nprint('the result is', result)\n",
    "try:\n    number = int(text)\nexcept ValueError:\n    number = None\nfinally:\n    print(number)\n",
    "Write a function to find the longest string in a list of strings. Return None if the list is empty.\n",
)


def train_tokenizer(family: str, *, chat_template: bool) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a base model of `family`; see `harness.specimens.bases.FAMILIES`.

    All 256 bytes are in the vocabulary, so every text round-trips (Qwen's: every text in Unicode's NFC form).
    Llama's and Gemma's put the bos token first, as the real ones do; the other two do not.
    """
    backend = _train()
    special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    shared = {"clean_up_tokenization_spaces": False, "padding_side": "left"}
    if family == "qwen":  # AutoTokenizer always opens a Qwen2 directory with this class, which rebuilds its own backend
        model = json.loads(backend.to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, unk_token=EOS, **special, **shared)
    else:
        if family in ("llama", "gemma"):
            backend.post_processor = _bos_first(backend)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special, **shared)
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _train() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _bos_first(backend: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )

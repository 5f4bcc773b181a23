"""Makes small.tiktoken: 2,200 byte-pair ranks, trained on the text below.

    python tests/data/make_small_vocab.py

The text is English, Chinese, some Japanese, Korean, Russian and Arabic, emoji and code, so that the vocabulary has
merges inside and across multi-byte characters. The result depends on nothing but this file.
"""

import base64
import itertools
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from hunyuan_vllm.bpe import TOKEN_START, byte_alphabet

RANKS = 2200
PATTERN = TOKEN_START + r"|\s*[\r\n]+|\s+(?!\S)|\s+"

ENGLISH = (
    ["The captain", "My grandmother", "A young engineer", "Nobody", "The old lighthouse keeper", "Our teacher",
     "Every student in the village", "The river", "A merchant from the coast", "The committee"],
    ["doesn't remember", "carefully measured", "was looking for", "will never forget", "had already described",
     "couldn't explain", "quietly repaired", "wouldn't sell", "has been counting", "thinks about"],
    ["the colour of the evening sky", "three hundred and twelve wooden boxes", "a broken telescope",
     "the shortest way across the mountains", "an unfinished letter", "the salt in the sea water",
     "how the machine translates questions into answers", "the difference between memory and bandwidth"],
    ["before the rain.", "in the market square.", "because it's getting late!", "while we're waiting?",
     "and they've agreed to it.", "without saying a word.", "although I'd rather not.", "as far as you'll see."],
)  # fmt: skip
CHINESE = (
    ["老船长", "我的祖母", "一位年轻的工程师", "没有人", "海边的灯塔管理员", "我们的老师", "村子里的学生", "这条河"],
    ["仔细地测量了", "从来没有忘记", "正在寻找", "解释不了", "悄悄地修好了", "不愿意出售", "一直在计算", "常常想起"],
    ["傍晚天空的颜色", "三百一十二个木箱", "一架坏掉的望远镜", "翻过大山的最短的路", "一封没有写完的信", "海水里的盐",
     "机器怎样把问题翻译成答案", "内存和带宽的区别"],
    ["，然后下雨了。", "，因为时间不早了！", "，虽然大家都不同意。", "，你知道为什么吗？", "；后来再也没有提起。"],
)  # fmt: skip
OTHERS = [
    "海の水はなぜ塩辛いのですか。答えは川と岩にあります。", "기억과 대역폭의 차이를 설명해 주세요. 바닷물은 왜 짤까요?",
    "Почему морская вода солёная? Ответ знают реки и скалы.", "لماذا ماء البحر مالح؟ الجواب عند الأنهار والصخور.",
    "समुद्र का पानी खारा क्यों होता है?", "Γιατί το θαλασσινό νερό είναι αλμυρό;", "naïve café, façade, coöperate, Việt Nam",
]  # fmt: skip
EMOJI = ["😀", "😂😂", "🎉", "👍🏽", "👩‍🚀", "👨‍👩‍👧‍👦", "🇨🇳", "❤️", "🌊🌊🌊", "🚀", "🧂", "🐟"]
CODE = [
    "def main(arguments: list[str]) -> int:\n    return len(arguments)\n\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\n",
    '{"role": "user", "content": "为什么"}\n',
    'if x is None:\r\n        raise ValueError(f"{x!r} != {y!r}")\r\n',
    "# ------------------------------\n",
    "SELECT name, price FROM goods WHERE price >= 3.1416;\n",
    '<div class="a">&nbsp;</div>\n',
]


def text(seed: int = 0) -> list[str]:
    """Lines of every kind, in an order that the seed fixes."""
    rng = random.Random(seed)
    english = [" ".join(parts) for parts in itertools.product(*ENGLISH)]
    chinese = ["".join(parts) for parts in itertools.product(*CHINESE)]
    lines = rng.sample(english, 900) + rng.sample(chinese, 900) + 40 * OTHERS + 40 * CODE
    lines += [rng.choice(EMOJI) + " " + rng.choice(english + chinese) + rng.choice(EMOJI) for _ in range(300)]
    lines += [f"{rng.randrange(1000)} + {rng.randrange(1000)} = ?" for _ in range(100)]
    rng.shuffle(lines)
    return [line + rng.choice(["\n", "\n\n", "  ", ""]) for line in lines]


def train() -> list[bytes]:
    """The tokens in the order of their ranks: the bytes, then the merges as they were learnt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=RANKS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text(), trainer)
    to_byte = {written: ord(latin) for latin, written in byte_alphabet().items()}
    by_rank = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [bytes(to_byte[character] for character in token) for token, _ in by_rank]


def lines_of(tokens: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


if __name__ == "__main__":
    Path(__file__).with_name("small.tiktoken").write_text(lines_of(train()), encoding="ascii")

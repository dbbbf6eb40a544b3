"""What the shipped runs are made of: sizes, data sets, methods; the paper's numbers for them."""

from dataclasses import dataclass
from textwrap import indent

PAPER_WIDTH = 4096  # of Llama-2-7B


@dataclass(frozen=True, kw_only=True)
class Size:
    name: str
    hub: str
    width: int
    pack_tokens: int
    """For a card of 24 GB, by the estimate of foundry_ext/models/memory.py."""
    memory: str
    """With those packs, of all methods the most, at the paper's largest rank and with the frozen
    copy for KL; estimated, not measured."""
    pack_tokens_80: int
    """For a card of 80 GB, by the same estimate, and without checkpointing."""
    checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class Data:
    name: str
    title: str
    kind: str
    """finetune or pretrain."""
    source: str
    """Keys of the loader's `dataset`, without the held-out split's part."""
    holdout: str
    why_held_out: str
    max_seq_len: int
    why_max_seq_len: str
    paper_rate: float
    """Full fine-tuning's, in the paper."""
    paper_batch_tokens: int
    batch_tokens: int
    why_batch: str
    duration: str
    prompts: tuple[str, ...]
    is_math: bool = False
    replay: bool = False
    new_tokens: int = 64

    @property
    def experiment(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class Method:
    name: str
    title: str
    keys: str = ""
    """Of peft_config beyond those all adapters have."""
    alpha_note: str = ""
    scale: float | None = None


SIZES = (
    Size(
        name="smollm2-135m",
        hub="SmolLM2-135M",
        width=576,
        pack_tokens=16_384,
        memory="some 17 of 24 GB",
        pack_tokens_80=65_536,
    ),
    Size(
        name="smollm2-360m",
        hub="SmolLM2-360M",
        width=960,
        pack_tokens=8192,
        memory="some 19 of 24 GB",
        pack_tokens_80=32_768,
    ),
    Size(
        name="smollm2-1.7b",
        hub="SmolLM2-1.7B",
        width=2048,
        pack_tokens=16_384,
        memory="an adapter some 15 of 24 GB, full fine-tuning 35",
        pack_tokens_80=8192,
        checkpointing=True,
    ),
)

_MATH_PROMPT = (
    "Question: A farmer has 12 hens and each lays 3 eggs. How many eggs are there?\\nAnswer:"
)
_PLAIN_PROMPT = "The water cycle begins when"

METAMATHQA = Data(
    name="metamathqa",
    title="MetaMathQA",
    kind="finetune",
    source=(
        "hf_name: meta-math/MetaMathQA\n"
        "split: train\n"
        "preprocessing_fn: foundry_ext.data.prompts:metamathqa\n"
        "overlong: truncate"
    ),
    holdout="by: original_question\nfraction: 0.01",
    why_held_out="rows are rephrasings of shared questions, so the split is by question",
    max_seq_len=1024,
    why_max_seq_len="the paper's for MetaMathQA",
    paper_rate=1e-5,
    paper_batch_tokens=200_000,
    batch_tokens=65_536,
    why_batch="the paper's 768 rows hold about 200,000; a smaller model takes a smaller batch",
    duration="2ep # of the paper's 1, 2, 4, 8, 16",
    prompts=(_MATH_PROMPT, _PLAIN_PROMPT),
    is_math=True,
)
REPLAY = Data(
    **{
        **vars(METAMATHQA),
        "name": "metamathqa-replay",
        "title": "MetaMathQA with FineWeb-Edu replayed",
        "replay": True,
    }
)
MAGICODER = Data(
    name="magicoder",
    title="Magicoder-Evol-Instruct",
    kind="finetune",
    source=(
        "hf_name: ise-uiuc/Magicoder-Evol-Instruct-110K\n"
        "split: train\n"
        "preprocessing_fn: foundry_ext.data.prompts:magicoder\n"
        "overlong: truncate"
    ),
    holdout="by: instruction\nfraction: 0.01",
    why_held_out="a repeated instruction stays on one side",
    max_seq_len=2048,
    why_max_seq_len="the paper's is 4096; rows have some 660",
    paper_rate=5e-5,
    paper_batch_tokens=127_000,
    batch_tokens=65_536,
    why_batch="the paper's 192 rows hold about 127,000; a smaller model takes a smaller batch",
    duration="2ep # of the paper's 1, 2, 4, 8, 16",
    prompts=(
        "@@ Instruction\\nWrite a Python function that reverses a string.\\n\\n@@ Response\\n",
        _PLAIN_PROMPT,
    ),
)
GSM8K = Data(
    name="gsm8k",
    title="GSM8K",
    kind="finetune",
    source=(
        "hf_name: openai/gsm8k\n"
        "hf_kwargs: {name: main}\n"
        "split: train\n"
        "preprocessing_fn: foundry_ext.data.prompts:gsm8k\n"
        "overlong: truncate"
    ),
    holdout="by: question\nfraction: 0.05",
    why_held_out="of the training split: the test split is for the result, not for tuning",
    max_seq_len=1024,
    why_max_seq_len="the paper's; the longest row has 1,700 characters",
    paper_rate=1e-5,
    paper_batch_tokens=200_000,
    batch_tokens=16_384,
    why_batch="an epoch has little more than a million tokens, some 70 steps of this size",
    duration="4ep # not in the paper; few rows, so more passes than MetaMathQA has",
    prompts=(_MATH_PROMPT, _PLAIN_PROMPT),
    is_math=True,
)
_PRETRAINING = {
    "kind": "pretrain",
    "max_seq_len": 4096,
    "why_max_seq_len": "the paper's for continued pretraining",
    "paper_rate": 1e-5,
    "paper_batch_tokens": 786_432,
    "batch_tokens": 131_072,
    "why_batch": "the paper's 192 x 4096 are six times that; a smaller model takes a smaller batch",
    "duration": "250_000_000tok # the first of the paper's points, which end at 20 billion",
}
PYTHON_EDU = Data(
    **_PRETRAINING,
    name="python-edu",
    title="Python-Edu",
    source=(
        "hf_name: Avelina/python-edu-cleaned # smollm-corpus's own lists file ids without text\n"
        "# a tenth of the files, which is enough for max_duration\n"
        'hf_kwargs: {data_files: {train: "data/train-0000[0-2]-of-*.parquet"}}\n'
        "split: train\n"
        "text_key: text\n"
        "overlong: split # a longer file becomes several documents"
    ),
    holdout="by: text\nfraction: 0.001",
    why_held_out="an equal file stays on one side",
    prompts=("def fibonacci(n):\\n", "import argparse\\n", _PLAIN_PROMPT),
)
OPENWEBMATH = Data(
    **_PRETRAINING,
    name="openwebmath",
    title="OpenWebMath",
    source=(
        "hf_name: open-web-math/open-web-math\n"
        "# 3 of 114 files, which is enough for max_duration\n"
        'hf_kwargs: {data_files: {train: "data/train-0000[0-2]-of-00114-*.parquet"}}\n'
        "split: train\n"
        "text_key: text\n"
        "overlong: split # a longer page becomes several documents"
    ),
    holdout="by: url\nfraction: 0.003",
    why_held_out="a page that was crawled twice stays on one side",
    prompts=("Theorem. Let $f$ be continuous on", _MATH_PROMPT, _PLAIN_PROMPT),
    is_math=True,
)
FINEMATH = Data(
    **_PRETRAINING,
    name="finemath",
    title="FineMath",
    source=(
        "hf_name: HuggingFaceTB/finemath\n"
        "# 3 of 64 files, which is enough for max_duration\n"
        'hf_kwargs: {data_files: {train: "finemath-4plus/train-0000[0-2]-of-00064.parquet"}}\n'
        "split: train\n"
        "text_key: text\n"
        "overlong: split # a longer page becomes several documents"
    ),
    holdout="by: url\nfraction: 0.002",
    why_held_out="a page that was crawled twice stays on one side",
    prompts=("To solve the equation $2x + 3 = 11$,", _MATH_PROMPT, _PLAIN_PROMPT),
    is_math=True,
)
DATA = (METAMATHQA, REPLAY, MAGICODER, GSM8K, PYTHON_EDU, OPENWEBMATH, FINEMATH)

PAPER_RANKS = (16, 64, 256)
RANK = 64
ALPHA = 2 * RANK
METHODS = (
    Method(name="full", title="Full fine-tuning"),
    Method(
        name="lora",
        title="LoRA (arXiv 2106.09685)",
        alpha_note="the paper's 2r: scale alpha/r is 2",
        scale=ALPHA / RANK,
    ),
    Method(
        name="dora",
        title="DoRA (arXiv 2402.09353)",
        keys="use_dora: true",
        alpha_note="the paper's 2r: scale alpha/r is 2",
        scale=ALPHA / RANK,
    ),
    Method(
        name="rslora",
        title="rsLoRA (arXiv 2312.03732)",
        keys="use_rslora: true",
        alpha_note="2r as for LoRA: scale alpha/sqrt(r), 16 at r64",
        scale=ALPHA / RANK**0.5,
    ),
)


def block(text: str, spaces: int) -> str:
    """Lines of a mapping, indented."""
    return indent(text, " " * spaces)

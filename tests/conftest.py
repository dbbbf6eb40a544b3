"""Fixtures of all tests: caches in a separate folder, a tiny tokenizer, generated rows.

Nothing here needs a network. The environment is set before anything imports `datasets`, which reads
it on import; processes that tests start inherit it.
"""

import atexit
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.expression import Expression

from foundry_ext.utils import allocator

_HOME = tempfile.mkdtemp(prefix="foundry-ext-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(
    HF_HOME=_HOME,
    HF_DATASETS_CACHE=f"{_HOME}/datasets",
    HF_HUB_CACHE=f"{_HOME}/hub",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
# Tiny tensors gain nothing from more threads, and on a busy machine threads that wait for one
# another make a test ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What "auto" would measure, so that no test depends on a clock.
os.environ["FOUNDRY_EXT_CPU_ATTENTION"] = "blockwise"

# SmolLM2's, with their ids 0, 1, 2: the id 0 is a real end of text, and pads too.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    *("a", "the", "one", "two", "bird", "stone", "river", "count", "slowly", "towards", "seven"),
    *("because", "light", "of", "12", "3.5"),
]


def pytest_configure(config: pytest.Config) -> None:
    """Hide a GPU from tests that are not about one, and from the processes that they start.

    They would train on it, in shapes and precisions that only a CPU takes.
    """
    # Tests share their process, and would keep one another's memory.
    allocator.keep_freed_memory = lambda: False
    expression = Expression.compile(config.option.markexpr or "gpu")
    if not expression.evaluate(lambda name, **_: name == "gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    """Return a folder with a byte-level BPE tokenizer of some 300 ids, for `AutoTokenizer`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    end = SPECIAL_TOKENS[0]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end, pad_token=end
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = Path(_HOME, "tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path):
    """Return a fresh copy, so that a test may change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[dict[str, str]]]:
    """Return make_rows(n, seed=0, longest=40): prompt/response rows of words, short and long."""

    def words(rng: random.Random, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    def make(n: int, seed: int = 0, longest: int = 40) -> list[dict[str, str]]:
        rng = random.Random(seed)
        return [
            {"prompt": f"{i} {words(rng, longest // 2)}", "response": words(rng, longest)}
            for i in range(n)
        ]

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Return write_jsonl(rows, name="train.jsonl"): write a file in the test's own folder."""

    def write(rows: Iterable[dict[str, Any]], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def mesh(tmp_path: Path):
    """Return a mesh of one rank, in Composer's process group if an earlier test left one."""
    import torch.distributed
    from torch.distributed.device_mesh import init_device_mesh

    begun = not torch.distributed.is_initialized()
    if begun:
        store = f"file://{tmp_path / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    if begun:
        torch.distributed.destroy_process_group()

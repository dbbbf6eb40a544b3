"""Fixtures of the benchmarks' tests: a tiny setup and workload."""

import pytest
import torch

from benchmarks.variants import Setup
from benchmarks.workloads import Workload, make_documents

VOCABULARY = 131
TINY = {
    "hidden_size": 72,
    "head_dim": 8,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    # Large, so that attention is far from uniform and an error of rope or mask shows in the loss.
    "initializer_range": 0.2,
}


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_setup():
    """Return make_setup(method="lora", ...): a setup, by default fp32 on the CPU."""
    return lambda **keys: Setup(**({"precision": "fp32", "config_overrides": TINY} | keys))


@pytest.fixture(scope="session")
def workload():
    """Return five half-labelled documents that fill two packs; padded microbatches of 2 or 4."""
    documents = make_documents([40, 7, 23, 31, 12], vocabulary=VOCABULARY, labelled=0.5)
    return Workload(name="five", documents=documents, pack_tokens=64, microbatches=(2, 4))

"""Shared settings: deterministic data, two threads, and one fixture that runs a test on every instruction set.

`pytest --threads 16` runs the tests with another number of threads.
"""

import json
import os
import shutil
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads of torch that wait sleep, instead of taking the core of another worker: half the time of small operators.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a run in the background, whose children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

import core_driver
import hypothesis
import pytest
import torch
from gpu_emulation.files import made_once
from helpers import TEXT
from tiers import isa_parameters

from qkernels.kernels import isa

hypothesis.settings.register_profile("qkernels", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("qkernels")


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=2, help="torch.set_num_threads of each test (default: 2)")


@pytest.fixture(autouse=True)
def deterministic(request):
    torch.manual_seed(0)
    torch.set_num_threads(request.config.getoption("--threads"))


@pytest.fixture(params=isa_parameters())
def each_isa(request):
    """Runs the test once per instruction set this CPU has; the value is its name."""
    with isa.force(request.param):
        yield request.param


@pytest.fixture(scope="session")
def core_check(tmp_path_factory):
    """The driver of the installed core, see core_driver.py."""
    folder = core_driver.shared_folder(tmp_path_factory, "core")
    return made_once(folder / "core_check", core_driver.build)


@pytest.fixture(scope="session")
def native_checksums(core_check):
    """What the best instruction set of this CPU computes."""

    def run(path: Path) -> None:
        path.write_text(json.dumps(core_driver.run(core_check)[1]))

    return json.loads(made_once(core_check.with_name("checksums.json"), run).read_text())


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer trained on a few words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<s>", "</s>"])
    tokenizer.save(str(folder / "bpe.json"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "bpe.json"), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory, tokenizer_folder) -> Path:
    """A causal language model of two small layers, with its tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(tokenizer_folder, folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder

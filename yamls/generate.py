"""Writes yamls/finetune/ and yamls/pretrain/ from run.yaml.in and recipes.py.

    python yamls/generate.py

84 runs that are to differ where they are meant to, and nowhere else, have one source; a test
holds that the committed files are what this writes.
"""

import re
from collections.abc import Iterator
from math import sqrt
from pathlib import Path

from recipes import (
    ALPHA,
    DATA,
    METAMATHQA,
    METHODS,
    PAPER_RANKS,
    PAPER_WIDTH,
    RANK,
    SIZES,
    Data,
    Method,
    Size,
    block,
)

ROOT = Path(__file__).parents[1]
TEMPLATE = Path(__file__).with_name("run.yaml.in")
GRID = {"lowest": -1.0, "low": -0.5, "middle": 0.0, "high": 0.5, "highest": 1.0}  # decades
# LoRA's best learning rate over full fine-tuning's: ten times for MetaMathQA in the paper, and in
# "LoRA Without Regret"; four times for continued pretraining on OpenWebMath in the paper.
ADAPTER_RATIO = {"finetune": 10, "pretrain": 4}


def render() -> Iterator[tuple[Path, str]]:
    """(path from the repository's root, text) of every file."""
    for data in DATA:
        for size in SIZES:
            for method in METHODS:
                path = Path("yamls", data.kind, f"{size.name}_{data.name}_{method.name}.yaml")
                yield path, fill(TEMPLATE.read_text(), values(path, data, size, method))
    yield SHARDED, shard(fill(TEMPLATE.read_text(), values(SHARDED, *SHARDED_RUN)))


def shard(text: str) -> str:
    """A run of one device as one of eight under FSDP2; each pattern must be there, once."""
    for pattern, replacement in SHARDING.items():
        text, count = re.subn(pattern, lambda _, new=replacement: new, text, flags=re.DOTALL)
        assert count == 1, (pattern, count)
    return text


def fill(template: str, values: dict[str, str]) -> str:
    """Every @name@ replaced; a name without a value, or a value without a name, is an error."""
    names = set(re.findall(r"@([a-z0-9_]+)@", template))
    assert names == set(values), names ^ set(values)
    return re.sub(r"@([a-z0-9_]+)@", lambda match: values[match.group(1)], template)


def values(path: Path, data: Data, size: Size, method: Method) -> dict[str, str]:
    return {
        "title": f"{method.title} of {size.hub}: {data.title}, packed.",
        "path": str(path),
        "family": str(path).removesuffix(f"_{method.name}.yaml"),
        "run": path.stem,
        "hub": size.hub,
        "size": size.name,
        "data": data.name,
        "method": method.name,
        "experiment": data.experiment,
        "max_seq_len": f"{data.max_seq_len} # tokens a document may have; {data.why_max_seq_len}",
        "pack_tokens": str(size.pack_tokens),
        "memory": memory(data, size),
        **rates(data, size, method),
        "ranks": RANKS if method.scale is not None else "",
        "replay_share": REPLAY_SHARE if data.replay else "",
        "checkpointing": CHECKPOINTING if size.checkpointing else "",
        "peft": peft(method),
        "loader": "packed_finetuning" if data.kind == "finetune" else "packed_text",
        "train": block(train_source(data), 4),
        "eval": block(part(data, "eval", ""), 4),
        "scheduler": SCHEDULERS[data.kind],
        "duration": data.duration,
        "batch": str(data.batch_tokens // size.pack_tokens),
        "batch_tokens": f"{data.batch_tokens:,}",
        "batch_why": data.why_batch,
        "gsm8k_task": " gsm8k" if data.is_math else "",
        "generation": GENERATION if data.is_math else "",
        "prompts": "\n".join(f'      - "{prompt}"' for prompt in data.prompts),
        "new_tokens": str(data.new_tokens),
    }


def memory(data: Data, size: Size) -> str:
    """The estimate, and what a card of 80 GB takes of the same batch."""
    text = f"{size.memory}; `foundry-ext plan` says more."
    pack_tokens = min(size.pack_tokens_80, data.batch_tokens)
    overrides = [
        f"variables.pack_tokens={pack_tokens}",
        f"global_train_batch_size={data.batch_tokens // pack_tokens}",
        *(["model.activation_checkpointing=false"] if size.checkpointing else []),
    ]
    if pack_tokens == size.pack_tokens:
        return text
    return f"{text}\n  # 80 GB: {' '.join(overrides)}"


def rates(data: Data, size: Size, method: Method) -> dict[str, str]:
    """The grid, half a decade a step, around a guess from the paper, and the guess explained."""
    width, batch = PAPER_WIDTH / size.width, data.batch_tokens / data.paper_batch_tokens
    middle = data.paper_rate * width * sqrt(batch)
    why = (
        f"The paper's {number(data.paper_rate, 0)} for full fine-tuning, x {width:.1f} for a model"
        f" that much narrower,\n  # x sqrt({batch:.2f}) for the smaller batch"
    )
    note = "one of the names above, which every method of the family has"
    if method.scale is not None:
        ratio = ADAPTER_RATIO[data.kind]
        middle *= ratio
        why += f"; x {ratio} for an adapter"
        if method.name == "rslora":
            middle *= (ALPHA / RANK) / method.scale
            why += f"; / {method.scale / (ALPHA / RANK):.0f} for rsLoRA's larger scale"
    grid = ", ".join(f"{name}: {number(middle * 10**step)}" for name, step in GRID.items())
    why += ".\n  # Half a decade a step; a best value at the grid's edge asks for a wider one."
    return {"rates": f"{{{grid}}}", "rates_why": why, "rate_note": note}


def number(value: float, digits: int = 1) -> str:
    """1.6e-5"""
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def peft(method: Method) -> str:
    if method.scale is None:
        return ""
    keys = [
        "peft_type: LORA",
        "task_type: CAUSAL_LM",
        "r: ${variables.ranks.${variables.rank}.r}",
        f"lora_alpha: ${{variables.ranks.${{variables.rank}}.alpha}} # {method.alpha_note}",
        "lora_dropout: 0.0",
        "# the paper's, and gate_proj",
        "target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]",
        *([method.keys] if method.keys else []),
    ]
    return "  peft_config:\n" + block("\n".join(keys), 4) + "\n"


def part(data: Data, name: str, comment: str) -> str:
    """The source's keys with the held-out split's part."""
    return f"{data.source}\nholdout:{comment}\n{block(data.holdout, 2)}\n  part: {name}"


def train_source(data: Data) -> str:
    main = part(data, "train", f" # {data.why_held_out}")
    if not data.replay:
        return main
    entries = "\n".join(
        block(entry, 4).replace("    ", "  - ", 1) for entry in (main, REPLAY_SOURCE)
    )
    return f"datasets:\n{entries}"


_ALPHAS = ", ".join(f"r{rank}: {{r: {rank}, alpha: {2 * rank}}}" for rank in PAPER_RANKS)
RANKS = f"""
  ranks: {{{_ALPHAS}}} # the paper's
  rank: r{RANK}"""
REPLAY_SHARE = """
  replay_share: 0.05 # of an epoch's tokens, beside all of MetaMathQA's"""
REPLAY_SOURCE = """\
hf_name: karpathy/fineweb-edu-100b-shuffle
hf_kwargs: {data_files: {train: shard_00000.parquet}} # forgetting is measured on another file
split: train # some 50 million tokens: enough for a share of 0.2 without a page twice
text_key: text
overlong: truncate
share: ${variables.replay_share}"""
CHECKPOINTING = """\
  activation_checkpointing: true # a third more computation, for a pack of activations in 24 GB
"""
GENERATION = """\
      gsm8k: # what is learned, as the paper measures it; its test split, from `foundry-ext tasks`
        role: learning
        type: generation
        path: data/tasks/gsm8k.jsonl
        num_fewshot: 5
        max_new_tokens: 256
        max_items: 100 # generation is slow; `foundry-ext eval` takes all
"""
SCHEDULERS = {
    "finetune": """\
scheduler: # the paper's for instruction tuning
  name: cosine_with_warmup
  t_warmup: 0.1dur
  alpha_f: 0.01
""",
    "pretrain": """\
# The paper's shape for continued pretraining: inverse square root, cooled down to 0. The scales
# are ours: lr is down to a tenth when the cooldown starts, and .18 of itself on average.
scheduler:
  name: inv_sqrt_with_warmup
  t_warmup: 2_500_000tok # this scheduler takes no shares of the duration
  t_scale: 2_500_000tok
  t_cooldown: 25_000_000tok
  alpha_f_decay: 0.0
  alpha_f_cooldown: 0.0
""",
}

SHARDED = Path("yamls/fsdp/smollm2-1.7b_metamathqa_full_8gpu.yaml")
SHARDED_RUN = METAMATHQA, SIZES[-1], METHODS[0]
SHARDING = {
    "MetaMathQA, packed.\n": "MetaMathQA, packed, sharded over 8 GPUs.\n",
    r"#   composer train.py (?=\S+\n)": "#   FSDP_VERSION=2 composer -n 8 train.py ",
    r"# Its family .*?(?=# Needs the hub)": """\
# The run of yamls/finetune/smollm2-1.7b_metamathqa_full.yaml, its batches and learning rates, under
# FSDP2: weights, gradients and optimizer state are shared out, some 2.4 GiB a GPU of one's 19.
# Without forgetting and text_samples, which cannot run sharded: `foundry-ext eval` measures the
# export. On two nodes, on each with its number and the first one's address, in a working directory
# of its own (in a shared one llm-foundry 0.22 trips over its own signal files), outputs shared:
#
#   FSDP_VERSION=2 composer -n 8 --world_size 16 --node_rank NUMBER --master_addr ADDRESS \\
#     --master_port 29500 train.py THIS_FILE global_train_batch_size=16 \\
#     variables.folder=/SHARED/FOLDER
#
# Tried on CPU ranks with the shape cut tiny. **On GPUs memory and speed are unmeasured.**
#
""",
    r", and, written once,.*?(?=#\n# Numbers)": ".\n",
    r"Estimated: .*?\n  pack_tokens: 16384": """\
Estimated: some 7 of 24 GB.
  # 80 GB: model.activation_checkpointing=false, some 30
  pack_tokens: 8192""",
    "for a pack of activations in 24 GB\n": """\
for a pack of activations in 24 GB
  init_device: mixed # rank 0 alone holds the whole model in the host's memory, once
""",
    r"global_train_batch_size: 4\n": "global_train_batch_size: 8 # one for each GPU\n",
    r"precision: amp_bf16 # the paper's\n": """\
precision: amp_bf16 # the paper's
fsdp_config: # for Composer's FSDP2, which the variable FSDP_VERSION asks for
  mixed_precision: DEFAULT # gathered and computed in bf16, gradients summed up in fp32
  state_dict_type: full # a checkpoint is one file, and goes on with any number of ranks
""",
    r"  forgetting:\n.*?(?=  packed_throughput:)": "",
}


def main() -> None:
    for path, text in render():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text)
        print(path)


if __name__ == "__main__":
    main()

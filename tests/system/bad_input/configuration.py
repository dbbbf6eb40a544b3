"""Cases of bad input in a YAML or on the command line."""

from foundry_ext.launch.train import main
from tests.system.bad_input.bench import Bench
from tests.system.bad_input.case import Case, change, nothing, text
from tests.training import kit

_TIME = "must be a time: a whole number and a unit, such as 3ep or 100ba"
_SECTION = "must be a mapping; write its settings below it"
_COUNT = "must be a whole number from 1 to 1048576"
_WORKERS = "must be a whole number from 0 to 1024"
_LENGTH = "must be a whole number from 2 to 16777216"
_RATE = "must be a number from 0 on, such as 1.0e-4"
_SEED = "must be a whole number from 0 to 4294967295"


def _twice(bench: Bench):
    return bench.train("run_name=x", str(bench.folder / "run.yaml"))


YAML = [
    Case("syntax", text("a: 1\nb: [1, 2\nc: 3\n"), ("run.yaml: not valid YAML at line 3",)),
    Case("tab", text("a:\n\tb: 2\n"), ("not valid YAML at line 2, column 1",)),
    Case("key twice", text("a: 1\na: 2\n"), ("at line 2, column 1, found duplicate key a",)),
    Case("NUL", text("a: \0\n"), ("run.yaml: not valid YAML", "#x0000")),
    Case("empty", text(""), ("run.yaml: empty, not a mapping",)),
    Case("a list", text("- a\n"), ("run.yaml: a list, not a mapping",)),
    Case("missing key", text("max_duration: 1ep\n"), ("missing top-level keys", "add with a")),
    Case("no file", nothing, ("none.yaml: no such file",),
         lambda bench: bench.call(main, "train.py", ["none.yaml"])),
    Case("one name for two", nothing, ("override run_name=x", "overwrite one another"), _twice),
]  # fmt: skip

KEYS = [
    Case("key", change(max_duraton=1), ("'max_duraton', did you mean 'max_duration'",)),
    Case("model's key", change(model__pretraind=1), ("model.pretraind, did you mean 'pretr",)),
    Case("optimizer's key", change(optimizer__lrr=1), ("optimizer.lrr, did you mean 'lr'",)),
    Case("loader's key", change(train_loader__num_worker=1),
         ("train_loader.num_worker, did you mean 'num_workers'",)),
    Case("callback's key", change(callbacks__guard={"spike": 1}),
         ("callbacks.guard.spike, did you mean 'spike_factor'",)),
    Case("callback", change(callbacks__gaurd={}), ("'gaurd', did you mean 'guard'? known: ",)),
    Case("algorithm", change(algorithms={"gradient_cliping": {}}),
         ("'gradient_cliping', did you mean 'gradient_clipping'",)),
    Case("model's name", change(model__name="smollm2_pakced"), ("did you mean 'smollm2_packed'",)),
    Case("override's variable", change(variables={"rate": 1}),
         ("no variable 'rat', did you mean 'rate'",), lambda b: b.train("variables.rat=2")),
    Case("override of a section", nothing, ("model is a mapping, which '3' would replace",),
         lambda b: b.train("model=3")),
]  # fmt: skip

VALUES = [
    Case("section as text", change(model="x"), ("model, 'x', " + _SECTION,)),
    Case("loader as text", change(train_loader="x"), ("train_loader, 'x', " + _SECTION,)),
    Case("dataset as a list", change(train_loader__dataset=[1]),
         ("train_loader.dataset, [1], " + _SECTION,)),
    Case("secret for the tokenizer", change(tokenizer__kwargs__api_key="x"),
         ("tokenizer.kwargs.api_key would be written into every checkpoint", "HF_TOKEN")),
    Case("no dataset", change(train_loader__dataset=None),
         ("train_loader.dataset is missing; name its rows",)),
    Case("batch of 0", change(global_train_batch_size=0), ("train_batch_size, 0, " + _COUNT,)),
    Case("batch of -3", change(global_train_batch_size=-3), ("train_batch_size, -3, " + _COUNT,)),
    Case("batch of 2.5", change(global_train_batch_size=2.5),
         ("train_batch_size, 2.5, " + _COUNT,)),
    Case("batch as text", change(global_train_batch_size="x"),
         ("train_batch_size, 'x', " + _COUNT,)),
    Case("batch huge", change(global_train_batch_size=10**12),
         ("_batch_size, 1000000000000, " + _COUNT,)),
    Case("microbatch of 0", change(device_train_microbatch_size=0),
         ("microbatch_size, 0, " + _COUNT,)),
    Case("microbatch of -1", change(device_train_microbatch_size=-1),
         ("microbatch_size, -1, " + _COUNT,)),
    Case("microbatch auto", change(device_train_microbatch_size="auto"),
         ("device_train_microbatch_size, 'auto', does not go with", "set it to 1")),
    Case("workers -1", change(train_loader__num_workers=-1), ("num_workers, -1, " + _WORKERS,)),
    Case("workers huge", change(train_loader__num_workers=10**9),
         ("num_workers, 1000000000, " + _WORKERS,)),
    Case("microbatch huge", change(device_train_microbatch_size=10**12),
         ("microbatch_size, 1000000000000, " + _COUNT,)),
    Case("evaluation batch of 0", change(device_eval_batch_size=0),
         ("device_eval_batch_size, 0, " + _COUNT,)),
    Case("documents of -1", change(max_seq_len=-1), ("max_seq_len, -1, " + _LENGTH,)),
    Case("rank huge", change(model__peft_config={**kit.LORA, "r": 10**9}),
         ("peft_config.r: 1000000000", "1 to 8192")),
    Case("seed huge", change(seed=2**32), ("seed, 4294967296, " + _SEED,)),
    Case("seed -1", change(seed=-1), ("seed, -1, " + _SEED,)),
    Case("seed as text", change(seed="x"), ("seed, 'x', " + _SEED,)),
    Case("rate as text", change(optimizer__lr="fast"), ("lr, 'fast', " + _RATE,)),
    Case("rate negative", change(optimizer__lr=-1.0), ("lr, -1.0, " + _RATE,)),
    Case("duration as text", change(max_duration="long"), ("max_duration, 'long', must", _TIME)),
    Case("duration of 0", change(max_duration="0ba"), ("max_duration, '0ba', trains nothing",)),
    Case("interval", change(save_interval="1xx"), ("save_interval, '1xx', must be a time", _TIME)),
    Case("interval of parts", change(save_interval="0.5ep"), ("'0.5ep', must be a time", _TIME)),
    Case("interval as a fraction", change(eval_interval=0.5), ("_interval, 0.5, must", _TIME)),
    Case("interval below 0", change(eval_interval="-1ba"), ("'-1ba', is below 0; give a time",)),
    Case("no part", change(eval_interval="0dur"), ("'0dur', must be an interval above 0",)),
    Case("saved never", change(save_interval="0ba"),
         ("save_interval, '0ba', saves nothing; give", "leave out save_folder")),
    Case("warm-up", change(scheduler__t_warmup="1xx"), ("scheduler.t_warmup, '1xx'", _TIME)),
    Case("precision", change(precision="fp23"), ("precision, 'fp23', must be one of fp32, amp_",)),
    Case("interpolation", change(seed="${variables.sed}"),
         ("seed, Interpolation key 'variables.sed' not found", "define it under variables:")),
    Case("environment variable", change(seed="${oc.env:NOT_SET}"),
         ("seed, ", "${oc.env:NOT_SET}", "write the value")),
    Case("checkpoint missing", change(load_path="/no/such.pt"),
         ("load_path, '/no/such.pt': no such checkpoint", "correct it or leave it out")),
    Case("no configuration to record", change(log_config=False),
         ("run_record: log_config: false", "leave that key out")),
]  # fmt: skip

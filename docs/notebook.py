# %% [markdown]
# # In a notebook
#
# An experiment from its first look at the data to the report. `foundry-ext new mine` makes the
# folder; start Jupyter there. The names of `foundry_ext` are explained in
# [python-api.md](python-api.md). If jupytext is installed where Jupyter runs, it opens this file as
# a notebook. Otherwise, `jupytext --to ipynb notebook.py` makes one.
#
# ## Look at the run
#
# The first import of the trainer takes some 20 seconds.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Image, display

import foundry_ext

YAML = "yamls/smollm2_lora.yaml"
plan = foundry_ext.plan_run(YAML)
print(f"{plan.epoch.num_documents:,} documents, {plan.epoch.num_tokens:,} tokens per epoch")
print(f"{plan.schedule.steps} steps, packs {plan.epoch.packing_efficiency:.1%} full")

# %% [markdown]
# Each bar is a pack, and each colour in it a document.

# %%
inspection = foundry_ext.inspect_run(YAML, num_packs=4)
figure, axes = plt.subplots(figsize=(8, 2))
for row, pack in enumerate(inspection.packs):
    start = 0
    for document in pack.documents:
        axes.barh(row, len(document.tokens), left=start, edgecolor="white", linewidth=0.3)
        start += len(document.tokens)
axes.set(xlabel="tokens", ylabel="pack", yticks=range(len(inspection.packs)))
axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## Train and compare
#
# The sweep trains what has not finished, in processes of its own, and prints a line when a run
# starts or ends. Interrupting the cell stops the sweep; running it again continues.

# %%
results = foundry_ext.run_sweep("sweep.yaml")

# %%
runs = foundry_ext.load_runs(sorted(Path("outputs").glob("*-seed_*")))
figure, axes = plt.subplots(figsize=(6, 3.5))
for run in runs.runs:
    points = [
        (one["real_tokens"], one["metrics"]["target/loss"]) for one in run.record["evaluations"]
    ]
    label = f"{run.record['method']}, {run.record['learning_rate']:g}"
    axes.plot(*zip(*points, strict=True), marker=".", label=label)
axes.set(xlabel="real tokens", ylabel="held-out loss, nats per token")
axes.legend()
plt.show()

# %%
comparison = foundry_ext.compare_runs(runs)
foundry_ext.write_report(comparison, "report")
display(Image("report/tradeoff.png"))

# %% [markdown]
# The whole report is in `report/index.html`.
#
# ## Measure again
#
# Any model, adapter or checkpoint can be measured on the sets of a YAML. A bar shows the progress
# of measurements that take longer than a second.

# %%
(adapter, *_) = sorted(Path("outputs").glob("*_lora-seed_*/hf"))
evaluation = foundry_ext.evaluate_checkpoint(adapter, YAML)
evaluation.report["metrics"]["model"]

"""Constants that several packages share."""

IGNORE_INDEX = -100  # label of a position without loss, as in torch's cross_entropy

NEW_RUN = (
    "give the run another run_name and save_folder; or start a new run from the checkpoint's"
    " weights with load_path, load_weights_only: true and another save_folder"
)
"""Ways out for a checkpoint that a start may not continue."""
CPU_ATTENTION = "FOUNDRY_EXT_CPU_ATTENTION"
"""Environment variable that names what `attention_backend: auto` stands for on a CPU."""

"""Top-level keys of a YAML: those of llm-foundry 0.22's TrainConfig.

They are written down here because importing TrainConfig takes 15 seconds, which a typo should not
cost. A test holds them equal to its fields.
"""

REQUIRED_KEYS = {
    *("device_train_microbatch_size", "global_train_batch_size", "max_duration", "max_seq_len"),
    *("model", "optimizer", "scheduler", "tokenizer", "train_loader"),
}
TOP_LEVEL_KEYS = REQUIRED_KEYS | {
    *("accumulate_train_batch_on_tokens", "algorithms", "autoresume", "callbacks", "code_paths"),
    *("compile_config", "console_log_interval", "cuda_load_lazy", "device_eval_batch_size"),
    *("device_train_batch_size", "device_train_grad_accum", "dist_timeout", "eval_first"),
    *("eval_gauntlet", "eval_gauntlet_str", "eval_interval", "eval_loader", "eval_loaders"),
    *("eval_subset_num_batches", "expandable_segments", "flatten_metadata", "fsdp_config"),
    *("icl_seq_len", "icl_subset_num_batches", "icl_tasks", "icl_tasks_str", "load_ignore_keys"),
    *("load_path", "load_strict_model_weights", "load_weights_only", "log_config"),
    *("log_to_console", "loggers", "max_split_size_mb", "metadata", "n_gpus"),
    *("only_composer_checkpoint", "only_hf_checkpoint", "precision", "profiler", "progress_bar"),
    *("python_log_level", "run_name", "save_filename", "save_folder", "save_ignore_keys"),
    *("save_interval", "save_latest_filename", "save_num_checkpoints_to_keep", "save_overwrite"),
    *("save_weights_only", "seed", "spin_dataloaders", "tp_config", "train_subset_num_batches"),
    "variables",
}

"""`smollm2_packed`: SmolLM2 on packed batches, as a model of Composer and llm-foundry."""

from collections.abc import Mapping
from typing import Any

from llmfoundry.models.hf.hf_base import BaseHuggingFaceModel
from llmfoundry.models.hf.hf_causal_lm import ComposerHFCausalLM
from llmfoundry.models.hf.hf_fsdp import hf_get_init_device
from peft import LoraConfig, PeftModelForCausalLM
from torchmetrics import Metric
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.adapters import methods, pissa
from foundry_ext.adapters.frozen import check_frozen_dtype
from foundry_ext.checkpoints.export import adaptable_modules, load_adapter
from foundry_ext.data.ranks import local_rank_zero_first
from foundry_ext.models.checks import check_positions
from foundry_ext.models.compiled import check_compile, compile_model
from foundry_ext.models.loss import check_loss
from foundry_ext.models.pretrained import load_generation_config
from foundry_ext.models.smollm2 import PackedCausalLMOutput, SmolLM2ForCausalLM
from foundry_ext.training import attention_choice, model_building, model_settings
from foundry_ext.training.packed_metrics import update_by_sums
from foundry_ext.utils.errors import UserError


class ComposerSmolLM2(BaseHuggingFaceModel):
    """SmolLM2 on packed batches, with everything `hf_causal_lm` takes in a YAML.

    Args:
        tokenizer: the tokenizer, saved with every checkpoint.
        pretrained_model_name_or_path: hub name, local folder, or a shape shipped here
            ("smollm2-135m", "smollm2-360m", "smollm2-1.7b") for random weights without a network.
        pretrained: load the weights; otherwise they are random.
        pretrained_lora_id_or_path: a saved adapter to continue training.
        config_overrides: changes to the configuration, e.g. {num_hidden_layers: 4}.
        peft_config: {peft_type: LORA, task_type: CAUSAL_LM, r, lora_alpha, use_dora, ...}; all
            seven linears unless target_modules says otherwise. Checked by adapters.methods.
        init_device: cpu, meta, or mixed (cpu on rank 0, meta on the others, for FSDP).
        attention_backend: auto, flash_attn, torch_varlen, flex, blockwise (CPU), torch_cpu or sdpa.
            With attention_dropout in config_overrides it must be flash_attn or sdpa, or
            torch_varlen before torch 2.10.
        loss: chunked (any device), compiled (the same, fused by torch.compile), liger (GPU,
            experimental) or auto.
        compile: none, layers, model or auto: torch.compile of the training forward pass. It needs
            packs of one shape, `fixed_shape: true` in the train loader. On a GPU, evaluation then
            fuses norm, rotary and SwiGLU.
            train.py replaces `auto`, of loss too, before it builds the model, see
            config/automatic.py. Here it means none and chunked.
        compile_mode: torch.compile's mode, e.g. reduce-overhead for CUDA graphs.
        activation_checkpointing: recompute each layer in the backward pass. Set here because
            llm-foundry ignores fsdp_config on a single GPU, activation checkpointing included.
        frozen_dtype: bf16 stores an adapter's frozen linears in bf16, for precision: amp_bf16.
        use_train_metrics: must be false because training computes no logits.
        trust_remote_code: as in `hf_causal_lm`, but off by default.
        use_auth_token: as in `hf_causal_lm`.
        allow_embedding_resizing: as in `hf_causal_lm`.
        additional_eval_metrics: as in `hf_causal_lm`.
        should_save_peft_only: as in `hf_causal_lm`.

    Raises:
        UserError: an impossible setting; names the key, the value and the way out.
    """

    default_eval_metrics = ComposerHFCausalLM.default_eval_metrics

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pretrained_model_name_or_path: str,
        pretrained: bool = True,
        pretrained_lora_id_or_path: str | None = None,
        trust_remote_code: bool = False,
        use_auth_token: bool | str = False,  # as in llm-foundry, but any text counts as true
        load_in_8bit: bool = False,
        init_device: str = "cpu",
        config_overrides: dict[str, Any] | None = None,
        peft_config: dict[str, Any] | None = None,
        use_train_metrics: bool = False,
        allow_embedding_resizing: bool = False,
        additional_train_metrics: list | None = None,
        additional_eval_metrics: list | None = None,
        should_save_peft_only: bool = True,
        attention_backend: str = "auto",
        loss: str = "chunked",
        compile: str = "none",  # as in torch and in Composer's own settings
        compile_mode: str = "default",
        activation_checkpointing: bool = False,
        frozen_dtype: str = "fp32",
    ):
        model_settings.check_unsupported(
            use_train_metrics=use_train_metrics or bool(additional_train_metrics),
            load_in_8bit=load_in_8bit,
            trust_remote_code=trust_remote_code,
        )
        attention_choice.check_backend(attention_backend)
        loss = check_loss(loss)
        check_compile(compile, compile_mode)
        adapted = peft_config is not None or pretrained_lora_id_or_path is not None
        check_frozen_dtype(frozen_dtype, adapted=adapted, init_device=init_device)
        model_settings.check_adapter(
            peft_config,
            pretrained_lora_id_or_path,
            allow_embedding_resizing=allow_embedding_resizing,
        )
        self._num_tokens_needed = 0 if allow_embedding_resizing else len(tokenizer)
        super().__init__(
            pretrained_model_name_or_path,
            tokenizer=tokenizer,
            pretrained=pretrained,
            pretrained_lora_id_or_path=pretrained_lora_id_or_path,
            trust_remote_code=trust_remote_code,
            use_auth_token=bool(use_auth_token),
            init_device=init_device,
            config_overrides=config_overrides,
            shift_labels=True,  # labels come unshifted, and the loss shifts them
            peft_config=peft_config,
            allow_embedding_resizing=allow_embedding_resizing,
            use_train_metrics=False,
            additional_eval_metrics=additional_eval_metrics,
            should_save_peft_only=should_save_peft_only,
        )
        inner = self.inner_model
        if pretrained:
            model_settings.check_vocabulary(inner.config, tokenizer)
        if isinstance(self.model, PeftModelForCausalLM):
            model_building.prepare_adapter(self.model, frozen_dtype)
        # Only now is the dropout known: config_overrides may set it.
        attention_choice.use_backend(inner, attention_backend)
        self.attention_backend, inner.loss_implementation = attention_backend, loss
        if activation_checkpointing:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        self.compile_scope, self.compile_mode = compile, compile_mode
        # Keys that train.py decided, and what of them is kept of a checkpoint: automatic_choices.py
        self.automatic: tuple[str, ...] = ()
        self.kept: dict[str, Any] = {}
        compile_model(inner, scope=compile, mode=compile_mode)
        if inner.config.tie_word_embeddings:
            assert inner.lm_head.weight is inner.model.embed_tokens.weight, "head came untied"

    @property
    def inner_model(self) -> SmolLM2ForCausalLM:
        """The decoder, without the adapter if there is one."""
        model = self.model
        inner = model.get_base_model() if isinstance(model, PeftModelForCausalLM) else model
        assert isinstance(inner, SmolLM2ForCausalLM)
        return inner

    # --- building, called by llm-foundry's __init__ ----------------------------------------------

    @classmethod
    def build_inner_model(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str,
        pretrained_lora_id_or_path: str | None,
        trust_remote_code: bool,
        init_device: str,
        use_auth_token: bool,
        config_overrides: dict[str, Any],
        pretrained: bool,
        **_unused: Any,
    ) -> SmolLM2ForCausalLM | PeftModelForCausalLM:
        """Return the decoder, with its saved adapter if there is one."""
        name, device = pretrained_model_name_or_path, hf_get_init_device(init_device)
        assert device is not None
        if pretrained:
            model_settings.check_pretrained(name, device, init_device)
        with local_rank_zero_first():  # one download per node
            config, stored = (
                model_building.read_config(name, overrides, use_auth_token=use_auth_token)
                for overrides in (config_overrides, {})
            )
            if pretrained:
                model_settings.check_heads(config, stored)
            model = model_building.build_decoder(
                name, config, device, pretrained=pretrained, use_auth_token=use_auth_token
            )
        if pretrained:
            load_generation_config(model, name)
        if pretrained_lora_id_or_path is None:
            return model
        try:
            return load_adapter(model, pretrained_lora_id_or_path)
        except ValueError as error:
            raise UserError(f"pretrained_lora_id_or_path: {error}") from error

    def transform_model(self, model: Any) -> Any:
        """Return the model as it is; remember its modules for `get_peft_config`, called next."""
        model_settings.check_embeddings(self._num_tokens_needed, model.config.vocab_size)
        self._adaptable_modules = adaptable_modules(model)
        return super().transform_model(model)

    def get_peft_config(self, peft_config_dict: dict[str, Any]) -> LoraConfig:
        """Check the settings and add our defaults, then return what `hf_causal_lm` would."""
        settings = methods.with_defaults(peft_config_dict)
        methods.check(settings, self._adaptable_modules)
        return super().get_peft_config(settings)  # pyright: ignore[reportReturnType]

    @staticmethod
    def prepare_inner_model(model: Any, init_device: str | None = None) -> None:
        """Prepare the model for FSDP as in `hf_causal_lm`, but by functions that can be pickled."""
        BaseHuggingFaceModel.prepare_inner_model(model, init_device)
        model.fsdp_wrap_fn = model.activation_checkpointing_fn = model_building.is_decoder_layer
        model.param_init_fn = model._init_weights

    # --- checkpoints -----------------------------------------------------------------------------

    def get_metadata(self) -> dict[str, Any]:
        """Return a checkpoint's description of the model, with generation settings for export."""
        metadata = super().get_metadata()
        generation = self.inner_model.generation_config
        assert generation is not None
        content = generation.to_dict()
        metadata["model"]["generation_config"] = {"file_extension": ".json", "content": content}
        return metadata

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return all weights, or the adapter's only.

        DDP collects weights in `destination`, which Composer's filter does not see, so base weights
        are removed there as well.
        """
        filtered = super().state_dict(*args, **kwargs)
        destination = kwargs.get("destination")
        if destination is not None and self.using_peft and self.should_save_peft_only:
            for name in destination.keys() - filtered.keys():
                if name.startswith(kwargs.get("prefix", "")):
                    del destination[name]
        return filtered

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a checkpoint of this very model, whatever `strict` is.

        Composer resumes with `strict` off; with it on, the checkpoint of an adapter is refused
        because it holds no base weights.

        Raises:
            UserError: a weight is missing or left over.
        """
        adapted = self.model if pissa.is_pissa(self.model) else None
        initial = pissa.copy_initial_factors(adapted) if adapted else {}
        report = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in report.missing_keys if not self.using_peft or "lora_" in name]
        if missing or report.unexpected_keys:
            raise UserError(
                "the checkpoint is of another model or peft_config: missing"
                f" {missing[:3]}, left over {report.unexpected_keys[:3]}; restore the model's part"
                " of the YAML it was trained with"
            )
        if adapted and not any("base_layer" in name for name in state_dict):
            pissa.correct_residuals(adapted, initial)
        return report

    # --- batches ---------------------------------------------------------------------------------

    def forward(self, batch: Any) -> Any:
        """Run a packed or padded batch.

        Raises:
            UserError: documents may be longer than the model has positions.
        """
        if "cu_seqlens" in batch:
            check_positions(batch["max_seqlen"], self.inner_model.config.max_position_embeddings)
        return super().forward(batch)

    # --- evaluation ------------------------------------------------------------------------------

    def eval_forward(self, batch: Any, outputs: Any | None = None) -> Any:
        """Return a packed batch's loss and counts, or the logits of any other batch.

        Packed batches use the chunked loss, so [T, V] logits never exist. Other batches come from
        in-context tasks, which need logits.
        """
        if "cu_seqlens" not in batch:
            return super().eval_forward(batch, outputs)
        return self.forward(batch) if outputs is None else outputs

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> dict:
        """Update a metric; after a packed batch by its sums, with the same result as by logits.

        Raises:
            UserError: the metric needs logits, but the batch is packed.
        """
        if not isinstance(outputs, PackedCausalLMOutput):
            return super().update_metric(batch, outputs, metric)
        update_by_sums(metric, outputs)
        return {}

"""`smollm2_packed`: SmolLM2 as Composer and llm-foundry see it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from composer.metrics.nlp import LanguageCrossEntropy
from composer.utils import dist
from llmfoundry.metrics.token_acc import TokenAccuracy
from llmfoundry.models.hf.hf_base import BaseHuggingFaceModel
from llmfoundry.models.hf.hf_causal_lm import ComposerHFCausalLM
from llmfoundry.models.hf.hf_fsdp import hf_get_init_device
from llmfoundry.models.utils import init_empty_weights
from llmfoundry.utils.config_utils import set_config_overrides
from peft import LoraConfig, PeftModelForCausalLM, PeftType
from torch import nn
from torchmetrics import Metric
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.llama import LlamaConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.adapters import methods, pissa
from foundry_ext.adapters.casts import leave_casts_to_autocast
from foundry_ext.adapters.dora import use_fast_dora
from foundry_ext.adapters.frozen import check_frozen_dtype, hold_frozen_in_bf16
from foundry_ext.checkpoints.export import adaptable_modules, load_adapter
from foundry_ext.models.attention import resolve_backend
from foundry_ext.models.compiled import check_compile, compile_model
from foundry_ext.models.decoder import SmolLM2DecoderLayer
from foundry_ext.models.loss import check_loss
from foundry_ext.models.pretrained import (
    HUB_NAMES,
    load_generation_config,
    load_strictly,
    naming_the_hub,
    shipped_config,
)
from foundry_ext.models.smollm2 import PackedCausalLMOutput, SmolLM2ForCausalLM
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)


class ComposerSmolLM2(BaseHuggingFaceModel):
    """SmolLM2 on packed batches, with everything `hf_causal_lm` takes in a YAML.

    Args:
        tokenizer: the tokenizer, saved with every checkpoint.
        pretrained_model_name_or_path: hub name, local folder, or a shape shipped here
            ("smollm2-135m", "smollm2-360m", "smollm2-1.7b") for random weights without a network.
        pretrained: load the weights; else they are random.
        pretrained_lora_id_or_path: a saved adapter to go on training.
        config_overrides: changes to the configuration, e.g. {num_hidden_layers: 4}.
        peft_config: {peft_type: LORA, task_type: CAUSAL_LM, r, lora_alpha, use_dora, ...}; all
            seven linears unless target_modules says otherwise. Checked by adapters.methods.
        init_device: cpu, meta, or mixed (cpu on rank 0, meta elsewhere, for FSDP).
        attention_backend: auto, flash_attn, torch_varlen, flex, blockwise (CPU) or sdpa; with
            attention_dropout in config_overrides flash_attn, sdpa, or before torch 2.10
            torch_varlen.
        loss: chunked (any device), compiled (the same, fused by torch.compile) or liger (GPU).
        compile: none, layers or model: torch.compile of what is trained; wants packs of one shape,
            `fixed_shape: true` in the train loader. Evaluation is not compiled.
        compile_mode: torch.compile's mode, e.g. reduce-overhead for CUDA graphs.
        activation_checkpointing: recompute each layer in the backward pass. Set here, because
            llm-foundry drops fsdp_config, and what it says of this, on a single GPU.
        frozen_dtype: bf16 holds an adapter's frozen linears so, under precision: amp_bf16.
        use_train_metrics: only false is possible, for training computes no logits.
        trust_remote_code, use_auth_token, allow_embedding_resizing, additional_eval_metrics,
        should_save_peft_only: as in `hf_causal_lm`, with trust_remote_code off.

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
        use_auth_token: bool = False,
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
        _check_settings(
            use_train_metrics=use_train_metrics or bool(additional_train_metrics),
            load_in_8bit=load_in_8bit,
            trust_remote_code=trust_remote_code,
        )
        _check_backend(attention_backend)
        check_loss(loss)
        check_compile(compile, compile_mode)
        adapters = [name for name in (pretrained_lora_id_or_path, peft_config) if name is not None]
        check_frozen_dtype(frozen_dtype, adapted=bool(adapters), init_device=init_device)
        if len(adapters) == 2:
            raise UserError(
                f"pretrained_lora_id_or_path: {pretrained_lora_id_or_path} brings its own"
                " configuration; leave out peft_config"
            )
        if adapters and allow_embedding_resizing:
            raise UserError(
                "allow_embedding_resizing: true would add random rows, frozen and in no checkpoint"
                " of an adapter; leave it out, or train without peft_config"
            )
        self._num_tokens_needed = 0 if allow_embedding_resizing else len(tokenizer)
        super().__init__(
            pretrained_model_name_or_path,
            tokenizer=tokenizer,
            pretrained=pretrained,
            pretrained_lora_id_or_path=pretrained_lora_id_or_path,
            trust_remote_code=trust_remote_code,
            use_auth_token=use_auth_token,
            init_device=init_device,
            config_overrides=config_overrides,
            shift_labels=True,
            peft_config=peft_config,
            allow_embedding_resizing=allow_embedding_resizing,
            use_train_metrics=False,
            additional_eval_metrics=additional_eval_metrics,
            should_save_peft_only=should_save_peft_only,
        )
        inner = self.inner_model
        if pretrained:
            size = inner.config.vocab_size
            _check_vocabulary(pretrained_model_name_or_path, tokenizer, size)
        if isinstance(self.model, PeftModelForCausalLM):
            for adapter in self.model.peft_config.values():
                # Composer makes a plain string of it, with which peft 0.16 cannot save.
                adapter.peft_type = PeftType(adapter.peft_type)
            if pissa.is_pissa(self.model):
                pissa.remember_initial_factors(self.model)
            if frozen_dtype == "bf16":
                hold_frozen_in_bf16(self.model)
            use_fast_dora(self.model)
            leave_casts_to_autocast(self.model)
        _check_backend(attention_backend, dropout=inner.config.attention_dropout > 0)
        inner.attention_backend, inner.loss_implementation = attention_backend, loss
        if activation_checkpointing:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        compile_model(inner, scope=compile, mode=compile_mode)
        if inner.config.tie_word_embeddings:
            assert inner.lm_head.weight is inner.model.embed_tokens.weight, "head came untied"

    @property
    def inner_model(self) -> SmolLM2ForCausalLM:
        """The decoder, below an adapter if there is one."""
        model = self.model
        inner = model.get_base_model() if isinstance(model, PeftModelForCausalLM) else model
        assert isinstance(inner, SmolLM2ForCausalLM)
        return inner

    @classmethod
    def build_config(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str,
        trust_remote_code: bool,
        use_auth_token: bool,
        attn_implementation: str | None,
        config_overrides: dict[str, Any],
    ) -> LlamaConfig:
        """The configuration, with overrides; a shipped shape needs no network."""
        source = shipped_config(pretrained_model_name_or_path) or pretrained_model_name_or_path
        with naming_the_hub(source):
            if Path(source).is_dir() and not Path(source, "config.json").is_file():
                raise OSError("transformers would name every architecture")
            config = AutoConfig.from_pretrained(
                source,
                trust_remote_code=False,  # its code is never needed, see _check_settings
                token=True if use_auth_token else None,
                torch_dtype=torch.float32,
            )
        if not isinstance(config, LlamaConfig):
            raise UserError(
                f"smollm2_packed: {pretrained_model_name_or_path} is a {config.model_type} model;"
                " only Llama-shaped ones run packed, use hf_causal_lm for others"
            )
        resized = config_overrides.keys() & {"hidden_size", "num_attention_heads"}
        if resized and "head_dim" not in config_overrides:
            # Derived when the file was read; derive it again from the overridden sizes.
            hidden, heads = (
                config_overrides.get(key, getattr(config, key))
                for key in ("hidden_size", "num_attention_heads")
            )
            config_overrides = {**config_overrides, "head_dim": hidden // heads}
        set_config_overrides(config, config_overrides)
        config._name_or_path = pretrained_model_name_or_path  # not where a shape lies on this disk
        return config

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
        """Builds the decoder; with `pretrained`, no weight may be missing or left over."""
        device = hf_get_init_device(init_device)
        if pretrained and device == "meta" and init_device != "mixed":
            raise UserError("init_device: meta holds no weights; use cpu or mixed with pretrained")
        if pretrained and shipped_config(pretrained_model_name_or_path):
            raise UserError(
                f"pretrained_model_name_or_path: {pretrained_model_name_or_path} is a shape without"
                " weights; set pretrained: false, or name the hub's checkpoint"
                f" {HUB_NAMES[pretrained_model_name_or_path]}"
            )
        with dist.run_local_rank_zero_first():  # one download a node
            config, stored = (
                cls.build_config(
                    pretrained_model_name_or_path,
                    trust_remote_code,
                    use_auth_token,
                    None,
                    overrides,
                )
                for overrides in (config_overrides, {})
            )
            for key in ("num_attention_heads", "num_key_value_heads", "head_dim"):
                # The weights can fit all the same.
                if pretrained and getattr(config, key) != getattr(stored, key):
                    raise UserError(
                        f"config_overrides.{key}: {getattr(config, key)} for a model pretrained"
                        f" with {getattr(stored, key)}; leave it out"
                    )
            if pretrained and device == "cpu":
                model = load_strictly(pretrained_model_name_or_path, config, use_auth_token)
            elif device == "cpu":
                model = SmolLM2ForCausalLM(config)
            elif device == "meta":
                with init_empty_weights(include_buffers=False):
                    model = SmolLM2ForCausalLM(config)
                if config.tie_word_embeddings:
                    # Set as an attribute, llm-foundry's own init_empty_weights, still on around us,
                    # would make a copy of it and so untie the head.
                    tied = cast(nn.Parameter, model.model.embed_tokens.weight)
                    model.lm_head._parameters["weight"] = tied
            else:
                raise UserError(f"init_device: {init_device!r}; choose cpu, meta or mixed")
        if pretrained:
            load_generation_config(model, pretrained_model_name_or_path)
        if pretrained_lora_id_or_path is None:
            return model
        try:
            return load_adapter(model, pretrained_lora_id_or_path)
        except ValueError as error:
            raise UserError(f"pretrained_lora_id_or_path: {error}") from error

    def transform_model(self, model: Any) -> Any:
        """Leave the model as it is, and keep its names for `get_peft_config`, called next.

        Raises:
            UserError: the tokenizer has ids that the model has no embedding for.
        """
        vocabulary = model.config.vocab_size
        if self._num_tokens_needed > vocabulary:
            raise UserError(
                f"tokenizer: its {self._num_tokens_needed} tokens are more than the model's"
                f" {vocabulary}; name the model's own tokenizer, or set"
                " allow_embedding_resizing: true for new rows that training has to fill"
            )
        self._adaptable_modules = adaptable_modules(model)
        return super().transform_model(model)

    def get_peft_config(self, peft_config_dict: dict[str, Any]) -> LoraConfig:
        """As in `hf_causal_lm`, checked first, with all seven linears as the default target."""
        settings = methods.with_defaults(peft_config_dict)
        methods.check(settings, self._adaptable_modules)
        return super().get_peft_config(settings)  # pyright: ignore[reportReturnType]

    @staticmethod
    def prepare_inner_model(model: Any, init_device: str | None = None) -> None:
        """As in `hf_causal_lm`, but what it hangs on the model for FSDP can be pickled."""
        BaseHuggingFaceModel.prepare_inner_model(model, init_device)
        model.fsdp_wrap_fn = model.activation_checkpointing_fn = _is_decoder_layer
        model.param_init_fn = model._init_weights

    def get_metadata(self) -> dict[str, Any]:
        """What a checkpoint says of the model, generation settings included, for its export."""
        metadata = super().get_metadata()
        generation = self.inner_model.generation_config
        assert generation is not None
        content = generation.to_dict()
        metadata["model"]["generation_config"] = {"file_extension": ".json", "content": content}
        return metadata

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All weights, or the adapter's alone; under DDP too, which collects them in
        `destination` and so past Composer's filter."""
        kept = super().state_dict(*args, **kwargs)
        destination = kwargs.get("destination")
        if destination is not None and self.using_peft and self.should_save_peft_only:
            for name in destination.keys() - kept.keys():
                if name.startswith(kwargs.get("prefix", "")):
                    del destination[name]
        return kept

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Takes a checkpoint of this very model: Composer resumes with `strict` off, and with it on
        refuses the checkpoint of an adapter, which holds no base weights.

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

    def eval_forward(self, batch: Any, outputs: Any | None = None) -> Any:
        """Packed batches go through the chunked loss, so [T, V] logits never exist; other batches,
        those of in-context tasks, give logits as in every causal language model."""
        if "cu_seqlens" not in batch:
            return super().eval_forward(batch, outputs)
        return self.forward(batch) if outputs is None else outputs

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> dict:
        """Packed evaluation adds its sums to the metrics' own; the results are those of logits."""
        if not isinstance(outputs, PackedCausalLMOutput):
            return super().update_metric(batch, outputs, metric)
        count = outputs.num_loss_tokens
        assert outputs.loss is not None and outputs.num_correct is not None and count is not None
        device = metric.device
        if isinstance(metric, LanguageCrossEntropy):  # perplexity is a kind of it
            metric.sum_loss += (outputs.loss * count).to(device)
            metric.total_items += count.to(device)
        elif isinstance(metric, TokenAccuracy):
            metric.correct_tokens += outputs.num_correct.to(device)
            metric.total_tokens += count.to(device)
        else:
            raise UserError(
                f"{type(metric).__name__} needs logits, which a packed evaluation does not compute;"
                " take it out of additional_eval_metrics, or evaluate with the finetuning loader"
            )
        # Updated from outside, so torchmetrics must be told.
        metric._update_count += 1
        metric._computed = None
        return {}


def _is_decoder_layer(module: nn.Module) -> bool:
    return isinstance(module, SmolLM2DecoderLayer)


def _check_settings(
    *,
    use_train_metrics: bool,
    load_in_8bit: bool,
    trust_remote_code: bool,
) -> None:
    if use_train_metrics:
        raise UserError(
            "use_train_metrics: true needs logits, which training does not compute; set it to false"
            " (the training loss is logged anyway)"
        )
    if load_in_8bit:
        raise UserError("load_in_8bit: true is for inference only; leave it out")
    if trust_remote_code:
        log.warning(
            "trust_remote_code: true has no effect here: the model's code is this package's, and"
            " none that comes with the weights is run"
        )


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Composer refuses a tokenizer of more tokens than the model has. Of fewer, some are usual:
    vocabularies are rounded up."""
    if len(tokenizer) < 0.9 * vocabulary:
        log.warning(
            "the tokenizer %s has %d tokens, the model %s %d: unless it was trained with that"
            " tokenizer, every id means something else to it; name the model's own",
            *(tokenizer.name_or_path, len(tokenizer), name, vocabulary),
        )


def _check_backend(backend: str, *, dropout: bool = False) -> None:
    # The trainer's device is not known yet, but it is the GPU wherever there is one.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    resolve_backend(backend, device=device, dtype=torch.bfloat16, dropout=dropout)

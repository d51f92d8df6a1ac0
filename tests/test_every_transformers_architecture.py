"""Architectures of ``transformers`` are recorded exactly, and compute what they would have unrecorded.

Models are built from tiny configurations: nothing is downloaded. They bring what ``torch.nn`` alone does
not: output dataclasses inside output dataclasses, caches that grow, tied weights, layers that are called
several times or skipped by chance, hooks that a model puts on itself, and in-place operations.

Nothing here trusts actrec. What a call returned is what a plain hook saw, cloned, in the same forward;
what a model computes is what its twin computes: built alike, seeded alike, never recorded.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, set_seed

from actrec import IncompleteLayerWarning, Opaque, UnusedLayerWarning, record

from .sweep import some
from .test_every_torch_module import (
    _one_thread,  # noqa: F401  # a fixture: sums are added up in one order
    assert_same,
    cloned,
    gradients,
    hooks_of,
    overwrite,
    tensors_in,
)

# --- Architectures ---------------------------------------------------------------------------------

#: What to ask of every configuration that has an option of that name.
SIZES = {
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "begin_suppress_tokens": None,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "projection_dim"), 16),
    **dict.fromkeys(("decoder_hidden_size", "image_text_hidden_size", "state_size"), 16),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim"), 8),
    **dict.fromkeys(("intermediate_size", "d_ff", "d_inner", "ffn_dim", "hidden_dim"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "decoder_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_num_attention_heads",), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_size"), 8),
    "num_key_value_heads": 1,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), 32),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), 32),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window", "local_attention"), 4),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop"), 0.1),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "image_size": 32,
    "patch_size": 8,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
}

Options = dict[str, Any]

DECODERS: dict[str, Options] = {
    "BioGptForCausalLM": {},
    "BloomForCausalLM": {},
    "CodeGenForCausalLM": {"rotary_dim": 4, "n_head": 4},
    "CohereForCausalLM": {},
    "DeepseekV3ForCausalLM": {
        "num_key_value_heads": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "FalconForCausalLM": {},
    "GPT2LMHeadModel": {},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GPTNeoXForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {},
    "GemmaForCausalLM": {},
    "GptOssForCausalLM": {},
    "GraniteForCausalLM": {},
    "JambaForCausalLM": {
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "LlamaForCausalLM": {},
    "Mamba2ForCausalLM": {"num_heads": 4, "n_groups": 2, "chunk_size": 4, "conv_kernel": 4},
    "MambaForCausalLM": {"conv_kernel": 4},
    "MistralForCausalLM": {},
    "MixtralForCausalLM": {"output_router_logits": True},
    "OPTForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "Phi3ForCausalLM": {},
    "PhiForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen2MoeForCausalLM": {"output_router_logits": True},
    "Qwen3ForCausalLM": {},
    "Qwen3NextForCausalLM": {
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "RecurrentGemmaForCausalLM": {
        "num_hidden_layers": 3,
        "lru_width": 16,
        "attention_window_size": 4,
    },
    "ReformerModelWithLMHead": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [2, 4],
        "axial_pos_embds_dim": [8, 8],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "feed_forward_size": 32,
        "max_position_embeddings": 8,
        "hash_seed": 0,
        "is_decoder": True,
    },
    "RwkvForCausalLM": {"attention_hidden_size": 16, "context_length": 16},
    "StableLmForCausalLM": {},
    "XLNetLMHeadModel": {},
}

ENCODERS: dict[str, Options] = {
    "AlbertForMaskedLM": {"num_hidden_layers": 3},
    "BertForMaskedLM": {},
    "BigBirdForMaskedLM": {"attention_type": "original_full"},
    "ConvBertForMaskedLM": {"embedding_size": 16, "conv_kernel_size": 3},
    "DebertaForMaskedLM": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "DebertaV2ForMaskedLM": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "conv_kernel_size": 3,
    },
    "DistilBertForMaskedLM": {},
    "ElectraForPreTraining": {},
    "FNetForMaskedLM": {},
    "FunnelForMaskedLM": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "LongformerForMaskedLM": {},
    "MPNetForMaskedLM": {},
    "MobileBertForMaskedLM": {
        "hidden_size": 32,
        "intra_bottleneck_size": 16,
        "true_hidden_size": 16,
    },
    "ModernBertForMaskedLM": {},
    "PerceiverForMaskedLM": {
        "d_latents": 16,
        "num_latents": 4,
        "num_blocks": 2,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "max_position_embeddings": 8,
    },
    "RoFormerForMaskedLM": {},
    "RobertaForMaskedLM": {},
}

ENCODER_DECODERS: dict[str, Options] = {
    "BartForConditionalGeneration": {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
    "LEDForConditionalGeneration": {},
    "LongT5ForConditionalGeneration": {"local_radius": 3, "encoder_attention_type": "local"},
    "M2M100ForConditionalGeneration": {},
    "MBartForConditionalGeneration": {},
    "MT5ForConditionalGeneration": {},
    "MarianMTModel": {},
    "PegasusForConditionalGeneration": {},
    "ProphetNetForConditionalGeneration": {},
    "SwitchTransformersForConditionalGeneration": {
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "T5ForConditionalGeneration": {"decoder_start_token_id": 0},
}

VISION: dict[str, Options] = {
    "BeitForImageClassification": {"use_relative_position_bias": True, "drop_path_rate": 0.2},
    "ConvNextForImageClassification": {
        "hidden_sizes": [8, 16],
        "depths": [1, 2],
        "num_stages": 2,
        "patch_size": 4,
        "drop_path_rate": 0.5,
    },
    "ConvNextV2ForImageClassification": {
        "hidden_sizes": [8, 16],
        "depths": [1, 2],
        "num_stages": 2,
        "patch_size": 4,
    },
    "CvtForImageClassification": {
        "embed_dim": [8, 16],
        "patch_sizes": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [2, 1],
        "num_heads": [1, 2],
        "depth": [1, 2],
        "mlp_ratio": [2.0, 2.0],
        "attention_drop_rate": [0.0, 0.1],
        "drop_rate": [0.0, 0.1],
        "drop_path_rate": [0.0, 0.1],
        "qkv_bias": [True, True],
        "cls_token": [False, True],
        "qkv_projection_method": ["dw_bn", "dw_bn"],
        "kernel_qkv": [3, 3],
        "padding_kv": [1, 1],
        "stride_kv": [2, 2],
        "padding_q": [1, 1],
        "stride_q": [1, 1],
    },
    "DeiTForImageClassificationWithTeacher": {},
    "Dinov2ForImageClassification": {"drop_path_rate": 0.2},
    "FocalNetForImageClassification": {
        "embed_dim": 8,
        "patch_size": 4,
        "depths": [1, 1],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
    },
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.25},
    "MobileViTForImageClassification": {
        "hidden_sizes": [16, 16, 16],
        "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
        "patch_size": 2,
    },
    "PoolFormerForImageClassification": {
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
    },
    "RegNetForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 4},
    "ResNetForImageClassification": {
        "hidden_sizes": [8, 16],
        "depths": [1, 2],
        "layer_type": "basic",
    },
    "SegformerForSemanticSegmentation": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    },
    "SwinForImageClassification": {
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "drop_path_rate": 0.2,
    },
    "Swinv2ForImageClassification": {
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [1, 2],
    },
    "ViTForImageClassification": {},
    "ViTMAEForPreTraining": {},
    "YolosForObjectDetection": {"image_size": [32, 32], "num_detection_tokens": 4},
}

WAVES: dict[str, Options] = {
    "HubertForCTC": {},
    "SEWForCTC": {},
    "UniSpeechForCTC": {"num_ctc_classes": 50},
    "Wav2Vec2ForCTC": {"layerdrop": 0.5},
    "WavLMForCTC": {},
}

IMAGE_AND_TEXT: dict[str, Options] = {
    "BlipForConditionalGeneration": {},
    "CLIPModel": {},
    "SiglipModel": {},
    "ViltForQuestionAnswering": {},
}


def _text() -> Options:
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    return {"input_ids": torch.randint(3, 48, (2, 8)), "attention_mask": mask}


def _text_and_answer() -> Options:
    return {**_text(), "decoder_input_ids": torch.randint(3, 48, (2, 5))}


def _image() -> Options:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _wave() -> Options:
    return {"input_values": torch.randn(2, 800)}


def _image_and_text() -> Options:
    return {**_text(), **_image()}


def _image_in_text() -> Options:
    tokens = torch.cat([torch.full((2, 16), 49), torch.randint(3, 48, (2, 4))], 1)
    return {"input_ids": tokens, **_image()}


def _spectrum() -> Options:
    return {"input_values": torch.randn(2, 24, 16)}


def _spectrum_and_text() -> Options:
    features = torch.randn(2, 8, 40)
    return {"input_features": features, "decoder_input_ids": torch.randint(3, 48, (2, 5))}


def _sound() -> Options:
    return {"input_values": torch.randn(2, 1, 320)}


def _series() -> Options:
    return {"past_values": torch.randn(2, 16, 3)}


def _episode() -> Options:
    return {
        "states": torch.randn(2, 4, 5),
        "actions": torch.randn(2, 4, 3),
        "rewards": torch.randn(2, 4, 1),
        "returns_to_go": torch.randn(2, 4, 1),
        "timesteps": torch.arange(4).repeat(2, 1),
        "attention_mask": torch.ones(2, 4),
    }


class Architecture(NamedTuple):
    """What to give to a model of a certain class, and what its configuration needs besides ``SIZES``."""

    given: Callable[[], Options]
    options: Options


GROUPS = [
    (_text, DECODERS),
    (_text, ENCODERS),
    (_text_and_answer, ENCODER_DECODERS),
    (_image, VISION),
    (_wave, WAVES),
    (_image_and_text, IMAGE_AND_TEXT),
]

ARCHITECTURES = {
    **{
        name: Architecture(given, options)
        for given, group in GROUPS
        for name, options in group.items()
    },
    "ASTForAudioClassification": Architecture(
        _spectrum,
        {
            "max_length": 24,
            "num_mel_bins": 16,
            "frequency_stride": 4,
            "time_stride": 4,
        },
    ),
    "DecisionTransformerModel": Architecture(
        _episode, {"state_dim": 5, "act_dim": 3, "max_ep_len": 16}
    ),
    "EncodecModel": Architecture(
        _sound,
        {
            "num_filters": 4,
            "codebook_size": 16,
            "codebook_dim": 16,
            "upsampling_ratios": [4, 2],
            "num_lstm_layers": 1,
            "target_bandwidths": [24.0],
        },
    ),
    "LlavaForConditionalGeneration": Architecture(
        _image_in_text,
        {
            "text_config": "LlamaConfig",
            "vision_config": "CLIPVisionConfig",
            "image_token_index": 49,
        },
    ),
    "PatchTSTForPrediction": Architecture(
        _series,
        {
            "num_input_channels": 3,
            "context_length": 16,
            "patch_length": 4,
            "patch_stride": 4,
            "prediction_length": 4,
        },
    ),
    "WhisperForConditionalGeneration": Architecture(
        _spectrum_and_text, {"num_mel_bins": 8, "max_source_positions": 20}
    ),
}


def configuration(kind: Any, options: Options) -> Any:
    """A tiny configuration; those inside it, of which text and image have one each, are tiny too."""
    fields = {field.name for field in dataclasses.fields(kind)}
    chosen = {name: size for name, size in SIZES.items() if name in fields}
    for name, inner in kind.sub_configs.items():
        if inner is not AutoConfig:
            chosen[name] = configuration(inner, {})
        elif name in options:
            options = {**options, name: configuration(getattr(transformers, options[name]), {})}
    return kind(**{**chosen, **options})


def build(name: str, *, attention: str | None = None, **options: Any) -> Any:
    """A model, always with the same weights."""
    kind = getattr(transformers, name)
    set_seed(1)
    config = configuration(kind.config_class, {**ARCHITECTURES[name].options, **options})
    return kind._from_config(config, attn_implementation=attention)


def given_to(name: str) -> Options:
    """What to call the model with, always the same."""
    set_seed(3)
    return ARCHITECTURES[name].given()


# --- Trusted references ----------------------------------------------------------------------------

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


def picture(value: Any, *, live: bool = False) -> Any:
    """What can be seen of a value: types, items and attributes in order, and clones of the tensors.

    Of a ``live`` value, caches and the like are replaced by the placeholder that a record should have;
    in a record nothing may be left to replace.
    """
    look = partial(picture, live=live)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return type(value), [look(item) for item in value]
    if isinstance(value, dict) or (dataclasses.is_dataclass(value) and type(value) is not Opaque):
        items = [*dict.items(value)] if isinstance(value, dict) else []
        attributes = sorted(vars(value).items()) if hasattr(value, "__dict__") else []
        return type(value), [(key, look(item)) for key, item in items + attributes]
    if live and not isinstance(value, CONSTANTS):
        return Opaque(f"{type(value).__module__}.{type(value).__qualname__}")
    return value


def callable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have a forward, less those that compute a parametrized weight."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).forward is not nn.Module.forward
        and "parametrizations" not in name.split(".")
    }


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Those of them that hold no other module; of an attention that never calls what it holds, itself."""
    found = callable_modules(model)
    whole = nn.MultiheadAttention
    return {
        name: module
        for name, module in found.items()
        if isinstance(module, whole)
        or not (
            {child for child, _ in module.named_children()} - {"parametrizations"}
            or isinstance(found.get(name.rpartition(".")[0]), whole)
        )
    }


def bound(module: nn.Module, args: Any, kwargs: Any) -> Options:
    """What Python binds the arguments of a call to, with surplus keywords among the others."""
    signature = inspect.signature(module.forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


class Reference:
    """What plain hooks saw of every call, as pictures."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.inputs: dict[str, list[Any]] = {name: [] for name in modules}
        self.outputs: dict[str, list[Any]] = {name: [] for name in modules}
        self.watching = True  # not while backward() runs, where checkpoints call modules again
        self._modules = modules
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            before, after = partial(self._before, name), partial(self._after, name)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.watching:
            inputs = bound(module, args, kwargs)
            self.inputs[name].append(
                [(key, picture(inputs[key], live=True)) for key in sorted(inputs)]
            )

    def _after(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if self.watching:
            self.outputs[name].append(picture(output, live=True))


# --- One comparison --------------------------------------------------------------------------------


class Mode(NamedTuple):
    """How a model is run and recorded."""

    training: bool
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    layers: Any = ("", "**")
    inputs: bool = False
    sharing: bool = False  # of memory, copy-on-write
    attention: str | None = None
    options: Mapping[str, Any] = MappingProxyType({})  # of the configuration


MODES = {
    "train": Mode(training=True),
    "train, inputs, shared": Mode(training=True, inputs=True, sharing=True),
    "eval, no_grad, inputs, verbose": Mode(
        training=False,
        context=torch.no_grad,
        inputs=True,
        attention="eager",
        options={"output_hidden_states": True, "output_attentions": True},
    ),
    "eval, inference_mode, leaves, shared": Mode(
        training=False, context=torch.inference_mode, layers=None, sharing=True
    ),
}


class Step(NamedTuple):
    """What a model computed in one step, as far as anybody can see."""

    output: Any
    gradients: list[Tensor | None]
    random_state: Tensor
    state: list[Tensor]
    alive: Any  # all that a record might share memory with


def step(model: Any, given: Options, mode: Mode, reference: Reference | None = None) -> Step:
    """A forward from a fixed random state; in training also ``backward()`` and an update in place."""
    set_seed(2)
    with mode.context():
        output = model(**given)
    seen = picture(output, live=True)
    if reference is not None:
        reference.watching = False
    gradient = gradients(model, output, given) if mode.training else []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
    state = [*model.parameters(), *model.buffers()]
    return Step(seen, gradient, torch.get_rng_state(), cloned(state), [output, given, state])


class Outcome(NamedTuple):
    """A model that was recorded, beside its twin that was not."""

    acts: Any
    reference: Reference
    actual: Step
    expected: Step
    hooks: list[list[str]]
    expected_hooks: list[list[str]]
    warned: list[str]
    bare: set[str]  # leaves that nobody chose, and that have no weights of their own


def hook_names(model: nn.Module) -> list[list[str]]:
    """The hooks on every module, in order. Models put some on themselves, when they are first called."""
    return [
        [getattr(hook, "__qualname__", repr(hook)) for hook in table.values()]
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
    ]


Recorder = Callable[..., AbstractContextManager[Any]]


def outcome(name: str, mode: Mode, recorder: Recorder = record) -> Outcome:
    """Run a model that is recorded, and its twin."""
    model, twin = (
        build(name, attention=mode.attention, **mode.options).train(mode.training) for _ in range(2)
    )
    expected = step(twin, given_to(name), mode)
    modules = leaves(model) if mode.layers is None else callable_modules(model)
    given = given_to(name)
    with Reference(modules) as reference, unused_layers() as warned:
        before = hooks_of(model)
        with recorder(model, mode.layers, inputs=mode.inputs) as acts:
            actual = step(model, given, mode, reference)
        with located("the hooks that were there before"):
            after = {id(hook) for hook in hooks_of(model)}
            assert all(id(hook) in after for hook in before)
    hooks = hook_names(model), hook_names(twin)
    bare = without_weights(model, modules) if mode.layers is None else set()
    return Outcome(acts, reference, actual, expected, *hooks, warned, bare)


def without_weights(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The names of those of the modules whose parameters, if any, others have as well."""
    owners = Counter(id(one) for module in model.modules() for one in module._parameters.values())
    return {
        name
        for name, module in modules.items()
        if all(owners[id(one)] > 1 for one in module.parameters())
    }


@contextmanager
def unused_layers() -> Iterator[list[str]]:
    """The texts of the warnings about layers without a call."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnusedLayerWarning)
        # Its reversible layers run again inside backward(), which is said.
        warnings.filterwarnings("ignore", ".*of this Reformer", IncompleteLayerWarning)
        yield texts
    texts += [str(warning.message) for warning in caught]


def assert_exact(acts: Any, reference: Reference, *, inputs: bool = False) -> None:
    """Every call is there, with exactly what the plain hooks saw."""
    counts = {name: len(calls) for name, calls in reference.outputs.items()}
    with located("the number of calls"):
        assert {name: len(layer) for name, layer in acts.items()} == counts
    for name, calls in reference.outputs.items():
        with located(f"what {name!r} returned"):
            assert_same([picture(value) for value in acts[name]], calls)
        if inputs:
            with located(f"what {name!r} was given"):
                received = [picture_of_inputs(value) for value in acts.inputs[name]]
                assert_same(received, reference.inputs[name])


def picture_of_inputs(inputs: Options) -> list[tuple[str, Any]]:
    """The picture that the plain hooks made of the inputs of a call."""
    return [(key, picture(inputs[key])) for key in sorted(inputs)]


@contextmanager
def located(where: str) -> Iterator[None]:
    """Say what was compared."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"in {where}")
        raise


def assert_warned(
    warned: list[str], reference: Reference, bare: Collection[str] = frozenset()
) -> None:
    """The warning names the layers that never ran, all of them and no other; none that is ``bare``."""
    unused = {name for name, calls in reference.outputs.items() if not calls} - {*bare}
    assert len(warned) == bool(unused), warned
    for text in warned:
        named = re.findall(r"'([^']*)'", text)
        not_named = sum(map(int, re.findall(r"and (\d+) more", text)))
        assert set(named) <= unused, text
        assert len(named) + not_named == len(unused), text
        assert f"of {len(unused)} of {len(reference.outputs)} layers" in text


def check(name: str, mode: Mode, recorder: Recorder = record) -> Outcome:
    """Hold a recorded model to every promise."""
    done = outcome(name, mode, recorder)
    assert_exact(done.acts, done.reference, inputs=mode.inputs)
    for field in ("output", "gradients", "random_state", "state"):
        with located(f"the {field} of the model"):
            assert_same(getattr(done.actual, field), getattr(done.expected, field))
    with located("the hooks that the model has in the end"):
        assert done.hooks == done.expected_hooks
    with located("the warning about layers that never ran"):
        assert_warned(done.warned, done.reference, done.bare)
    return done


def check_independent(done: Outcome, mode: Mode) -> None:
    """The record stays as it is, whatever is written to the memory of the model."""
    kept = [list(layer) for layer in done.acts.values()]
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors_in(kept))
    overwrite(done.actual.alive, 1)
    assert_exact(done.acts, done.reference, inputs=mode.inputs)


# --- The promises ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_true_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model that takes a seed from the system (Reformer, in training) take the same one twice."""
    monkeypatch.setattr(torch, "seed", lambda: torch.manual_seed(4).initial_seed())


#: Whether memory is shared copy-on-write.
SHARING = "actrec._values.snapshot.lazy_clone"


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "mode"), some([(name, mode) for name in ARCHITECTURES for mode in MODES], 23)
)
def test_every_call_is_recorded_exactly_and_the_model_feels_nothing(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not MODES[mode].sharing:
        monkeypatch.setattr(SHARING, None)
    done = check(name, MODES[mode])
    assert done.acts.num_passes == 1
    assert any(g is not None for g in done.expected.gradients) == MODES[mode].training
    check_independent(done, MODES[mode])


def test_layers_that_share_their_weights_are_recorded_call_by_call() -> None:
    acts = check("AlbertForMaskedLM", MODES["train"]).acts
    group = "albert.encoder.albert_layer_groups.0"
    assert len(acts[group]) == len(acts[f"{group}.albert_layers.0.ffn"]) == 3


@pytest.mark.parametrize(
    ("name", "embedding", "head"),
    [
        ("GPT2LMHeadModel", "transformer.wte", "lm_head"),
        ("BertForMaskedLM", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
        ("T5ForConditionalGeneration", "decoder.embed_tokens", "lm_head"),
    ],
)
def test_tied_weights_are_recorded_exactly_and_stay_tied(
    name: str, embedding: str, head: str
) -> None:
    model = build(name).train()
    modules = {layer: model.get_submodule(layer) for layer in (embedding, head)}
    weight = modules[embedding].weight
    assert modules[head].weight is weight
    before = weight.detach().clone()
    with Reference(modules) as reference, record(model, [embedding, head]) as acts:
        step(model, given_to(name), MODES["train"], reference)
    assert_exact(acts, reference)
    assert all(acts.values())
    assert modules[embedding].weight is modules[head].weight is weight
    assert not torch.equal(weight, before), "the step has updated it, in place"


def test_a_model_that_puts_hooks_on_itself_while_it_is_recorded_keeps_them() -> None:
    done = check("LlamaForCausalLM", MODES["eval, no_grad, inputs, verbose"])
    assert any(done.hooks)
    assert len(done.acts[""][0].hidden_states) == 3


@pytest.mark.parametrize(
    ("name", "dropout"),
    [
        ("BertForMaskedLM", "bert.encoder.layer.*.attention.self.dropout"),
        ("FalconForCausalLM", "transformer.h.*.self_attention.attention_dropout"),
        ("GPT2LMHeadModel", "transformer.h.*.attn.attn_dropout"),
    ],
)
def test_dropout_that_fused_attention_does_itself_is_reported(name: str, dropout: str) -> None:
    model = build(name, attention="sdpa").train()
    with (
        pytest.warns(UnusedLayerWarning, match="attention often computes dropout itself") as warned,
        record(model, dropout),
    ):
        model(**given_to(name))
    text = str(warned[0].message)
    assert f"{dropout.replace('*', '0')!r}, {dropout.replace('*', '1')!r}: " in text
    with record(model):  # nobody has chosen it
        model(**given_to(name))


def test_dropout_that_is_called_is_not_reported() -> None:
    model = build("BloomForCausalLM").train()  # its attention is written out
    with record(model) as acts:
        model(**given_to("BloomForCausalLM"))
    assert len(acts["transformer.h.0.self_attention.attention_dropout"]) == 1


# --- Generation ------------------------------------------------------------------------------------

STEPS = 4

WAYS: dict[str, Options] = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 2},
    "static cache": {"cache_implementation": "static"},
}


def generated(model: Any, given: Options, how: Options) -> tuple[Tensor, Tensor]:
    """What was generated, and where the random stream is then."""
    set_seed(2)
    tokens = model.generate(**given, max_new_tokens=STEPS, min_new_tokens=STEPS, **how)
    return tokens, torch.get_rng_state()


def cache_of(output: Any) -> Any:
    """Whatever stands for the cache: its name in an output depends on the version."""
    (cache,) = (value for value in output.values() if isinstance(value, Opaque))
    return cache


def check_generation(name: str, how: Options) -> Any:
    """Record everything while a model generates, beside its twin."""
    model, twin = build(name).eval(), build(name).eval()
    given = {key: value for key, value in given_to(name).items() if not key.startswith("decoder")}
    expected = generated(twin, given, how)
    with (
        Reference(callable_modules(model)) as reference,
        unused_layers() as warned,
        record(model, ["", "**"], inputs=True) as acts,
    ):
        actual = generated(model, given, how)
    assert_same(actual, expected)
    assert_exact(acts, reference, inputs=True)
    assert_warned(warned, reference)
    assert hook_names(model) == hook_names(twin)
    return acts


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_a_decoder_that_generates_is_recorded_step_by_step_without_its_cache(
    name: str, how: str
) -> None:
    acts = check_generation(name, WAYS[how])
    steps = list(range(STEPS))
    assert acts.num_passes == STEPS
    assert {tuple(layer.passes) for layer in acts.values()} <= {tuple(steps), ()}
    assert acts[""].passes == acts["lm_head"].passes == steps
    kind = "StaticCache" if how == "static cache" else "DynamicCache"
    assert {cache_of(value) for value in acts[""]} == {Opaque(f"transformers.cache_utils.{kind}")}


def test_a_state_space_model_that_generates_is_recorded_step_by_step() -> None:
    acts = check_generation("MambaForCausalLM", {})
    assert acts.num_passes == STEPS
    assert acts["backbone.layers.0"].passes == list(range(STEPS))


@pytest.mark.parametrize("how", ["greedy", "sampled", "beams"])
@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("T5ForConditionalGeneration", "encoder", "decoder"),
        ("BartForConditionalGeneration", "model.encoder", "model.decoder"),
        ("WhisperForConditionalGeneration", "model.encoder", "model.decoder"),
    ],
)
def test_an_encoder_decoder_that_generates_runs_the_encoder_in_a_pass_of_its_own(
    name: str, encoder: str, decoder: str, how: str
) -> None:
    acts = check_generation(name, WAYS[how])
    assert acts.num_passes == 1 + STEPS
    assert acts[encoder].passes == [0]
    assert acts[""].passes == acts[decoder].passes == list(range(1, 1 + STEPS))
    assert {cache_of(value) for value in acts[""]} == {
        Opaque("transformers.cache_utils.EncoderDecoderCache")
    }


# --- Gradient checkpointing ------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    ("name", "often"),
    [
        ("LlamaForCausalLM", "model.layers.0.self_attn.q_proj"),
        ("BertForMaskedLM", "bert.encoder.layer.0.attention.self.query"),
    ],
)
def test_gradient_checkpointing_changes_nothing_that_is_recorded(
    name: str, often: str, use_reentrant: bool
) -> None:
    mode = MODES["train"]
    plain, checkpointed = (build(name, use_cache=False).train() for _ in range(2))
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    with Reference(callable_modules(plain)) as reference:
        expected = step(plain, given_to(name), mode, reference)
    calls: list[str] = []
    checkpointed.get_submodule(often).register_forward_hook(lambda *_: calls.append(often))
    with unused_layers() as warned, record(checkpointed, ["", "**"], inputs=True) as acts:
        actual = step(checkpointed, given_to(name), mode)
    assert len(calls) == 2, "it was computed again, inside backward()"
    assert_exact(acts, reference, inputs=True)
    assert_warned(warned, reference)
    assert_same(actual[:-1], expected[:-1])


# --- That the sweep can fail -----------------------------------------------------------------------

#: Models that write to what a layer of theirs has returned, when they train.
IN_PLACE = [
    "DebertaForMaskedLM",
    "FalconForCausalLM",
    "LEDForConditionalGeneration",
    "LongformerForMaskedLM",
    "RegNetForImageClassification",
    "ResNetForImageClassification",
    "SwitchTransformersForConditionalGeneration",
    "Swinv2ForImageClassification",
    "Wav2Vec2ForCTC",
]


def test_the_sweep_is_as_large_as_it_was_when_it_was_written() -> None:
    assert len(ARCHITECTURES) >= 96
    assert len({getattr(transformers, name).config_class for name in ARCHITECTURES}) >= 96
    assert all(len(group) >= 4 for _, group in GROUPS)
    assert set(IN_PLACE) <= set(ARCHITECTURES)


@contextmanager
def classic(model: nn.Module, _layers: Any, *, inputs: bool = False) -> Iterator[Any]:
    """The usual hook, which keeps an alias."""
    modules = callable_modules(model)
    kept: dict[str, list[Any]] = {name: [] for name in modules}
    handles = [
        module.register_forward_hook(
            lambda *call, calls=kept[name]: calls.append(detached(call[-1]))
        )
        for name, module in modules.items()
    ]
    yield kept
    for handle in handles:
        handle.remove()


#: The classic hook keeps a cache as it is, which is caught too, but below.
WITHOUT_CACHE = MODES["train"]._replace(options={"use_cache": False})


def detached(value: Any) -> Any:
    """An alias of a tensor, or of what is not one, the thing itself."""
    return value.detach() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", IN_PLACE)
def test_the_classic_hook_is_caught_where_the_model_writes_in_place(name: str) -> None:
    done = outcome(name, WITHOUT_CACHE, classic)
    with pytest.raises(AssertionError, match="method equal of"):
        assert_exact(done.acts, done.reference)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ViTForImageClassification"])
def test_the_classic_hook_passes_where_the_model_does_not(name: str) -> None:
    done = outcome(name, MODES["train"], classic)
    assert_exact(done.acts, done.reference)
    overwrite(done.actual.alive, 1)
    with pytest.raises(AssertionError, match="in what"):
        assert_exact(done.acts, done.reference)


def test_a_cache_that_is_kept_as_it_is_is_caught() -> None:
    done = outcome("LlamaForCausalLM", MODES["train"], classic)
    with pytest.raises(AssertionError, match="DynamicCache"):
        assert_exact(done.acts, done.reference)


# What a recorder could do wrong besides, each with where the sweep finds it.


def _draw_a_number(model: nn.Module, _: Any) -> None:
    model.register_forward_hook(lambda *_: torch.rand(1) and None)


def _change_an_output(model: nn.Module, _: Any) -> None:
    model.bert.embeddings.register_forward_hook(lambda *call: call[-1] * 1.001)


def _change_a_gradient(model: nn.Module, _: Any) -> None:
    model.bert.embeddings.register_forward_hook(
        lambda *call: call[-1].register_hook(lambda gradient: gradient * 1.001) and None
    )


def _lose_a_call(_: nn.Module, acts: Any) -> None:
    acts["bert.encoder.layer.0"].pop()


def _leave_a_hook(model: nn.Module, _: Any) -> None:
    model.register_forward_hook(_draw_a_number)


def _remove_the_hooks_of_others(model: nn.Module, _: Any) -> None:
    model.bert._forward_hooks.clear()


WRONG_BEFORE = {
    "the random_state of the model": _draw_a_number,
    "in what 'bert.embeddings' returned": _change_an_output,  # for a hook of another one counts as the model's
    "the gradients of the model": _change_a_gradient,
}

WRONG_AFTER = {
    "the number of calls": _lose_a_call,
    "the hooks that the model has in the end": _leave_a_hook,
    "the hooks that were there before": _remove_the_hooks_of_others,
}


@pytest.mark.parametrize("where", [*WRONG_BEFORE, *WRONG_AFTER])
def test_a_recorder_that_does_something_wrong_is_caught(where: str) -> None:
    @contextmanager
    def wrong(model: nn.Module, layers: Any, *, inputs: bool) -> Iterator[Any]:
        with record(model, layers, inputs=inputs) as acts:
            WRONG_BEFORE.get(where, _do_nothing)(model, acts)
            yield acts
            WRONG_AFTER.get(where, _do_nothing)(model, acts)

    with pytest.raises(AssertionError, match=where):
        check("BertForMaskedLM", MODES["train"], wrong)


def _do_nothing(*_: object) -> None:
    """Where there is nothing wrong."""


def test_a_recorder_that_does_not_say_which_layers_never_ran_is_caught() -> None:
    @contextmanager
    def silent(model: nn.Module, layers: Any, *, inputs: bool) -> Iterator[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnusedLayerWarning)
            with record(model, layers, inputs=inputs) as acts:
                yield acts

    with pytest.raises(AssertionError, match="the warning about layers that never ran"):
        check("BertForMaskedLM", MODES["train"], silent)

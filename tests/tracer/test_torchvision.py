"""Every function that torchvision's feature extractor names is recorded by that name, with the values that it has out of place."""

from __future__ import annotations

import copy
import re
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from actrec import record

#: The operators that torchvision describes, which no classifier calls.
OPERATORS = (
    "nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d", "_roi_align_backward",
    "_roi_pool_backward", "_ps_roi_align_backward", "_ps_roi_pool_backward", "_deform_conv2d_backward",
)  # fmt: skip

#: Each with the size of an image, and names that are no calls of PyTorch's functions: items of tuples, and functions of
#: torchvision's own that its tracer does not go into.
MODELS = {
    "resnet18": (32, ()),
    "squeezenet1_1": (64, ()),
    "densenet121": (32, ()),
    "googlenet": (64, ()),
    "mobilenet_v3_small": (32, ()),
    "shufflenet_v2_x0_5": (32, ("getitem",)),
    "efficientnet_b0": (32, ()),
    "convnext_tiny": (32, ()),
    "regnet_y_400mf": (32, ()),
    "mnasnet0_5": (32, ()),
    "vit_b_32": (224, ("getitem",)),
    "swin_t": (
        64,
        (
            "_patch_merging_pad",
            "_get_relative_position_bias",
            "shifted_window_attention",
        ),
    ),
}
KINDS = {"call_function", "call_method"}
OPTIONS = {"googlenet": {"init_weights": True, "aux_logits": False}}


def torchvision():
    try:
        return import_module("torchvision")
    except RuntimeError:  # its operators were built for another PyTorch: for CUDA, say
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in OPERATORS:
            library.define(f"{name}(Tensor x) -> Tensor")
        torchvision.library = library  # which takes its operators along when it goes
        return import_module("torchvision")


def functions_of(model: nn.Module, image: Tensor) -> dict[str, object]:
    """What the tracer says that functions return, out of place, by the names of its nodes."""
    tracer = import_module("torchvision.models.feature_extraction")
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    paths = tracer.NodePathTracer(**tracer._set_default_tracer_kwargs(None))
    paths.trace(plain)
    names = [n for node, n in paths.node_to_qualname.items() if node.op in KINDS]
    values = tracer.create_feature_extractor(plain, names)(image)
    return {name: values[name] for name in names}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_function_that_the_tracer_names_is_recorded_with_its_value(name):
    size, unnamed = MODELS[name]
    torch.manual_seed(0)
    models = torchvision().models
    model = models.get_model(name, weights=None, **OPTIONS.get(name, {})).eval()
    image = torch.randn(1, 3, size, size)
    traced = functions_of(model, image)
    with record(model, "**:*") as acts:
        assert torch.equal(model(image), model(image))
    found: dict[str, int] = {}
    for node, value in traced.items():
        module, _, function = node.rpartition(".")
        function = re.sub(r"_\d+$", "", function)
        if function in unnamed or not any(isinstance(t, Tensor) for t in _several(value)):
            continue
        key = f"{module}:{function}"
        call = found[key] = found.get(key, -1) + 1
        for got, wanted in zip(_several(acts[key][call]), _several(value), strict=True):
            assert torch.equal(got, wanted), node
    assert found


def _several(value):
    return value if isinstance(value, (tuple, list)) else [value]

"""Which layers a query chooses, under which key, and what is said when it chooses none."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from actrec import (
    ActrecError,
    OptionError,
    SelectionError,
    UnsupportedModelError,
    record,
)
from actrec._selection.selection import select

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

X = torch.ones(2, 4)


class Block(nn.Module):
    """A layer and an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.lin(x))


class Net(nn.Module):
    """Containers of both kinds, which are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.heads = nn.ModuleDict({"main": nn.Linear(4, 3), "aux": nn.Linear(4, 2)})
        self.nothing = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return tuple(head(x) for head in self.heads.values())


@pytest.fixture
def net() -> Net:
    return Net()


def keys(model: nn.Module, layers: Any) -> list[str]:
    return [choice.key for choice in select(model, layers).choices]


LEAVES = ["stem", "blocks.0.lin", "blocks.0.act", "blocks.1.lin", "blocks.1.act"]
LEAVES += ["heads.main", "heads.aux"]
BLOCKS = ["blocks.0", "blocks.0.lin", "blocks.0.act", "blocks.1", "blocks.1.lin", "blocks.1.act"]

QUERIES: dict[str, tuple[Any, list[str]]] = {
    "name": ("blocks.0.lin", ["blocks.0.lin"]),
    "root": ("", [""]),
    "nothing said": (None, LEAVES),
    "star": ("*", ["stem"]),
    "star last": ("blocks.*", ["blocks.0", "blocks.1"]),
    "star first": ("*.main", ["heads.main"]),
    "star between": ("blocks.*.act", ["blocks.0.act", "blocks.1.act"]),
    "star inside a segment": ("b*s.0.l*n", ["blocks.0.lin"]),
    "several stars": ("*.*.*", ["blocks.0.lin", "blocks.0.act", "blocks.1.lin", "blocks.1.act"]),
    "two stars": ("**", ["stem", *BLOCKS, "heads.main", "heads.aux"]),
    "two stars last": ("blocks.**", BLOCKS),
    "two stars first": ("**.act", ["blocks.0.act", "blocks.1.act"]),
    "two stars between": ("blocks.**.lin", ["blocks.0.lin", "blocks.1.lin"]),
    "two stars between may be nothing": ("blocks.**.0", ["blocks.0"]),
    "two stars first may be nothing": ("**.stem", ["stem"]),
    "two stars inside a segment": ("bl**t", ["blocks.0.act", "blocks.1.act"]),
    "two stars and one": ("**.*in", ["blocks.0.lin", "blocks.1.lin", "heads.main"]),
    "regex": (re.compile(r"blocks\.\d\.lin"), ["blocks.0.lin", "blocks.1.lin"]),
    "regex of whole names": (re.compile("stem|blocks"), ["stem"]),
    "regex with flags": (re.compile("STEM", re.IGNORECASE), ["stem"]),
    "type": (nn.ReLU, ["blocks.0.act", "blocks.1.act"]),
    "own type": (Block, ["blocks.0", "blocks.1"]),
    "base type": (nn.Module, ["", "stem", *BLOCKS, "heads.main", "heads.aux"]),
    "function": (lambda name, module: name.endswith("0") and type(module) is Block, ["blocks.0"]),
    "function with a truthy result": (lambda name, _: re.match("s", name), ["stem"]),
    "list": (["heads.aux", "stem"], ["heads.aux", "stem"]),
    "nested lists": (["stem", ["heads.*", (nn.ReLU,)]], ["stem", *LEAVES[-2:], *LEAVES[2::2][:2]]),
    "set": ({"stem"}, ["stem"]),
    "dict view": ({"stem": 1, "": 2}.keys(), ["stem", ""]),
    "overlap": (["blocks.0.*", nn.ReLU], ["blocks.0.lin", "blocks.0.act", "blocks.1.act"]),
    "leaves and more": ([None, ""], [*LEAVES, ""]),
}


@pytest.mark.parametrize(("layers", "expected"), QUERIES.values(), ids=QUERIES)
def test_every_kind_of_query_chooses_its_layers_in_order(
    net: Net, layers: Any, expected: list[str]
) -> None:
    named = dict(net.named_modules())
    choices = select(net, layers).choices
    assert [choice.key for choice in choices] == expected
    assert all(choice.module is named[choice.key] for choice in choices)
    with record(net, layers) as acts:
        net(X)
    assert list(acts) == expected
    assert [layer.type for layer in acts.values()] == [type(named[k]).__name__ for k in expected]


def test_a_module_object_chooses_itself(net: Net) -> None:
    assert keys(net, net.blocks[1].act) == ["blocks.1.act"]
    assert keys(net, [net.heads["aux"], net]) == ["heads.aux", ""]


def test_a_container_of_modules_with_a_forward_is_a_layer_not_a_list_of_layers() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert keys(nn.Sequential(inner), inner) == ["0"]


def test_a_generator_of_queries_is_read_once(net: Net) -> None:
    assert keys(net, (f"blocks.{i}.lin" for i in range(2))) == ["blocks.0.lin", "blocks.1.lin"]


def test_a_function_is_asked_about_every_module_that_can_be_recorded(net: Net) -> None:
    seen: dict[str, nn.Module] = {}

    def ask(name: str, module: nn.Module) -> bool:
        seen[name] = module
        return True

    keys(net, ask)
    named = dict(net.named_modules())
    assert seen == {name: m for name, m in named.items() if name not in {"blocks", "heads"}}


def test_what_a_users_function_raises_passes_through(net: Net) -> None:
    with pytest.raises(ZeroDivisionError):
        record(net, lambda *_: 1 / 0)


# --- Mappings ----------------------------------------------------------------------------------------


def halve(t: Tensor) -> Tensor:
    return t / 2


def negate(t: Tensor) -> Tensor:
    return -t


def transforms(model: nn.Module, layers: Any, default: Any = None) -> dict[str, Any]:
    return {
        choice.key: choice.treatments["output"].transform
        for choice in select(model, layers, default).choices
    }


def test_in_a_mapping_every_query_has_its_own_transform(net: Net) -> None:
    layers = {"stem": halve, nn.ReLU: negate, net.heads["main"]: None}
    expected = {"stem": halve, "blocks.0.act": negate, "blocks.1.act": negate, "heads.main": None}
    assert transforms(net, layers) == expected
    with record(net, layers) as acts:
        main, _ = net(X)
    with record(net, ["stem", nn.ReLU]) as plain:
        net(X)
    assert torch.equal(acts["stem"][0], plain["stem"][0] / 2)
    assert torch.equal(acts["blocks.1.act"][0], -plain["blocks.1.act"][0])
    assert torch.equal(acts["heads.main"][0], main)


def test_the_keys_of_a_mapping_may_be_several_queries_or_none(net: Net) -> None:
    assert transforms(net, {("stem", "heads.*"): halve}) == dict.fromkeys(
        ["stem", "heads.main", "heads.aux"], halve
    )
    assert transforms(net, {None: halve}) == dict.fromkeys(LEAVES, halve)
    assert transforms(net, {re.compile("stem"): halve}) == {"stem": halve}


def test_mappings_stand_among_other_queries_and_the_default_is_for_those_without(net: Net) -> None:
    layers = ["stem", {"heads.main": negate, "heads.aux": None}]
    assert transforms(net, layers, halve) == {
        "stem": halve,
        "heads.main": negate,
        "heads.aux": halve,
    }


def test_a_transform_without_items_is_one_all_the_same(net: Net) -> None:
    identity = nn.Sequential()  # which is false
    assert transforms(net, {"stem": identity}, halve) == {"stem": identity}


def test_a_layer_that_is_spelled_out_goes_before_a_pattern_wherever_it_stands(net: Net) -> None:
    after = transforms(net, {"**.act": halve, "blocks.1.act": negate})
    before = transforms(net, {"blocks.1.act": negate, "**.act": halve})
    assert after == before == {"blocks.0.act": halve, "blocks.1.act": negate}
    assert transforms(net, {nn.ReLU: halve, net.blocks[1].act: negate}) == after


def test_among_patterns_the_first_counts(net: Net) -> None:
    assert transforms(net, [{nn.ReLU: halve}, {"blocks.0.*": negate}]) == {
        "blocks.0.act": halve,
        "blocks.1.act": halve,
        "blocks.0.lin": negate,
    }


def test_a_layer_may_be_spelled_out_twice_if_both_agree(net: Net) -> None:
    assert transforms(net, [{"stem": halve}, {net.stem: halve}]) == {"stem": halve}


# --- Names -------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Has names that torch's own methods do not find."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self._modules[name] = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            x = layer(x)
        return x


ODD = ["a*", "ab", "[0]", "two words", "a.b", "**", "ä", "0", "\n", "a?", "a..b"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_an_exact_name_goes_first_whatever_it_looks_like(name: str) -> None:
    model = Odd(*ODD)
    (choice,) = select(model, name).choices
    assert (choice.key, choice.module) == (name, model._modules[name])
    with record(model, name) as acts:
        model(X)
    assert len(acts[name]) == 1


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("a[01]", ["a0", "a1"]),
        ("a[!0]", ["a1", "ab"]),
        ("a[0-9]*", ["a0", "a1", "a1b", "a0[x"]),
        ("a?", ["a0", "a1", "ab"]),
        ("a??", ["a1b"]),
        ("?.b", ["a.b"]),
        ("*[x", ["a0[x"]),
    ],
)
def test_signs_of_a_glob_mean_what_they_mean_for_files_and_never_a_dot(
    query: str, expected: list[str]
) -> None:
    assert keys(Odd("a0", "a1", "ab", "a1b", "a.b", "a0[x"), query) == expected


# --- Wrappers ----------------------------------------------------------------------------------------


class FullyShardedLike(nn.Module):
    """Names what it wraps as the first FSDP does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, x: Tensor) -> Any:
        return self._fsdp_wrapped_module(x)


@pytest.fixture
def one_process_group() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def every_block_checkpointed(net: Net) -> nn.Module:
    for i, block in enumerate(net.blocks):
        net.blocks[i] = checkpoint_wrapper(block)
    return net


class Named(nn.Module):
    """Names what it wraps, perhaps several times, as the wrappers of other libraries do."""

    def __init__(self, module: nn.Module, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return next(self.children())(x)


def peft(net: nn.Module) -> nn.Module:
    return Named(Named(net, "model"), "base_model")


WRAPPERS: dict[str, tuple[Callable[[Net], nn.Module], str]] = {
    "DistributedDataParallel": (
        lambda net: DistributedDataParallel(net, find_unused_parameters=True),
        "module.blocks.0.lin",
    ),
    "DataParallel": (nn.DataParallel, "module.blocks.0.lin"),
    "AveragedModel": (AveragedModel, "module.blocks.0.lin"),
    "compile": (
        lambda net: torch.compile(net, backend="eager"),
        "_orig_mod.blocks.0.lin",
    ),
    "FSDP": (FullyShardedLike, "_fsdp_wrapped_module.blocks.0.lin"),
    "checkpoint": (checkpoint_wrapper, "_checkpoint_wrapped_module.blocks.0.lin"),
    "checkpointed blocks": (
        every_block_checkpointed,
        "blocks.0._checkpoint_wrapped_module.lin",
    ),
    "Opacus": (lambda net: Named(net, "_module"), "_module.blocks.0.lin"),
    "Fabric": (
        lambda net: Named(net, "_forward_module", "_original_module"),
        "_forward_module.blocks.0.lin",
    ),
    "PEFT": (peft, "base_model.model.blocks.0.lin"),
    "PEFT in DataParallel": (
        lambda net: nn.DataParallel(peft(net)),
        "module.base_model.model.blocks.0.lin",
    ),
    "several": (
        lambda net: nn.DataParallel(FullyShardedLike(every_block_checkpointed(net))),
        "module._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.lin",
    ),
}


@pytest.mark.usefixtures("one_process_group")
# DDP asks to be given a device, on a machine that may have none.
@pytest.mark.filterwarnings("ignore::UserWarning:torch.nn.parallel.distributed")
# The compiler warns about its own deprecations when it is first used.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(("wrap", "full"), WRAPPERS.values(), ids=WRAPPERS)
class TestWrapped:
    """What a wrapper adds to a name may be left out, and is in no key, whatever the query."""

    def test_by_either_name(self, net: Net, wrap: Callable[[Net], nn.Module], full: str) -> None:
        model = wrap(net)
        assert full in dict(model.named_modules())
        short = "blocks.0.lin"
        for spelled in (short, full):
            with record(model, spelled) as acts:
                model(X)
            assert list(acts) == [short]
            assert acts[full] is acts[short]
            assert len(acts[short]) == 1
            assert full in acts

    def test_by_both_names_at_once(
        self, net: Net, wrap: Callable[[Net], nn.Module], full: str
    ) -> None:
        assert keys(wrap(net), ["blocks.0.lin", full]) == ["blocks.0.lin"]

    def test_by_pattern_as_if_it_were_not_wrapped(
        self, net: Net, wrap: Callable[[Net], nn.Module], full: str
    ) -> None:
        model = wrap(net)
        assert keys(model, "blocks.*.lin") == ["blocks.0.lin", "blocks.1.lin"]
        assert keys(model, "**.main") == ["heads.main"]
        assert keys(model, re.compile("stem")) == ["stem"]

    def test_the_keys_are_those_of_the_bare_model_whatever_the_query(
        self, net: Net, wrap: Callable[[Net], nn.Module], full: str
    ) -> None:
        def kinds(net: nn.Module) -> dict[str, Any]:
            modules = dict(net.named_modules(remove_duplicate=False))
            lin = next(m for name, m in modules.items() if "blocks.0" in name and "lin" in name)
            return {
                "leaves": None,
                "name": "blocks.0.lin",
                "glob": "**",
                "regex": re.compile(r".*\.lin"),
                "type": nn.Linear,
                "type of what is wrapped": Block,
                "module": lin,
                "function": lambda _, module: isinstance(module, nn.Linear),
                "several": ["stem", nn.Linear],
            }

        bare = copy.deepcopy(net)
        expected = {kind: keys(bare, query) for kind, query in kinds(bare).items()}
        model = wrap(net)
        for kind, query in kinds(model).items():
            assert keys(model, query) == expected[kind], kind

    def test_every_key_and_every_full_name_resolves(
        self, net: Net, wrap: Callable[[Net], nn.Module], full: str
    ) -> None:
        model = wrap(net)
        containers = (nn.ModuleList, nn.ModuleDict)
        selection = select(model, lambda _, module: not isinstance(module, containers))
        found = {choice.key: choice for choice in selection.choices}
        assert len(found) == len(selection.choices), "no two layers have one key"
        names = {name: c.module for c in selection.choices for name in c.names} | {
            key: c.module for key, c in found.items()
        }
        for name, module in model.named_modules():
            if not isinstance(module, containers):
                assert names[name] is module

    def test_a_glob_over_the_wrappers_own_segments(
        self, net: Net, wrap: Callable[[Net], nn.Module], full: str
    ) -> None:
        model = wrap(net)
        assert "blocks.0.lin" in keys(model, re.compile(re.escape(full).replace("lin", "l.*")))
        assert "blocks.0.lin" in keys(model, full.replace("lin", "l*"))

    def test_mistakes_are_answered_with_the_short_name(
        self, net: Net, wrap: Callable[[Net], nn.Module], full: str
    ) -> None:
        with pytest.raises(SelectionError, match=re.escape("Did you mean 'blocks.0.lin'")):
            record(wrap(net), "blocks.0.linn")


def test_some_of_the_wrappers_segments_may_be_left_out(net: Net) -> None:
    model = nn.DataParallel(every_block_checkpointed(net))
    module = net.blocks[0]._checkpoint_wrapped_module.lin
    for name in ("module.blocks.0.lin", "blocks.0._checkpoint_wrapped_module.lin"):
        (choice,) = select(model, name).choices
        assert (choice.key, choice.module) == ("blocks.0.lin", module)
        assert name in choice.names


def test_the_wrappers_of_peft_may_keep_or_lose_the_others(net: Net) -> None:
    model = nn.DataParallel(peft(every_block_checkpointed(net)))
    for name in ("base_model.model.blocks.0.lin", "module.blocks.0.lin"):
        (choice,) = select(model, name).choices
        assert choice.key == "blocks.0.lin"
        assert name in choice.names


def test_children_that_are_called_as_in_peft_are_no_wrappers_elsewhere(net: Net) -> None:
    assert keys(Named(net, "model"), "model.stem") == ["model.stem"]
    assert keys(Named(net, "base_model"), "base_model.stem") == ["base_model.stem"]
    assert keys(Named(Named(net, "model", "twin"), "base_model"), "**.stem")[0] == (
        "base_model.model.stem"
    )


def test_segments_of_wrappers_that_are_not_there_are_not_made_up(net: Net) -> None:
    for name in ("module.stem", "_orig_mod.stem", "stem.module"):
        with pytest.raises(SelectionError, match="matches no layer"):
            record(net, name)


def test_a_wrapped_block_that_a_pattern_finds_twice_is_recorded_once(net: Net) -> None:
    model = every_block_checkpointed(net)
    with record(model, "blocks.*") as acts:
        model(X)
    assert list(acts) == ["blocks.0", "blocks.1"]
    assert [layer.passes for layer in acts.values()] == [[0], [0]]


class HasModule(nn.Module):
    """A model whose own child is called ``module``."""

    def __init__(self, *, alone: bool) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        if not alone:
            self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.module(x)
        return self.other(x) if hasattr(self, "other") else x


@pytest.mark.parametrize("alone", [True, False])
def test_a_real_child_called_module_is_found_by_its_name(alone: bool) -> None:
    model = HasModule(alone=alone)
    for query in ("module", "module.0", model.module[0]):
        (choice,) = select(model, query).choices
        assert choice.key == ("module.0" if query != "module" else "module")[7 * alone :]
        assert query not in ("module", "module.0") or query in choice.names
    short = ["module.0", "module.1"]
    assert keys(model, "module.*") == [key[7 * alone :] for key in short]


def test_a_child_called_module_that_has_siblings_cannot_be_left_out() -> None:
    with pytest.raises(SelectionError, match=re.escape("Did you mean 'module.0'?")):
        record(HasModule(alone=False), "0")


# --- One module under several names, cycles, parametrized weights ------------------------------------


class Tied(nn.Module):
    """Uses one module in three places."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(4, 4))
        self.dec = self.enc
        self.blocks = nn.ModuleList([nn.ReLU(), self.enc])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.dec(self.enc(x)))


TIED: dict[str, tuple[Any, str]] = {
    "first name": ("enc", "enc"),
    "second name": ("dec", "dec"),
    "third name": ("blocks.1", "blocks.1"),
    "all names": (["blocks.1", "enc", "dec"], "blocks.1"),
    "glob": ("d*", "dec"),
    "globs": (["d*", "e*"], "dec"),
    "regex": (re.compile("dec|enc"), "enc"),
    "type": (nn.Sequential, "enc"),
}


@pytest.mark.parametrize(("layers", "key"), TIED.values(), ids=TIED)
def test_a_module_with_several_names_is_hooked_once_and_found_under_each(
    layers: Any, key: str
) -> None:
    model = Tied()
    with record(model, layers) as acts:
        assert len(model.enc._forward_hooks) <= 2  # the layer's, and one that delimits passes
        model(X)
    assert list(acts) == [key]
    assert acts["enc"] is acts["dec"] is acts["blocks.1"]
    assert acts["enc"].passes == [0, 0, 0]
    assert acts.nbytes == acts["dec"].nbytes


def test_what_is_inside_a_module_with_several_names_has_several_names_too() -> None:
    model = Tied()
    with record(model, "blocks.1.0") as acts:
        model(X)
    assert acts["enc.0"] is acts["dec.0"] is acts["blocks.1.0"]
    assert len(acts["enc.0"]) == 3


def test_one_module_cannot_have_two_transforms() -> None:
    message = "'enc' and 'dec' are the same module and cannot have two transforms"
    with pytest.raises(SelectionError, match=message):
        record(Tied(), {"enc": halve, "dec": negate})


class Cyclic(nn.Module):
    """Knows its parent, and itself."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4)
        self.child.parent = self
        self.me = self

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x)


def test_a_model_that_contains_itself_is_recorded() -> None:
    model = Cyclic()
    for layers in ("**", nn.Linear, "child", model.child):
        with record(model, layers) as acts:
            model(X)
        assert list(acts) == ["child"]
        assert acts["child"].passes == [0]
    assert keys(model, "") == [""]


class Step(nn.Module):
    """Registers the two steps before it, as skips do."""

    def __init__(self, *before: nn.Module) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        for number, step in enumerate(before[-2:]):
            setattr(self, f"skip{number}", step)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def steps(depth: int) -> nn.Sequential:
    """Of two modules more for each step, and of nearly twice as many paths."""
    found: list[nn.Module] = []
    for _ in range(depth):
        found.append(Step(*found))
    return nn.Sequential(*found)


def test_record_takes_time_by_the_modules_of_a_model_not_by_their_paths() -> None:
    asked = []
    for depth in (15, 30, 60):
        names: list[str] = []
        record(steps(depth), lambda name, _, names=names: names.append(name) or name == "0")  # type: ignore[misc]
        asked.append(len(names))
    assert asked[2] < 2.5 * asked[1]


def test_a_name_that_no_pattern_would_find_can_be_spelled_out() -> None:
    model = steps(60)
    deep = ".".join(["59", *["skip1"] * 58, "skip0", "lin"])
    odd = ".".join(["59", *["skip1", "skip0"] * 19, "lin"])
    for name in (deep, odd):
        assert type(model.get_submodule(name)) is nn.Linear
        with record(model, name) as acts:
            model(X)
        assert list(acts) == [name]
        assert len(acts[name]) == 1
    with pytest.raises(SelectionError, match="matches no layer"):
        record(model, f"{odd}.nothing")


def test_parents_that_are_called_alone_begin_a_pass_also_where_paths_are_many() -> None:
    model = steps(30)
    with record(model, "0.lin") as acts:
        model[0](X)
        model(X)
    assert acts["0.lin"].passes == [0, 1]


def test_patterns_leave_out_what_computes_a_parametrized_weight() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    for layers in (None, "**", "*", nn.Module, nn.Linear, lambda *_: True, re.compile(".*")):
        assert not [key for key in keys(model, layers) if "parametrizations" in key]
    with record(model) as acts:
        model(X)
        assert model[0].weight.shape == (4, 4)
    assert list(acts) == ["0", "1"]


def test_what_computes_a_parametrized_weight_can_be_asked_for() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    name = "0.parametrizations.weight.0"
    for layers in (name, "**.parametrizations.weight.*", re.compile(r".*\.parametrizations.*\d")):
        with record(model, layers) as acts:
            model(X)
        assert list(acts) == [name]
        assert torch.equal(acts[name][0], model[0].weight)


def test_a_custom_container_whose_instance_has_a_forward_is_called() -> None:
    model = nn.Module()
    model.lin = nn.Linear(4, 4)

    def forward(x: Tensor) -> Tensor:
        return model.lin(x)

    model.forward = forward  # type: ignore[method-assign]
    with record(model, ["", "lin"]) as acts:
        model(X)
    assert torch.equal(acts[""][0], acts["lin"][0])


# --- Errors ------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[Any, list[str]]] = {
    "close": ("blocks.0.linn", ["'blocks.0.linn'", "this Net", "Did you mean 'blocks.0.lin'"]),
    "the front is missing": ("aux", ["'aux'", "Did you mean 'heads.aux'?"]),
    "not close": ("xyzzy", ["'xyzzy'", "There are 'stem', 'blocks', 'blocks.0'", "and 3 more."]),
    "parameter": ("stem.weight", ["'stem.weight' matches no layer", "'stem'"]),
    "case": ("Stem", ["'Stem'", "Did you mean 'stem'?"]),
    "no index": ("blocks.7", ["'blocks.7'", "'blocks.0'", "'blocks.1'"]),
    "list": ("blocks", ["'blocks' is a ModuleList", "never called", "Write 'blocks.*'", "2 children"]),
    "dict": ("heads", ["'heads' is a ModuleDict", "never called", "Write 'heads.*'", "2 children"]),
    "among others": (["stem", "heads"], ["cannot record 'heads'", "Write 'heads.*'"]),
    "glob of nothing": ("blocks.*.conv", ["'blocks.*.conv' matches no layer", "Did you mean"]),
    "glob of containers": ("bl*", ["'bl*' matches only modules", "ModuleList", "Write 'blocks.*'"]),
    "regex of nothing": (re.compile("conv"), ["'conv' matches no layer", "There are 'stem'"]),
    "type": (nn.Conv2d, ["no layer of this Net is a Conv2d", "'Block'", "'Linear'", "'ReLU'"]),
    "function": (lambda *_: False, ["<lambda>", "returned true for none of the", "this Net"]),
    "empty list": ([], ["no layers were given", "[] is empty", "None means every leaf module"]),
    "empty lists": ([(), []], ["no layers were given", "None means every leaf module"]),
    "empty mapping": ({}, ["no layers were given", "{} is empty"]),
    "foreign module": (nn.Linear(4, 4), ["the Linear given", "not part of this Net", "identity"]),
    "path": ("blocks/0/lin", ["Did you mean 'blocks.0.lin'?"]),
    "Python": ("blocks[0].lin", ["Did you mean 'blocks.0.lin'?"]),
    "the name of the variable": ("net.stem", ["Did you mean 'stem'?"]),
    "a number is missing": ("blocks.act", ["Did you mean 'blocks.0.act' or 'blocks.1.act'?"]),
    "from the end": ("blocks.-1", ["Did you mean 'blocks.1'?"]),
    "too far from the end": ("blocks.-3.lin", ["Did you mean 'blocks.0'"]),
    "name of a type": ("ReLU", ["That is a type", "record(model, torch.nn.ReLU) records 2 layers", "'blocks.0.act'"]),
    "name of a type as written": ("nn.Linear", ["record(model, torch.nn.Linear) records 5 layers"]),
    "name of an own type": ("Block", ["record(model, type(model.get_submodule('blocks.0'))) records 2"]),
    "a parameter": ("blocks.0.lin.bias", ["a parameter or buffer of 'blocks.0.lin'", "record(model, 'blocks.0.lin')"]),
    "several": ("stem, heads.main", ["Give several layers as a list: record(model, ['stem', 'heads.main'])"]),
    "all": ("all", ["record(model) records every leaf module, record(model, '**') every module"]),
    "text of a regex": (r"blocks\.\d\.lin", ["As a regular expression it matches 2 layers", "re.compile("]),
    "part of a regex": (re.compile(r"\.lin"), ["match the whole name", "re.compile(r'.*(?:\\.lin).*') matches 2 layers"]),
    "function of PyTorch": (torch.relu, ["relu", "is a function of PyTorch", "record(model, torch.nn.ReLU) records 2", "record(model, '**:relu')"]),
    "functional": (nn.functional.gelu, ["gelu", "none of this Net is a gelu; there are 'Block'", "'**:gelu'"]),
    "method": (Tensor.relu, ["is a function of PyTorch", "torch.nn.ReLU"]),
    "index": (0, ["A name is a string", "Did you mean 'blocks.0'?"]),
    "empty container": (nn.ModuleList([]), ["the ModuleList given"]),
    "number": (3, ["3 is not a layer query", "re.compile(...)", "a module type"]),
    "number in a list": (["stem", 1.5], ["1.5 is not a layer query"]),
    "foreign class": (int, ["no layer of this Net is a int", "'Linear'"]),
}  # fmt: skip


@pytest.mark.parametrize(("layers", "pieces"), ERRORS.values(), ids=ERRORS)
def test_a_query_that_chooses_nothing_is_answered_with_what_to_write_instead(
    net: Net, layers: Any, pieces: list[str]
) -> None:
    with pytest.raises(SelectionError) as caught:
        record(net, layers)
    message = str(caught.value)
    assert message.startswith("record()"), message
    assert [piece for piece in pieces if piece not in message] == [], message
    assert isinstance(caught.value, ValueError)
    assert not any(module._forward_hooks for module in net.modules())


def test_suggestions_begin_as_the_query_does_and_are_in_the_order_of_the_model() -> None:
    model = nn.Module()
    for name in ("layer0", "layer1"):
        block = nn.Sequential(*[nn.Sequential() for _ in range(3)])
        for one in block:
            one.add_module("conv1", nn.Identity())
        model.add_module(name, block)
    expected = "Did you mean 'layer1.0.conv1' or 'layer1.1.conv1' or 'layer1.2.conv1'?"
    with pytest.raises(SelectionError, match=re.escape(expected)):
        record(model, "layer1.conv1")


def test_a_slice_of_a_container_is_told_from_its_modules(net: Net) -> None:
    with pytest.raises(
        SelectionError, match=r"Its 1 children are: a slice .* Write list\(\.\.\.\)"
    ):
        record(net, net.blocks[1:])
    assert keys(net, list(net.blocks[1:])) == ["blocks.1"]


def test_a_tensor_for_a_query_is_told_what_it_is(net: Net) -> None:
    with pytest.raises(
        SelectionError, match=r"a Parameter of shape \(4,\).*parameter 'stem.bias'.*'stem'"
    ):
        record(net, net.stem.bias)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match=r"a Tensor of shape \(2, 4\).*inside the with block"):
        record(net, X)  # type: ignore[arg-type]


def test_a_container_given_as_an_object_is_answered_too(net: Net) -> None:
    with pytest.raises(SelectionError, match=re.escape("Write 'blocks.*' for its 2 children")):
        record(net, net.blocks)
    with pytest.raises(SelectionError, match="'0' is a ParameterList, a container that is never"):
        record(nn.Sequential(nn.ParameterList()), "0")


def test_a_model_of_containers_alone_has_no_leaf_to_record() -> None:
    with pytest.raises(SelectionError, match="cannot record every leaf module of this ModuleList"):
        record(nn.ModuleList())
    with pytest.raises(SelectionError, match=re.escape("Write '*' for its 1 children")):
        record(nn.ModuleList([nn.ReLU()]), "")


def test_a_transform_that_cannot_be_called_is_refused_by_name(net: Net) -> None:
    with pytest.raises(OptionError, match="the mapping gives 'stem' 3; expected a transform"):
        record(net, {"stem": 3})  # type: ignore[dict-item]


def test_the_model_that_was_wrapped_is_told_from_its_copy(net: Net) -> None:
    with pytest.raises(SelectionError, match="a copy, or the model before it was wrapped"):
        record(AveragedModel(net), net.stem)


class Pipeline:
    """Not a module, but has some, as pipelines of diffusers have."""

    def __init__(self) -> None:
        self.unet = nn.Linear(4, 4)
        self.vae = nn.Linear(4, 4)
        self.name = "pipeline"


@pytest.mark.parametrize(
    ("model", "pieces"),
    [
        (None, ["not NoneType"]),
        ("resnet50", ["not str"]),
        (
            [nn.Linear(4, 4)],
            ["not list", "A recording is of one model: with record(generator) as g"],
        ),
        ({"g": nn.Linear(4, 4)}, ["not dict"]),
        (nn.Linear(4, 4).forward, ["not method", "not one of its methods"]),
        (torch.ones(2), ["not Tensor", "call it inside the with block"]),
        (nn.Linear, ["not the class Linear", "create one first"]),
        (Pipeline(), ["not Pipeline", "It has modules inside: 'unet', 'vae'."]),
    ],
    ids=["None", "name", "list", "dict", "method", "tensor", "class", "pipeline"],
)
def test_what_is_no_module_is_refused_with_advice(model: Any, pieces: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        record(model)
    message = str(caught.value)
    assert message.startswith("record() records a")
    assert [piece for piece in pieces if piece not in message] == [], message
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ActrecError)


@pytest.mark.parametrize(
    "query",
    [b"0", re.compile(b"0"), 1.5],
    ids=["bytes", "pattern of bytes", "number"],
)
def test_what_is_no_query_is_refused_as_it_is(query: Any) -> None:
    with pytest.raises(SelectionError, match=re.escape(repr(query)[:10])):
        record(nn.Linear(4, 4), query)


def test_the_model_given_second_is_told_to_come_first(net: Net) -> None:
    with pytest.raises(UnsupportedModelError, match=r"comes first: record\(model, 'stem'\)"):
        record("stem", net)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=r"comes first: record\(model, layers\)"):
        record(["stem"], net)  # type: ignore[arg-type]


def test_the_error_of_a_query_that_is_a_function_says_what_it_was_asked() -> None:
    with pytest.raises(TypeError, match="1 positional argument") as caught:
        record(nn.Linear(4, 4), lambda module: True)  # type: ignore[arg-type, misc]
    assert "It is called with name and module" in caught.value.__notes__[0]


@pytest.mark.parametrize("query", [re.compile("blocks"), "block*", nn.ModuleList], ids=str)
def test_a_pattern_or_type_of_containers_is_answered_with_what_to_write(query: Any) -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ReLU()])
    model.forward = lambda x: x  # type: ignore[method-assign,assignment]
    with pytest.raises(
        SelectionError, match=r"never called itself\. Write 'blocks\.\*' for its 1 children"
    ):
        record(model, query)


def test_a_glob_that_misses_what_is_deeper_is_told_how_to_reach_it() -> None:
    model = nn.Sequential(nn.Sequential())
    model[0].add_module("conv1", nn.Conv2d(1, 1, 1))
    with pytest.raises(SelectionError, match=r"inside one segment\. Did you mean '\*\*\.conv\*'\?"):
        record(model, "conv*")
    with record(model, "**.conv*") as acts:
        model(torch.zeros(1, 1, 1, 1))
    assert list(acts) == ["0.conv1"]


def test_an_empty_container_is_refused_in_a_sentence() -> None:
    with pytest.raises(SelectionError, match=r"a container that is never called itself\.$"):
        record(nn.Sequential(nn.ParameterList()), "0")

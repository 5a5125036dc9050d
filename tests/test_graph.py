# SPDX-License-Identifier: Apache-2.0
"""The order of the graph is the order in which torch's engine makes gradients ready, and its edges are data."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx
import pytest
import torch
from kit.models import ResNet, Reused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerwise_dist import DependencyGraphBuilder
from layerwise_dist.errors import BoundaryError, ConfigError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gpt_model import GPT  # noqa: E402


def _resnet() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x = torch.randn(2, 3, 6, 6)
    return ResNet(), lambda model: model(x).square().sum()


def _gpt() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    tokens = torch.randint(256, (2, 8))
    return GPT(dim=16, layers=2, heads=2, context=8, dropout=0.1), lambda model: model(tokens).square().mean()


def _reused() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    tokens = torch.randint(16, (2, 4))
    return Reused(), lambda model: model(tokens).square().sum()


def _of_transformers(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(32, (2, 6))
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=8,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    return model, lambda model: model(input_ids=tokens, labels=tokens).loss


MODELS = {
    "resnet": _resnet,
    "gpt": _gpt,
    "reused": _reused,
    "gpt2": lambda: _of_transformers("gpt2"),
    "llama": lambda: _of_transformers("llama"),
}


def _fire_order(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[str]:
    """Parameters by their last accumulation, seen by hooks of the test's own."""
    fired: dict[str, None] = {}

    def fire(name: str) -> None:
        fired.pop(name, None)
        fired[name] = None

    hooks = [
        param.register_post_accumulate_grad_hook(lambda _, name=name: fire(name))
        for name, param in model.named_parameters()
        if param.requires_grad
    ]
    loss(model).backward()
    for hook in hooks:
        hook.remove()
    return list(fired)


def _layers(params: list[str]) -> list[str]:
    layers = [name.rpartition(".")[0] or "(root)" for name in params]
    return list(dict.fromkeys(reversed(layers)))[::-1]


@pytest.mark.parametrize("name", MODELS)
def test_the_walk_of_a_loss_gives_the_order_in_which_gradients_arrive(name: str) -> None:
    model, loss = MODELS[name]()
    wanted = _fire_order(model, loss)
    builder = DependencyGraphBuilder(model)
    assert builder.source == "modules"
    graph = builder.build_dependency_graph(loss(model))
    assert builder.source == graph.graph["source"] == "autograd"
    assert builder.gradient_order == wanted  # down to single parameters
    assert builder.get_update_order()[: len(_layers(wanted))] == _layers(wanted)


@pytest.mark.parametrize("name", MODELS)
def test_an_observed_iteration_gives_the_order_and_the_fire_counts(name: str) -> None:
    model, loss = MODELS[name]()
    wanted = _fire_order(model, loss)
    builder = DependencyGraphBuilder(model)
    with builder.observe():
        loss(model).backward()
    assert builder.source == "observed"
    assert builder.get_update_order()[: len(_layers(wanted))] == _layers(wanted)
    assert {name for name, count in builder.fires.items() if count == 1} == set(wanted)
    assert all(count == 0 for name, count in builder.fires.items() if name not in wanted)


def test_the_modules_order_alone_is_wrong_for_tied_embeddings() -> None:
    model, loss = _reused()
    builder = DependencyGraphBuilder(model)
    guess = builder.get_update_order()
    with builder.observe():
        loss(model).backward()
    assert guess != builder.get_update_order()


@pytest.mark.parametrize("name", MODELS)
def test_edges_never_point_back_and_every_reached_layer_hangs_together(name: str) -> None:
    model, loss = MODELS[name]()
    builder = DependencyGraphBuilder(model)
    graph = builder.build_dependency_graph(loss(model))
    assert networkx.is_directed_acyclic_graph(graph)
    position = {layer: index for index, layer in enumerate(builder.get_update_order())}
    assert all(position[a] < position[b] for a, b in graph.edges)
    reached = graph.subgraph(_layers(builder.gradient_order))
    assert networkx.is_weakly_connected(reached)


def test_edges_show_the_branches_of_a_shortcut() -> None:
    model, loss = _resnet()
    graph = DependencyGraphBuilder(model).build_dependency_graph(loss(model))
    assert graph.graph["edges"] == "data"
    assert set(graph.successors("fc")) == {"layer2.norm2", "layer2.shortcut"}
    assert list(graph.successors("layer2.norm2")) == ["layer2.conv2"]
    # The identity shortcut of layer1 lets the gradient pass by its convolutions to the stem.
    assert set(graph.predecessors("stem")) == {"layer1.conv1", "layer2.conv1", "layer2.shortcut"}


def test_a_layer_used_twice_is_passed_through_where_its_gradient_is_not_final() -> None:
    model, loss = _reused()
    graph = DependencyGraphBuilder(model).build_dependency_graph(loss(model))
    # The first thing to be final is what lies after the tied head and the block's later use.
    assert list(graph.predecessors("(root)")) == [] and list(graph.predecessors("middle")) == ["(root)"]
    assert "block.2" not in graph.predecessors("middle")
    assert set(graph.predecessors("head")) >= {"block.0"}
    assert list(graph.successors("head")) == []


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_exactly_one_layer_and_tied_names_are_recorded(name: str) -> None:
    model, _ = MODELS[name]()
    builder = DependencyGraphBuilder(model)
    grouped = [id(param) for group in builder.group_parameters_by_layer().values() for param in group]
    assert sorted(grouped) == sorted({id(param) for param in model.parameters()})
    names = [
        other
        for info in builder.layer_info.values()
        for fqn in info.parameters
        for other in (fqn, *info.aliases.get(fqn, ()))
    ]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    assert sum(info.nbytes for info in builder.layer_info.values()) == sum(p.nbytes for p in model.parameters())


def test_layer_info_tells_sizes_dtypes_aliases_and_what_is_frozen() -> None:
    builder = DependencyGraphBuilder(Reused())
    assert builder.layer_info["head"].aliases == {"head.weight": ("tokens.weight",)}
    assert builder.layer_info["head"].numel == 128 and builder.layer_info["head"].nbytes == 512
    assert builder.layer_info["block.2"].parameters == ("block.2.weight", "block.2.bias")
    assert builder.layer_info["(root)"].dtypes == ("torch.float32",)
    assert not builder.layer_info["frozen"].trainable
    assert "frozen" not in builder.get_update_order() and "unused" in builder.get_update_order()
    assert builder.build_dependency_graph().nodes["frozen"]["position"] is None


def test_without_a_walked_loss_edges_are_a_chain() -> None:
    builder = DependencyGraphBuilder(ResNet())
    graph = builder.build_dependency_graph()
    order = builder.get_update_order()
    assert graph.graph["edges"] == "chain" and list(graph.edges) == list(zip(order, order[1:], strict=False))


def test_non_reentrant_checkpointing_changes_nothing_and_reentrant_is_counted() -> None:
    tokens = torch.randint(16, (2, 4))
    model = Reused(unused=False)
    builder = DependencyGraphBuilder(model)
    with builder.observe():
        model(tokens).sum().backward()
    plain = builder.get_update_order()
    forward = model.block.forward
    model.block.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    with builder.observe():
        model(tokens).sum().backward()
    assert builder.get_update_order() == plain and set(builder.fires.values()) == {1}
    model.block.forward = lambda x: checkpoint(forward, x, use_reentrant=True)
    with builder.observe():
        model(tokens).sum().backward()
    assert builder.fires["block.0.weight"] == 2


def test_wrappers_leave_no_trace_in_the_names_and_modules_called_like_theirs_do() -> None:
    class Own(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = ResNet()
    model.layer1 = torch.compile(model.layer1)  # the names change at once; nothing is compiled before the first call
    order = DependencyGraphBuilder(ResNet()).get_update_order()
    assert DependencyGraphBuilder(model).get_update_order() == order
    assert DependencyGraphBuilder(Own(model)).get_update_order() == [f"module.{name}" for name in order]


def test_a_failed_or_empty_observation_leaves_the_builder_as_it_was() -> None:
    model, loss = _resnet()
    builder = DependencyGraphBuilder(model)
    with pytest.raises(ZeroDivisionError), builder.observe():
        loss(model).backward()
        raise ZeroDivisionError
    with pytest.raises(BoundaryError, match="no gradient arrived"), builder.observe():
        pass
    assert builder.source == "modules" and builder.fires == {}
    assert all(not param._post_accumulate_grad_hooks for param in model.parameters())


def test_a_loss_that_cannot_be_walked_is_an_error_that_says_what_to_do() -> None:
    builder = DependencyGraphBuilder(ResNet())
    with pytest.raises(UnsupportedError, match="has no autograd graph"):
        builder.build_dependency_graph(torch.zeros(()))
    with pytest.raises(UnsupportedError, match="observe"):
        builder.build_dependency_graph(torch.zeros((), requires_grad=True) * 2)
    assert builder.source == "modules"


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_picture_is_written_in_the_format_of_its_suffix(suffix: str, magic: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, loss = _resnet()
    builder = DependencyGraphBuilder(model)
    builder.build_dependency_graph(loss(model))
    builder.visualize_graph(tmp_path / f"graph{suffix}")
    assert (tmp_path / f"graph{suffix}").read_bytes().startswith(magic)


def test_a_deep_model_s_picture_stays_narrow_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, tokens = GPT(dim=4, layers=12, heads=1, context=8, dropout=0.0), torch.randint(256, (1, 8))
    builder = DependencyGraphBuilder(model)
    builder.build_dependency_graph(model(tokens).sum())
    builder.visualize_graph(tmp_path / "graph.svg")
    text = (tmp_path / "graph.svg").read_text()
    assert "longest are not drawn" in text and float(text.partition('width="')[2].partition("pt")[0]) < 800


def test_a_picture_of_another_format_or_without_matplotlib_is_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = DependencyGraphBuilder(ResNet())
    with pytest.raises(ConfigError, match=".png, .svg, .pdf"):
        builder.visualize_graph(tmp_path / "graph.bmp")
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match=r"layerwise_dist\[viz\]"):
        builder.visualize_graph(tmp_path / "graph.png")

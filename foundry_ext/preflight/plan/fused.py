"""Kernels of a compiled layer, counted in the graph that torch.compile would generate code for.

Operators that touch one another are one pass, which reads what comes from outside it and writes
what is used outside it. Of a layer of full fine-tuning Inductor makes 29 kernels, this counts 35.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from foundry_ext.preflight.plan.operators import PRODUCTS, Sample, num_bytes, sample, tensors


def graph_samples(graph: torch.fx.Graph) -> Iterator[Sample]:
    """Yield the kernels of a graph of a compiled layer, with passes fused.

    Two operators are in one pass if one uses the other's result, neither is a product or attention,
    and no such operator lies between them.
    """
    depth: dict[torch.fx.Node, int] = {}
    groups: dict[torch.fx.Node, torch.fx.Node] = {}

    def root(node: torch.fx.Node) -> torch.fx.Node:
        while groups[node] is not node:
            node = groups[node]
        return node

    for node in graph.nodes:
        if node.op != "call_function" or not tensors(node.meta.get("val")):
            continue
        # As many barriers as lie before it, which keeps what is fused between two of them.
        before = [depth[one] for one in node.all_input_nodes if one in depth]
        depth[node] = max(before, default=0) + _is_barrier(node)
        if _is_barrier(node):
            yield _of_node(node)
            continue
        groups[node] = node
        for one in node.all_input_nodes:
            if one in groups and depth[one] == depth[node]:
                groups[root(one)] = root(node)
    members: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in groups:
        members.setdefault(root(node), []).append(node)
    for group in members.values():
        size = _traffic(group)
        if size:
            yield "pass", 0.0, size


def _is_barrier(node: torch.fx.Node) -> bool:
    name = str(node.target)
    return "attention" in name or any(f"aten.{one}." in name for one in PRODUCTS)


def _of_node(node: torch.fx.Node) -> Sample:
    func: Any = node.target
    args = torch.fx.map_arg(node.args, lambda one: one.meta["val"])
    found = sample(func, args, {}, node.meta["val"])
    assert found is not None
    return found


def _traffic(group: Sequence[torch.fx.Node]) -> float:
    """Return the bytes a fused pass reads from outside and writes for outside; views are free."""
    inside = set(group)
    if all(_is_view(node) for node in group):
        return 0.0
    read = {one for node in group for one in node.all_input_nodes if one not in inside}
    written = [
        node
        for node in group
        if not _is_view(node) and any(user not in inside for user in _users(node))
    ]
    return sum(num_bytes(tensors(one.meta.get("val"))) for one in [*read, *written])


def _users(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield what uses a node's memory: users of its views too."""
    for user in node.users:
        if _is_view(user):
            yield from _users(user)
        else:
            yield user


def _is_view(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    names = ("view", "reshape", "permute", "expand", "unsqueeze", "squeeze", "slice", "getitem")
    if schema is None:
        return "getitem" in str(node.target)
    return schema.name.partition("::")[2] in (*names, "transpose", "t", "alias", "select")

"""Costs"""
from mebp_compile.plan import Costs, OpCost

def measure_costs(graph, options):
    ops = {}
    for op in graph.ops:
        n = sum(graph.storages[s].size_bytes for s in (*op.creates, *op.reads, *op.writes))
        mult = 20 if any(k in op.target for k in ("mm", "attention")) else 1
        ops[op.name] = OpCost(1 + mult * n // 10000, 0)
    return Costs(ops)

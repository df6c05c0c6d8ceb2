"""Problems for the tests: random small ones, random layered graphs, and steps shaped like an LLM's LoRA training."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import ClassVar

from solvers.baselines import keep_all
from solvers.bounds import working_set
from solvers.check import replay
from solvers.decode import Tables
from solvers.evict import State
from solvers.greedy import descend
from solvers.problem import Choice, Op, Problem, Storage


@dataclass
class Builder:
    """Collects ops and storages; `storage` and `op` return ids."""

    ops: list[Op] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)

    def storage(self, name: str, size_bytes: int, **flags: bool) -> int:
        self.storages.append(Storage(name, size_bytes, **flags))
        return len(self.storages) - 1

    def op(
        self,
        name: str,
        reads: list[int],
        creates: list[int],
        time_us: int,
        workspace_bytes: int = 0,
        writes: tuple[int, ...] = (),
        phase: str = "forward",
        module: str = "",
        menu: tuple[tuple[int, int], ...] = (),
        rng: bool = False,
        rerunnable: bool = True,
    ) -> int:
        """menu: further choices as (workspace_bytes, time_us)."""
        read = tuple(dict.fromkeys(reads))
        choices = [Choice(read, w, t) for w, t in ((workspace_bytes, time_us), *menu)]
        self.ops.append(Op(name, tuple(choices), tuple(creates), writes, rng, rerunnable, phase, module))
        return len(self.ops) - 1

    def problem(self, budget_bytes: int, **options: object) -> Problem:
        result = Problem(tuple(self.ops), tuple(self.storages), budget_bytes, **options)  # type: ignore[arg-type]
        result.validate()
        return result


def small(seed: int) -> Problem:
    """4-7 ops with recompute, in-place writes, several outputs, choices, persistent storages and a disk."""
    draw = random.Random(seed)
    b = Builder()
    persistent = [
        b.storage(f"p{k}", draw.randint(1, 6) * 10, persistent=True, movable=draw.random() < 0.6)
        for k in range(draw.randint(1, 2))
    ]
    live = list(persistent)
    count = draw.randint(4, 7)
    for k in range(count):
        creates = [
            b.storage(f"s{k}.{j}", draw.randint(1, 6) * 10, movable=draw.random() < 0.5)
            for j in range(draw.choice([0, 1, 1, 1, 1, 2]) if len(live) < 5 else draw.choice([0, 1, 1]))
        ]
        old = [s for s in live if s not in creates]
        writes = (draw.choice(old),) if draw.random() < 0.3 else ()
        rest = [s for s in old if s not in writes]
        reads = draw.sample(rest, min(len(rest), draw.randint(0, 2)))
        menu = ((draw.randint(0, 2) * 10, draw.randint(1, 20)),) if draw.random() < 0.3 else ()
        rerunnable = draw.random() < 0.85
        b.op(
            f"op{k}",
            reads,
            creates,
            draw.randint(1, 10),
            draw.randint(0, 3) * 10,
            writes,
            menu=menu,
            rng=draw.random() < 0.2,
            rerunnable=rerunnable,
        )
        live += creates
    created = [s for s in live if s not in persistent]
    for s in draw.sample(created, min(len(created), draw.randint(0, 2))):
        old_storage = b.storages[s]
        b.storages[s] = Storage(old_storage.name, old_storage.size_bytes, False, old_storage.movable, True)
    for k, op in enumerate(b.ops):
        made = [b.storages[s] for s in op.creates]
        may_be = made and not op.writes and not op.rng and not any(s.output for s in made)
        written = {s for other in b.ops for s in other.writes}
        touched = {*op.creates, *(s for choice in op.choices for s in choice.reads)}
        if may_be and not written & touched and draw.random() < 0.3:
            b.ops[k] = replace(op, optional=True)
    apart, written = random.Random(-1 - seed), {s for op in b.ops for s in op.writes}  # a draw of its own: the rest stays as it was without it
    for s in persistent:
        if b.storages[s].movable and s not in written and apart.random() < 0.6:
            b.storages[s] = replace(b.storages[s], stored=True)
    options = {
        "read_bytes_per_us": 10.0,
        "write_bytes_per_us": 5.0,
        "latency_us": 1,
        "interference": draw.choice([0.0, 0.25, 1.0]),
        "can_offload": draw.random() < 0.7,
        "name": f"small {seed}",
    }
    loose = b.problem(10**9, **options)
    least, most = working_set(loose)[0], replay(loose, keep_all(loose)).peak_bytes
    return loose.with_budget(int(least + draw.uniform(-0.05, 1.0) * (most - least)))


def layered(seed: int, op_count: int = 60) -> Problem:
    """A random layered graph (edges mostly to near predecessors), forward then mirrored backward."""
    draw = random.Random(seed)
    b = Builder()
    batch = b.storage("batch", 100, persistent=True, movable=False)
    values = [batch]
    half = op_count // 2
    for k in range(half):
        near = values[-6:]
        reads = draw.sample(near, min(len(near), draw.randint(1, 2)))
        values.append(b.storage(f"v{k}", draw.randint(10, 100)))
        b.op(f"f{k}", reads, [values[-1]], draw.randint(5, 50), draw.randint(0, 20))
    gradient = b.storage("g_last", 50)
    b.op("loss", [values[-1]], [gradient], 5)
    for k in reversed(range(half)):
        new = b.storage(f"g{k}", draw.randint(10, 100), output=k == 0)
        b.op(
            f"b{k}",
            [gradient, values[k + 1], *b.ops[k].choices[0].reads],
            [new],
            draw.randint(5, 80),
            draw.randint(0, 20),
            phase="backward",
        )
        gradient = new
    return b.problem(10**6, read_bytes_per_us=2.0, write_bytes_per_us=1.0, latency_us=2, name=f"layered {seed}")


def transformer(
    layers: int = 4,
    hidden: int = 64,
    sequence: int = 32,
    weights_on_disk: bool = True,
    adam: bool = True,
    splits: int = 1,
) -> Problem:
    """A LoRA step: dequantised frozen weights, fp32 norms, saved activations, backward, AdamW on the adapters.

    splits: elementwise ops are split into that many links of a chain, to reach the op counts of real captures.
    """
    return _Transformer(layers, hidden, sequence, weights_on_disk, adam, splits).build()


class _Transformer:
    SHAPES: ClassVar = {
        "q": (1, 1),
        "k": (1, 1),
        "v": (1, 1),
        "o": (1, 1),
        "gate": (1, 4),
        "up": (1, 4),
        "down": (4, 1),
    }

    def __init__(self, layers: int, hidden: int, sequence: int, on_disk: bool, adam: bool, splits: int) -> None:
        self.layers, self.h, self.t, self.on_disk, self.adam, self.splits = (
            layers,
            hidden,
            sequence,
            on_disk,
            adam,
            splits,
        )
        self.b = Builder()
        self.packed: dict[str, int] = {}
        self.lora: dict[str, tuple[int, int]] = {}
        self.state: dict[str, list[int]] = {}
        self.module = ""
        self.phase = "forward"
        self.saved: list[dict[str, int]] = []

    def act(self, name: str, width: int = 1, bytes_each: int = 2) -> int:
        return self.b.storage(f"{self.module}.{name}", self.t * self.h * width * bytes_each)

    def op(
        self,
        name: str,
        reads: list[int],
        out: list[int],
        time_us: float,
        workspace: int = 0,
        writes: tuple[int, ...] = (),
    ) -> None:
        self.b.op(f"{self.module}.{name}", reads, out, max(1, int(time_us)), workspace, writes, self.phase, self.module)

    def pointwise(self, name: str, reads: list[int], out: int) -> int:
        """One elementwise op, or a chain of `splits` of them."""
        size = self.b.storages[out].size_bytes
        for k in range(self.splits - 1):
            link = self.b.storage(f"{self.module}.{name}.{k}", size)
            self.op(f"{name}.{k}", reads, [link], size / 4000)
            reads = [link]
        self.op(name, reads, [out], size / 4000)
        return out

    def weight(self, name: str) -> int:
        rows, columns = self.SHAPES[name]
        dense = self.b.storage(f"{self.module}.{name}.dense.{self.phase}", self.h * self.h * rows * columns * 2)
        self.op(
            f"{name}.dequantise",
            [self.packed[f"{self.module}.{name}"]],
            [dense],
            self.h * self.h * rows * columns / 20000,
        )
        return dense

    def declare(self, name: str) -> None:
        rows, columns = self.SHAPES[name]
        key = f"{self.module}.{name}"
        self.packed[key] = self.b.storage(
            f"{key}.packed", self.h * self.h * rows * columns // 2, persistent=True, movable=self.on_disk, stored=self.on_disk
        )
        pair = tuple(
            self.b.storage(f"{key}.lora_{side}", 16 * self.h * (rows if side == "A" else columns), persistent=True)
            for side in "AB"
        )
        self.lora[key] = (pair[0], pair[1])
        for side, parameter in zip("AB", pair, strict=True):
            size = self.b.storages[parameter].size_bytes
            moments = ("exp_avg", "exp_avg_sq") if self.adam else ()
            self.state[f"{key}.{side}"] = [
                self.b.storage(f"{key}.{side}.{m}", 2 * size, persistent=True) for m in moments
            ]

    def linear(self, name: str, x: int) -> int:
        rows, columns = self.SHAPES[name]
        key = f"{self.module}.{name}"
        flops = self.t * self.h * self.h * rows * columns * 2
        base, low = self.act(f"{name}.base", columns), self.b.storage(f"{key}.low", self.t * 16)
        extra, out = self.act(f"{name}.extra", columns), self.act(name, columns)
        self.op(f"{name}.mm", [x, self.weight(name)], [base], flops / 50000)
        self.op(f"{name}.lora_a", [x, self.lora[key][0]], [low], flops / 800000 + 1)
        self.op(f"{name}.lora_b", [low, self.lora[key][1]], [extra], flops / 800000 + 1)
        self.pointwise(f"{name}.add", [base, extra], out)
        self.saved[-1].update({f"{name}.x": x, f"{name}.low": low})
        return out

    def norm(self, name: str, x: int) -> int:
        wide, scale = self.act(f"{name}.fp32", 1, 4), self.b.storage(f"{self.module}.{name}.rstd", self.t * 4)
        normed, out = self.act(f"{name}.normed", 1, 4), self.act(name)
        self.pointwise(f"{name}.float", [x], wide)
        self.op(
            f"{name}.rstd", [wide], [scale], self.b.storages[wide].size_bytes / 4000, self.b.storages[wide].size_bytes
        )
        self.pointwise(f"{name}.mul", [wide, scale], normed)
        self.pointwise(f"{name}.to", [normed], out)
        self.saved[-1].update({f"{name}.fp32": wide, f"{name}.rstd": scale, f"{name}.normed": normed})
        return out

    def forward_layer(self, x: int) -> int:
        self.saved.append({})
        saved = self.saved[-1]
        for name in self.SHAPES:
            self.declare(name)
        h = self.norm("norm1", x)
        q, k, v = (self.linear(name, h) for name in "qkv")
        q, k = (self.pointwise(f"{n}.rope", [s], self.act(f"{n}.rope")) for n, s in (("q", q), ("k", k)))
        attention, lse = self.act("attention"), self.b.storage(f"{self.module}.lse", self.t * 4)
        self.op("sdpa", [q, k, v], [attention, lse], self.t * self.t * self.h / 20000, self.t * 64)
        middle = self.pointwise("residual1", [x, self.linear("o", attention)], self.act("residual1"))
        h = self.norm("norm2", middle)
        gate, up = self.linear("gate", h), self.linear("up", h)
        silu = self.pointwise("silu", [gate], self.act("silu", 4))
        product = self.pointwise("product", [silu, up], self.act("product", 4))
        saved.update(q=q, k=k, v=v, attention=attention, lse=lse, gate=gate, up=up, silu=silu, h2=h)
        return self.pointwise("residual2", [middle, self.linear("down", product)], self.act("residual2"))

    def linear_backward(self, name: str, grad: int) -> int:
        rows, columns = self.SHAPES[name]
        key, saved = f"{self.module}.{name}", self.saved[int(self.module.split(".")[1])]
        flops = self.t * self.h * self.h * rows * columns * 2
        low_grad = self.b.storage(f"{key}.low.grad", self.t * 16)
        a, b = self.lora[key]
        grads = [self.b.storage(f"{s.name}.grad", s.size_bytes) for s in (self.b.storages[a], self.b.storages[b])]
        self.op(f"{name}.grad_b", [saved[f"{name}.low"], grad], [grads[1]], flops / 800000 + 1)
        self.op(f"{name}.grad_low", [grad, b], [low_grad], flops / 800000 + 1)
        self.op(f"{name}.grad_a", [saved[f"{name}.x"], low_grad], [grads[0]], flops / 800000 + 1)
        base, extra, out = (
            self.act(f"{name}.base.grad", rows),
            self.act(f"{name}.extra.grad", rows),
            self.act(f"{name}.grad", rows),
        )
        self.op(f"{name}.mm.grad", [grad, self.weight(name)], [base], flops / 50000)
        self.op(f"{name}.extra.grad", [low_grad, a], [extra], flops / 800000 + 1)
        self.pointwise(f"{name}.sum.grad", [base, extra], out)
        self.update(key, grads)
        return out

    def update(self, key: str, grads: list[int]) -> None:
        self.phase = "update"
        for side, parameter, grad in zip("AB", self.lora[key], grads, strict=True):
            size = self.b.storages[parameter].size_bytes
            states = self.state[f"{key}.{side}"]
            for state in states:
                self.op(f"{side}.{state}", [grad], [], size / 2000, 0, (state,))
            step = self.b.storage(f"{key}.{side}.step", size)
            self.op(f"{key}.{side}.direction", [*states, grad], [step], size / 2000)
            self.op(f"{key}.{side}.update", [step], [], size / 2000, 0, (parameter,))
        self.phase = "backward"

    def norm_backward(self, name: str, grad: int, saved: dict[str, int]) -> int:
        wide, product, out = (
            self.act(f"{name}.grad32", 1, 4),
            self.act(f"{name}.product", 1, 4),
            self.act(f"{name}.grad"),
        )
        self.pointwise(f"{name}.grad.float", [grad], wide)
        self.pointwise(f"{name}.grad.mul", [wide, saved[f"{name}.normed"], saved[f"{name}.rstd"]], product)
        self.pointwise(f"{name}.grad.to", [product, saved[f"{name}.fp32"], saved[f"{name}.rstd"]], out)
        return out

    def backward_layer(self, layer: int, grad: int) -> int:
        self.module, self.phase = f"layers.{layer}", "backward"
        saved = self.saved[layer]
        product = self.linear_backward("down", grad)
        up = self.pointwise("up.in.grad", [product, saved["silu"]], self.act("up.in.grad", 4))
        gate = self.pointwise("gate.in.grad", [product, saved["up"], saved["gate"]], self.act("gate.in.grad", 4))
        h = self.pointwise(
            "h2.grad", [self.linear_backward("up", up), self.linear_backward("gate", gate)], self.act("h2.grad")
        )
        middle = self.pointwise("middle.grad", [grad, self.norm_backward("norm2", h, saved)], self.act("middle.grad"))
        attention = self.linear_backward("o", middle)
        parts = [self.act(f"{n}.in.grad") for n in "qkv"]
        self.op(
            "sdpa.grad",
            [attention, *(saved[n] for n in ("q", "k", "v", "attention", "lse"))],
            parts,
            self.t * self.t * self.h / 8000,
            self.t * self.h * 4,
        )
        grads = [self.linear_backward(n, part) for n, part in zip("qkv", parts, strict=True)]
        h = self.pointwise("h1.grad", grads, self.act("h1.grad"))
        return self.pointwise("x.grad", [middle, self.norm_backward("norm1", h, saved)], self.act("x.grad"))

    def build(self) -> Problem:
        self.module = "embedding"
        ids = self.b.storage("batch", self.t * 8, persistent=True, movable=False)
        x = self.act("x")
        self.op("embedding", [ids], [x], 10)
        for layer in range(self.layers):
            self.module = f"layers.{layer}"
            x = self.forward_layer(x)
        self.module, self.phase = "head", "backward"
        loss, grad = self.b.storage("loss", 4, output=True), self.act("grad")
        self.op("loss", [x, ids], [loss, grad], self.t * self.h, self.t * self.h * 20)
        for layer in reversed(range(self.layers)):
            grad = self.backward_layer(layer, grad)
        total = sum(s.size_bytes for s in self.b.storages)
        return self.b.problem(
            total,
            read_bytes_per_us=1000.0,
            write_bytes_per_us=500.0,
            latency_us=50,
            name=f"transformer {self.layers}x{self.h}x{self.t}",
        )


def llm() -> Problem:
    """The size of a real 24-layer LoRA step: about 8,000 ops. For timing by hand, too slow for the tests."""
    return transformer(24, 896, 256, splits=4)


def with_room_for_all(problem: Problem) -> Problem:
    """Its budget is what keeping everything needs."""
    return problem.with_budget(replay(problem, keep_all(problem), False).peak_bytes)


def states_on_disk(problem: Problem) -> list[tuple[Tables, State]]:
    """States on the greedy path that use the disk, each under a budget that leaves some room."""
    tables, draw = Tables(problem), random.Random(len(problem.ops))
    found = [state for state in descend(tables, 0.0) if state.profile.transfer_us]
    room = [int(state.profile.peak_bytes * draw.choice([1.0, 1.1, 1.5])) for state in found]
    return [(Tables(problem.with_budget(budget)), state) for budget, state in zip(room, found, strict=True)]

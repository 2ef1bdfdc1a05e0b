"""Optimized HLO text as data: computations, their instructions, and how often loops run.

XLA's own cost figures count a loop's body once. Here the text of a compiled program is read, so that `planning.cost`
can multiply what a body does by its trip count.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

BITS = {"pred": 8, "token": 0, "opaque": 0}  # beside the types whose name ends in their number of bits

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=\s]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r'^\}(, execution_thread="[^"]*")?\s*$')  # of a computation, which may run on another core
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a program on one device: its element type, dimensions and layout as written."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"(\d+)", self.dtype)
            bits = int(digits.group(1)) if digits else 0
        return -(-self.size * bits // 8)

    @property
    def in_main_memory(self) -> bool:
        """False for what lies in a memory space of its own (`S(1)`, a TPU core's scratch memory)."""
        return "S(" not in self.layout


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays in a type: one, or those of a tuple, nested ones flattened."""
    return tuple(
        Shape(dtype, tuple(int(d.strip().lstrip("<=")) for d in dims.split(",") if d.strip()), layout or "")
        for dtype, dims, layout in _SHAPE.findall(text)
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands in the parentheses, as written
    attributes: str
    is_root: bool

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        return parse_shapes(self.type)

    @property
    def shape(self) -> Shape:
        """The first array, the only one but for tuples."""
        return self.shapes[0]

    @property
    def op_name(self) -> str:
        """The path of JAX scopes that it comes from."""
        found = _OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations it calls, by role: calls, body, condition, to_apply, branch0, branch1, ..."""
        roles = dict(_CALLED.findall(self.attributes))
        for branches in _BRANCHES.findall(self.attributes):
            roles |= {f"branch{i}": name for i, name in enumerate(re.findall(r"[\w.\-]+", branches))}
        return roles


class Computation(dict[str, Instruction]):
    """Instructions by name, in order."""

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.values() if instruction.is_root)

    def resolve(self, name: str) -> Instruction:
        """The instruction that `name` stands for, behind copies and bitcasts."""
        instruction = self[name]
        while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start") and instruction.operands:
            instruction = self[instruction.operands[0]]
        return instruction


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program for one device."""

    computations: dict[str, Computation]
    entry: Computation

    def __iter__(self) -> Iterator[Computation]:
        return iter(self.computations.values())


def parse_module(text: str) -> Module:
    """Reads the text of an optimized module. Raises ValueError when it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in _whole_lines(text):
        if current is None:
            header = _COMPUTATION.match(line)
            if header:
                current = computations[header.group(2)] = Computation()
                entry = current if header.group(1) else entry
        elif _END.match(line):
            current = None
        elif instruction := parse_instruction(line):
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text of the compiled program has no entry computation")
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """The lines of a module. What a kernel says of itself may hold line breaks, which end no line here."""
    pending = ""
    for line in text.splitlines():
        begins = _INSTRUCTION.match(line) or _COMPUTATION.match(line) or _END.match(line) or not line
        if begins and pending:
            yield pending
            pending = ""
        pending = line if begins else f"{pending} {line}"
    yield pending


def parse_instruction(line: str) -> Instruction | None:
    """The instruction on a line, or None when there is none."""
    start = _INSTRUCTION.match(line)
    if start is None:
        return None
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return None
    close = _closing(rest, opcode.end() - 1)
    literal = rest[opcode.end() : close]
    return Instruction(
        name=start.group(2),
        type=rest[:end],
        opcode=opcode.group(1),
        operands=tuple(_NAME.findall(literal)),
        literal=literal,
        attributes=rest[close + 1 :],
        is_root=bool(start.group(1)),
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for position in range(start, len(text)):
        if text[position] == "(":
            depth += 1
        elif text[position] == ")":
            depth -= 1
            if depth == 0:
                return position
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs when the program itself says so; None when that depends on data.

    Either XLA has noted it, or the condition compares a counter, which starts at a constant and goes up by another,
    with a constant. (A product that is computed while its shards travel goes around by two.)
    """
    noted = _KNOWN_TRIPS.search(loop.attributes)
    if noted:
        return int(noted.group(1))
    condition, body = (module.computations[loop.called[role]] for role in ("condition", "body"))
    compared = _compared(module, condition)
    if compared is None:
        return None

    def outside(_: int, element: int | None) -> int | None:
        """What the loop starts with."""
        carried = computation.resolve(loop.operands[0])
        if carried.opcode != "tuple" or element is None:
            return None
        return _integer(module, computation, carried.operands[element], _unknown)

    start, stop = (_integer(module, condition, name, outside) for name in compared)
    counter = condition.resolve(compared[0])
    if start is None or stop is None or counter.opcode != "get-tuple-element":
        return None
    results = body.resolve(body.root.name)
    if results.opcode != "tuple":
        return None
    following = _integer(module, body, results.operands[_element(counter)], outside)
    if following is None or following <= start:
        return None
    return max(-(-(stop - start) // (following - start)), 0)


def _compared(module: Module, condition: Computation) -> tuple[str, str] | None:
    """The names, in `condition`, of the two sides of its one `a < b`."""
    root = condition.resolve(condition.root.name)
    if root.opcode == "fusion":
        fused = module.computations[root.called["calls"]]
        inner = fused.resolve(fused.root.name)
        if inner.opcode == "compare" and "direction=LT" in inner.attributes:
            sides = [fused.resolve(name) for name in inner.operands]
            if all(side.opcode == "parameter" for side in sides):
                first, second = (root.operands[int(side.literal)] for side in sides)
                return first, second
        return None
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    first, second = root.operands
    return first, second


# What is known of a computation's arguments: (number of the parameter, element of it if a tuple) -> its value.
Arguments = Callable[[int, int | None], int | None]


def _unknown(number: int, element: int | None) -> None:
    return None


def _integer(module: Module, part: Computation, name: str, arguments: Arguments) -> int | None:
    """The value of a scalar of integers, where it follows from constants and known arguments alone."""
    instruction = part.resolve(name)
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        text = instruction.literal.strip()
        return int(text) if re.fullmatch(r"-?\d+", text) else None
    if opcode == "parameter":
        return arguments(int(instruction.literal), None)
    if opcode in ("add", "subtract"):
        one, other = (_integer(module, part, operand, arguments) for operand in operands)
        if one is None or other is None:
            return None
        return one + other if opcode == "add" else one - other
    element = None
    if opcode == "get-tuple-element":
        element, instruction = _element(instruction), part.resolve(operands[0])
        if instruction.opcode == "parameter":
            return arguments(int(instruction.literal), element)
        if instruction.opcode == "tuple":
            return _integer(module, part, instruction.operands[element], arguments)
    if instruction.opcode != "fusion":
        return None
    fused = module.computations[instruction.called["calls"]]
    given = instruction.operands
    inside = lambda number, _: _integer(module, part, given[number], arguments)
    return _integer(module, fused, fused.root.name if element is None else fused.root.operands[element], inside)


def _element(instruction: Instruction) -> int:
    """Of a tuple, which one a `get-tuple-element` takes."""
    index = re.search(r"index=(\d+)", instruction.attributes)
    assert index is not None, instruction
    return int(index.group(1))


def convolution_flops(module_part: Computation, instruction: Instruction) -> int:
    """Multiplications and additions of a `convolution`, the form that TPU programs give matrix products.

        2 * output batch * output features * input features a group * product over window dimensions of the pairs
        (output position, kernel position) that meet a real input

    Positions that fall on padding, or between the elements of a dilated input, are not computed and do not count.
    """
    lhs, rhs = (module_part[name].shape for name in instruction.operands[:2])
    labels = re.search(r"dim_labels=(\S+?)_(\S+?)->([^,\s]+)", instruction.attributes)
    assert labels is not None, instruction
    lhs_labels, rhs_labels, out_labels = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    groups = int((re.search(r"batch_group_count=(\d+)", instruction.attributes) or [0, 1])[1])
    out = instruction.shape
    flops = 2 * out.dims[out_labels.index("b")] * out.dims[out_labels.index("f")] * rhs.dims[rhs_labels.index("i")]
    for number, label in enumerate(sorted(label for label in lhs_labels if label.isdigit())):
        numbers = lambda key, empty, number=number: int(fields[key].split("x")[number]) if key in fields else empty
        low = int(fields["pad"].split("x")[number].split("_")[0]) if "pad" in fields else 0
        flops *= valid_pairs(
            size=lhs.dims[lhs_labels.index(label)],
            kernel=rhs.dims[rhs_labels.index(label)],
            out=out.dims[out_labels.index(label)],
            stride=numbers("stride", 1),
            low=low,
            base=numbers("lhs_dilate", 1),
            dilation=numbers("rhs_dilate", 1),
        )
    return flops // groups


@functools.lru_cache(maxsize=4096)
def valid_pairs(*, size: int, kernel: int, out: int, stride: int, low: int, base: int, dilation: int) -> int:
    """Of all (output, kernel) positions along one window dimension, those that read an element of the input."""
    last = (size - 1) * base
    count = 0
    for k in range(kernel):
        offset = k * dilation - low
        if base == 1:
            # 0 <= o * stride + offset <= last
            first = max(0, -(offset // stride)) if offset < 0 else 0
            final = min(out - 1, (last - offset) // stride)
            count += max(final - first + 1, 0)
        else:
            positions = range(offset, offset + out * stride, stride)
            count += sum(0 <= position <= last and position % base == 0 for position in positions)
    return count


def dot_flops(part: Computation, instruction: Instruction) -> int:
    """Multiplications and additions of a `dot`: 2 * output elements * contracted elements."""
    lhs = part[instruction.operands[0]].shape
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = [lhs.dims[int(d)] for d in dims.group(1).split(",") if d] if dims else []
    return 2 * instruction.shape.size * math.prod(contracted)

"""Reads a compiled program: whether it updates the cache in place."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax

_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = ([\w\[\],{}:()/*= ]*?) ?([a-z][\w-]*)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.-]+)"
)
_ALIAS = re.compile(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)")
# Of a call of a kernel with several results: which of them takes over an operand's memory.
_CALL_ALIAS = re.compile(r"\{(\d+)\}: \(\d+, \{\}\)")
_ARRAY = re.compile(r"\w+\[[\d,]*\]")

# What may yield pages without writing more than the new tokens. A fusion may if its root may.
_IN_PLACE = {
    "parameter",
    "get-tuple-element",
    "bitcast",
    "scatter",
    "dynamic-update-slice",
    "while",
    "conditional",
    "call",
    "tuple",
    "opt-barrier",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    result: str  # its type, such as "f32[12,3,64,16]{3,2,1,0}"
    opcode: str
    rest: str  # operands and attributes
    is_root: bool

    def called(self) -> list[str]:
        return [name for group in _CALLED.findall(self.rest) for name in re.findall(r"[\w.-]+", group)]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled module: the instructions of each computation, and which is the entry."""

    text: str
    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Module":
        computations: dict[str, list[Instruction]] = {}
        entry, current = "", None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            elif current is not None and (match := _INSTRUCTION.match(line)):
                current.append(Instruction(match[2], match[3], match[4], match[5], bool(match[1])))
        if not entry:
            raise ValueError("no ENTRY computation: is this HLO?")
        return cls(text, computations, entry)

    def running(self) -> Iterator[Instruction]:
        """All instructions whose result is an array of its own: those inside fusions have none."""
        waiting, seen = [self.entry], {self.entry}
        while waiting:
            for instruction in self.computations[waiting.pop()]:
                yield instruction
                if instruction.opcode not in ("fusion", "reduce", "scatter", "sort", "map", "reduce-window"):
                    new = set(instruction.called()) - seen
                    seen |= new
                    waiting += new

    def makers(self, instruction: Instruction) -> list[Instruction]:
        """What makes the result: of a fusion its root, of a root that is a tuple its elements."""
        if instruction.opcode != "fusion":
            return [instruction]
        inner = {inner.name: inner for inner in self.computations[instruction.called()[0]]}
        waiting = [next(inner for inner in inner.values() if inner.is_root)]
        makers = []
        while waiting:
            maker = waiting.pop()
            if maker.opcode in ("tuple", "bitcast"):  # they move nothing
                waiting += [inner[name] for name in re.findall(r"%([\w.-]+)", maker.rest.split(")")[0])]
            else:
                makers += self.makers(maker)
        return makers

    def aliased_parameters(self) -> list[Instruction]:
        """Parameters of the program whose memory an output takes over."""
        numbers = {int(number) for number in _ALIAS.findall(self.text.splitlines()[0])}
        return [
            instruction
            for instruction in self.computations[self.entry]
            if instruction.opcode == "parameter" and int(instruction.rest.split(")")[0]) in numbers
        ]


def in_place_problems(compiled: jax.stages.Compiled, cache: Any) -> list[str]:
    """Why a program does not update these arrays (the pages of all layers, or a tree of them) in place; empty if it
    does. INT8 pages have two kinds of arrays, values and scales.

    The pool should be larger than what a step gathers from it, or temporary memory says nothing.
    """
    pages = jax.tree.leaves(cache)
    sizes = {array.size for array in pages}
    largest = max(pages, key=lambda array: array.size)
    problems = []

    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None, "the backend gives no memory analysis"
    assert text is not None, "the backend gives no HLO"
    cache_bytes = sum(array.nbytes for array in pages)
    if memory.alias_size_in_bytes < cache_bytes:
        problems.append(f"{memory.alias_size_in_bytes} bytes are aliased, the cache has {cache_bytes}")
    if memory.temp_size_in_bytes >= largest.nbytes:
        problems.append(f"{memory.temp_size_in_bytes} temporary bytes, an array of pages has {largest.nbytes}")

    module = Module.parse(text)
    type_names = tuple({_type_name(array) for array in pages})
    aliased = sum(parameter.result.startswith(type_names) for parameter in module.aliased_parameters())
    if aliased != len(pages):
        problems.append(f"{aliased} of {len(pages)} arrays of pages are aliased to an output")

    def may_be_pages(result: str) -> bool:
        """A copy may have another shape and the same elements, but no smaller one."""
        return num_elements(result) in sizes or num_elements(result) > largest.size

    num_writes = 0
    for instruction in module.running():
        if instruction.opcode == "custom-call" and instruction.result.startswith("("):
            aliased_results = set(map(int, _CALL_ALIAS.findall(instruction.rest)))
            for index, result in enumerate(_ARRAY.findall(instruction.result)):
                if may_be_pages(result):
                    num_writes += index in aliased_results
                    if index not in aliased_results:
                        problems.append(f"custom-call makes {result} ({instruction.name})")
        for maker in module.makers(instruction):
            if not may_be_pages(maker.result):
                continue
            num_writes += maker.opcode in ("scatter", "dynamic-update-slice")
            if maker.opcode not in _IN_PLACE:
                problems.append(f"{maker.opcode} makes {maker.result} ({instruction.name})")
    if num_writes < len(pages):
        problems.append(f"{num_writes} writes into {len(pages)} arrays of pages")
    return problems


def _type_name(array: jax.Array) -> str:
    """As HLO has it: ``f32[12,3,64,16]``."""
    letter = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "s8"}[array.dtype.name]
    return f"{letter}[{','.join(map(str, array.shape))}]"


def num_elements(result: str) -> int:
    """Elements of an array type: 24 of ``f32[2,12]{1,0}``, 1 of ``f32[]``."""
    dims = re.match(r"\w+\[([\d,]*)\]", result)
    if dims is None:
        return 0
    total = 1
    for dim in filter(None, dims[1].split(",")):
        total *= int(dim)
    return total

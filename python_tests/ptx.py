"""The PTX that nvcc makes of kernels, run by the host: what a GPU is given, without one.

``translate()`` takes PTX with the instructions that the kernels of this library consist of. Those that differ by their
operands alone, as ``add.f32 %f1, %f2, %f3`` and ``add.f32 %f7, %f8, 0f3F800000``, are one C++ function, and a kernel is
a list of numbers: for each instruction that of its function, and its operands, which are slots of a thread (each
register has one, and each literal). All that is not known is an error. ``ptx.h`` runs the lists, with memory that
checks alignment, and with threads that must all meet at the same barrier.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable
from functools import cache

_TYPES = {f"{kind}{n}": f"{'u' * (kind != 's')}int{n}_t" for kind in "sub" for n in (8, 16, 32, 64)}
_TYPES |= {"f32": "float", "f64": "double", "pred": "bool"}
_FLOATS = ("float", "double")
# The type of a register, by the start of its name.
_REGISTERS = {"%p": "bool", "%rs": "uint16_t", "%rd": "uint64_t", "%r": "uint32_t", "%fd": "double", "%f": "float"}
_OTHERS = {"%SP": "uint64_t", "%SPL": "uint64_t", "%temp": "uint32_t"}
# What a slot starts with: one of these, and a number (Base in ptx.h).
_BASES = ("none", "local", "slots", "result", "param0", "param1", "shared", "%tid.x", "%ctaid.x", "%ntid.x")
_OF_KERNELS = _BASES[6:]
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "and": "&", "or": "|", "xor": "^"}
_FUNCTIONS = ("mad", "min", "max", "fma", "neg", "abs", "not", "sqrt", "shl", "shr", "rcp", "popc")
_WIDER = {"int16_t": "int32_t", "uint16_t": "uint32_t", "int32_t": "int64_t", "uint32_t": "uint64_t"}
_HALVES = {
    ("f32", "f16"): ("float", "from_half"),
    ("f32", "bf16"): ("float", "from_bfloat16"),
    ("f16", "f32"): ("uint16_t", "to_half"),
    ("bf16", "f32"): ("uint16_t", "to_bfloat16"),
}
_FUNCTION = re.compile(
    r"^(?:\.visible\s+|\.weak\s+)?\.(entry|func)\s+(?:\(\.param[^)]*\)\s*)?([\w$]+)\s*\([^;{]*?\)\s*(?:\.[^\n]*\n)*\s*\{",
    re.MULTILINE,
)
_ARRAY = re.compile(r"\.(shared|local)\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]")


def translate(units: Iterable[str]) -> tuple[str, array[int]]:
    """C++ of a function for each kernel, by its own (mangled) name, and the code, for load_code() of ptx.h."""
    steps: dict[str, int] = {}
    code = array("I")
    functions, kernels = [], []
    for ptx in units:
        numbers: dict[str, int] = {}
        for function in sorted(_functions(ptx), key=lambda function: function.is_kernel):
            numbers[function.name] = len(functions)
            if function.is_kernel:
                kernels.append(f"KERNEL({function.name}, {len(functions)})")
            functions.append(function.encode(code, steps, numbers))
    lines = ['#include "ptx.h"\n']
    lines += [f"static bool step{i}(Thread& r, const uint32_t* o) {{\n{body}}}" for body, i in steps.items()]
    lines += ["const Step steps[] = {", *(f"  step{i}," for i in range(len(steps))), "};"]
    lines += ["const Function functions[] = {", *functions, "};", *kernels, ""]
    return "\n".join(lines), code


def _functions(ptx: str) -> Iterable[_Function]:
    for match in _FUNCTION.finditer(ptx):
        kind, name = match.groups()
        yield _Function(name, kind == "entry", ptx[match.end() : ptx.index("\n}\n", match.end())])


def _split(operands: str) -> list[str]:
    """At the commas that are in no bracket."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands) if part.strip()]


def _parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


class _Function:
    def __init__(self, name: str, is_kernel: bool, body: str) -> None:
        self.name, self.is_kernel = name, is_kernel
        self.slots = 0
        self.registers: dict[str, int] = {}  # the slot of each
        self.starts: dict[tuple[str, int], int] = {}  # the slot that starts with a base and a number
        self.parameters: dict[str, int] = {}  # the first slot of what a function is called with, and returns
        self.arrays: dict[str, tuple[str, int]] = {}  # the space, and the place in it
        self.bytes = {"shared": 16, "local": 16}
        self.instructions: list[tuple[str, list[int | str]]] = []  # C++, and operands: a string is a label, a function
        self.labels: dict[str, int] = {}
        self.words = 0
        self.lines: list[str] = []  # of the instruction that is translated,
        self.operands: list[int | str] = []  # and its operands
        for statement in self._statements(body):
            self._statement(statement)

    @staticmethod
    def _statements(body: str) -> list[str]:
        body = re.sub(r"//[^\n]*", "", body)
        body = re.sub(r"^\s*([\w$]+:)", r"\1;", body, flags=re.MULTILINE)  # labels
        body = re.sub(r"^\s*[{}]\s*$", "", body, flags=re.MULTILINE)  # scopes
        body = re.sub(
            r"^\s*\{\s*([^{}\n]*(?:\{[^}\n]*\}[^{}\n]*)?;)\s*\}", r"\1", body, flags=re.MULTILINE
        )  # inline assembly
        return [" ".join(statement.split()) for statement in body.split(";") if statement.split()]

    def encode(self, code: array[int], steps: dict[str, int], numbers: dict[str, int]) -> str:
        """Appends to the code; and gives the Function of ptx.h."""
        places = self.labels | numbers
        start = len(code)
        for body, operands in self.instructions:
            code.append(steps.setdefault(body, len(steps)) << 8 | 1 + len(operands))
            code.extend(places[operand] if isinstance(operand, str) else operand for operand in operands)
        starts = len(code)
        for (base, number), slot in self.starts.items():
            code.extend((slot, _BASES.index(base), number & 0xFFFFFFFF, number >> 32))
        slots = self.slots + self.slots % 2
        memory = f"{self.bytes['shared']}, {self.bytes['local']}"
        return f"  {{{start}, {starts}, {len(self.starts)}, {slots}, {memory}}},"

    # Operands: C++ for them.

    def _new_slot(self, size: int = 1) -> int:
        self.slots += size
        return self.slots - size

    def _operand(self, operand: int | str) -> str:
        self.operands.append(operand)
        return f"o[{len(self.operands) - 1}]"

    def _slot(self, slot: int, type_: str) -> str:
        return f"r.slot<{type_}>({self._operand(slot)})"

    def _starting(self, base: str, number: int, type_: str) -> str:
        """A slot that starts with a number, or, from a base, so many bytes on."""
        assert self.is_kernel or base not in _OF_KERNELS
        key = base, number % 2**64
        if key not in self.starts:
            self.starts[key] = self._new_slot()
        return self._slot(self.starts[key], type_)

    @staticmethod
    @cache
    def _type_of(register: str) -> str:
        for start, type_ in _REGISTERS.items():
            if re.fullmatch(start + r"\d+", register):
                return type_
        return _OTHERS.get(register, "uint32_t")

    def _register(self, name: str) -> str:
        if name in _BASES:
            return self._starting(name, 0, self._type_of(name))
        if name not in self.registers:
            self.registers[name] = self._new_slot()
        return self._slot(self.registers[name], self._type_of(name))

    def _value(self, operand: str, type_: str) -> str:
        if operand.startswith("%"):
            own, register = self._type_of(operand), self._register(operand)
            if (own in _FLOATS) != (type_ in _FLOATS):
                return f"bits<{type_}>({register})"
            return register if own == type_ else f"{type_}({register})"
        if re.fullmatch(r"0[fd][0-9A-F]+", operand):
            assert type_ not in _FLOATS or (type_ == "double") == (operand[1] == "d")
            return self._starting("none", int(operand[2:], 16), type_)
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", operand):
            assert type_ not in _FLOATS
            return self._starting("none", int(operand, 0) if type_ != "bool" else operand != "0", type_)
        return self._symbol(operand)

    def _symbol(self, name: str) -> str:
        """A place in memory, as an address or, in shared memory, from its start."""
        if name in self.arrays:
            space, place = self.arrays[name]
            return self._starting("none" if space == "shared" else space, place, "uint64_t")
        if match := re.search(r"_(param_\d+)$", name):
            return self._starting(match.group(1).replace("_", ""), 0, "uint64_t")
        if name == "func_retval0":
            return self._starting("result", 0, "uint64_t")
        return self._starting("slots", 8 * self.parameters[name], "uint64_t")

    def _address(self, operand: str, space: list[str]) -> str:
        base, _, offset = operand.strip("[] ").partition("+")
        start = self._register(base) if base.startswith("%") else self._symbol(base)
        if "shared" in space:
            start = f"{self._starting('shared', 0, 'uint64_t')} + {start}"
        return f"{start} + int32_t({self._operand(int(offset or 0) & 0xFFFFFFFF)})"

    # Statements.

    def _emit(self, line: str) -> None:
        self.lines.append(line)

    def _set(self, register: str, type_: str, value: str) -> None:
        """Of the type that the instruction has; a register may be wider."""
        own = self._type_of(register)
        how = f"bits<{own}>" if (own in _FLOATS) != (type_ in _FLOATS) else ""
        self._emit(f"{self._register(register)} = {how}({type_}({value}));")

    def _statement(self, statement: str) -> None:
        if statement.endswith(":"):
            self.labels[statement[:-1]] = self.words
            return
        if statement.startswith("."):
            self._declaration(statement)
            return
        self.lines, self.operands = [], []
        if match := re.match(r"@(!?)(%p\d+) (.*)", statement):
            self._emit(f"if ({'!' * (not match.group(1))}{self._register(match.group(2))}) return true;")
            statement = match.group(3)
        name, _, operands = statement.partition(" ")
        operation, *modifiers = name.split(".")
        instruction = getattr(self, f"_{operation}", None)
        if operation in _INFIX or operation in _FUNCTIONS:
            self._arithmetic(operation, modifiers, _split(operands))
        elif instruction is not None:
            instruction(modifiers, _split(operands))
        else:
            raise NotImplementedError(statement)
        self.instructions.append(("".join(f"  {line}\n" for line in [*self.lines, "return true;"]), self.operands))
        self.words += 1 + len(self.operands)

    def _declaration(self, statement: str) -> None:
        if match := _ARRAY.match(statement):
            space, name, size = match.groups()
            self.arrays[name] = space, self.bytes[space]
            self.bytes[space] += -(-int(size) // 16) * 16
        elif statement.startswith(".param"):
            self.parameters[statement.split()[-1]] = self._new_slot(2)
        elif not statement.startswith((".reg", ".pragma")):
            raise NotImplementedError(statement)

    def _bra(self, _: list[str], operands: list[str]) -> None:
        self._emit(f"r.at = {self._operand(operands[0])};")

    def _ret(self, *_: list[str]) -> None:
        self._emit("return r.done();")

    _exit = _ret

    def _bar(self, *_: list[str]) -> None:
        assert not self.lines  # all threads come to it
        self._emit("return false;")

    def _call(self, _: list[str], operands: list[str]) -> None:
        result, name, *arguments = [part.strip("() ") for part in operands]
        places = ", ".join(self._symbol(place) for place in (result, *arguments))
        self._emit(f"call({self._operand(name)}, {{{places}}});")

    def _ld(self, modifiers: list[str], operands: list[str]) -> None:
        self._access(modifiers, operands[1])
        for i, register in enumerate(_parts(operands[0])):
            self._set(register, _TYPES[modifiers[-1]], f"memory[{i}]")

    def _st(self, modifiers: list[str], operands: list[str]) -> None:
        self._access(modifiers, operands[0])
        for i, part in enumerate(_parts(operands[1])):
            self._emit(f"memory[{i}] = {self._value(part, _TYPES[modifiers[-1]])};")

    def _access(self, modifiers: list[str], operand: str) -> None:
        """``memory``, an array."""
        type_, width = _TYPES[modifiers[-1]], next((int(m[1]) for m in modifiers if m in ("v2", "v4")), 1)
        self._emit(f"{type_}* const memory = at<{type_}>({self._address(operand, modifiers)}, {width});")

    def _atom(self, modifiers: list[str], operands: list[str]) -> None:
        if modifiers != ["global", "inc", "u32"]:
            raise NotImplementedError(f"atom.{'.'.join(modifiers)}")
        self._access(modifiers, operands[1])
        most = self._value(operands[2], "uint32_t")  # before the register of the result changes, which may be the same
        self._emit(f"const uint32_t before = memory[0]; memory[0] = before >= {most} ? 0 : before + 1;")
        self._set(operands[0], "uint32_t", "before")

    def _fence(self, *_: list[str]) -> None:
        """Blocks run one after the other."""

    def _cvta(self, modifiers: list[str], operands: list[str]) -> None:
        if "shared" in modifiers:
            raise NotImplementedError("an address of shared memory as one of all memory")
        self._set(operands[0], "uint64_t", self._value(operands[1], "uint64_t"))

    def _mov(self, modifiers: list[str], operands: list[str]) -> None:
        to, of = operands
        type_ = _TYPES[modifiers[-1]]
        if "{" in to or "{" in of:
            parts = _parts(to if "{" in to else of)
            width = int(modifiers[-1][1:]) // len(parts)
            if "{" in of:
                pieces = (f"uint64_t({self._value(p, f'uint{width}_t')}) << {width * i}" for i, p in enumerate(parts))
                self._set(to, type_, " | ".join(pieces))
            for i, part in enumerate(parts if "{" in to else ()):
                self._set(part, f"uint{width}_t", f"uint64_t({self._value(of, type_)}) >> {width * i}")
        else:
            self._set(to, type_, self._value(of, type_))

    def _setp(self, modifiers: list[str], operands: list[str]) -> None:
        compare, type_ = modifiers
        a, b = (self._value(operand, _TYPES[type_]) for operand in operands[1:])
        if compare in ("num", "nan"):
            result = f"{'!' * (compare == 'num')}is_nan({a}, {b})"
        elif compare in _COMPARE:
            result = f"{a} {_COMPARE[compare]} {b}" + (f" && !is_nan({a}, {b})" if compare == "ne" else "")
        else:
            result = f"{a} {_COMPARE[compare.removesuffix('u')]} {b} || is_nan({a}, {b})"
        self._set(operands[0], "bool", result)

    def _selp(self, modifiers: list[str], operands: list[str]) -> None:
        type_ = _TYPES[modifiers[-1]]
        a, b = (self._value(operand, type_) for operand in operands[1:3])
        self._set(operands[0], type_, f"{self._register(operands[3])} ? {a} : {b}")

    def _cvt(self, modifiers: list[str], operands: list[str]) -> None:
        *how, to, of = modifiers
        if (to, of) in _HALVES:
            type_, function = _HALVES[to, of]
            self._set(
                operands[0], type_, f"{function}({self._value(operands[1], 'float' if of == 'f32' else 'uint16_t')})"
            )
            return
        value = self._value(operands[1], _TYPES[of])
        rounding = {"rzi": "std::trunc", "rni": "std::nearbyint", "rmi": "std::floor", "rpi": "std::ceil"}
        value = next((f"{rounding[m]}({value})" for m in how if m in rounding), value)
        if _TYPES[of] in _FLOATS and _TYPES[to] not in _FLOATS:
            value = f"clamped<{_TYPES[to]}>({value})"
        self._set(operands[0], _TYPES[to], value)

    def _arithmetic(self, operation: str, modifiers: list[str], operands: list[str]) -> None:
        type_ = _TYPES[modifiers[-1]]
        if "hi" in modifiers:
            raise NotImplementedError(f"{operation}.hi")
        if "wide" in modifiers:
            type_, of = _WIDER[type_], type_
            values = [f"{type_}({self._value(operand, of)})" for operand in operands[1:3]]
            values += [self._value(operand, type_) for operand in operands[3:]]
        else:
            values = [self._value(operand, type_) for operand in operands[1:]]
        if operation == "mad":
            result = f"{values[0]} * {values[1]} + {values[2]}"
        elif operation in _INFIX:
            result = f" {_INFIX[operation]} ".join(values)
        else:
            result = f"{operation}{'_approximate' * ('approx' in modifiers)}_({', '.join(values)})"
        self._set(operands[0], type_, result)

"""The PTX that nvcc makes of kernels, as C++ that the host runs: what a GPU is given, without one.

``translate()`` takes PTX with the instructions that the kernels of this library consist of, and gives a C++ function
for each, by the kernel's own (mangled) name. The threads of a block run one after the other up to a barrier; each has
its registers in a struct, so that it goes on from there. All that is not known is an error. ``ptx.h`` is what the
functions need: memory that checks alignment, and threads that must all meet at the same barrier.
"""

from __future__ import annotations

import re
from functools import cache

_TYPES = {f"{kind}{n}": f"{'u' * (kind != 's')}int{n}_t" for kind in "sub" for n in (8, 16, 32, 64)}
_TYPES |= {"f32": "float", "f64": "double", "pred": "bool"}
_FLOATS = ("float", "double")
# The type of a register, by the start of its name.
_REGISTERS = {"%p": "bool", "%rs": "uint16_t", "%rd": "uint64_t", "%r": "uint32_t", "%fd": "double", "%f": "float"}
_OTHERS = {"%SP": "uint64_t", "%SPL": "uint64_t", "%temp": "uint32_t"}
_SPECIAL = {"%tid.x": "tid", "%ctaid.x": "block", "%ntid.x": "threads"}
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
    r"^(?:\.visible\s+|\.weak\s+)?\.(entry|func)\s+(?:\(\.param[^)]*\)\s*)?([\w$]+)\s*\(([^;{]*?)\)\s*(?:\.[^\n]*\n)*\s*\{",
    re.MULTILINE,
)
_REGISTER = re.compile(r"\.reg\s+\.(\w+)\s+(%?\w+)(?:<(\d+)>)?")
_ARRAY = re.compile(r"\.(shared|local)\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]")


def translate(ptx: str) -> str:
    """C++ of all kernels, and of the functions that they call."""
    functions = []
    for match in _FUNCTION.finditer(ptx):
        kind, name, parameters = match.groups()
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(ptx[end], 0)
            end += 1
        functions.append(_Function(name, kind == "entry", parameters.count(".param"), ptx[match.end() : end - 1]))
    functions.sort(key=lambda function: function.is_kernel)
    return '#include "ptx.h"\n\n' + "\n".join(function.code() for function in functions)


def _split(operands: str) -> list[str]:
    """At the commas that are in no bracket."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands) if part.strip()]


def _parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


class _Function:
    def __init__(self, name: str, is_kernel: bool, parameters: int, body: str) -> None:
        self.name, self.is_kernel, self.parameters = name, is_kernel, parameters
        self.registers: dict[str, str] = {}
        self.arrays: dict[str, tuple[str, int]] = {}  # the space, and the place in it
        self.bytes = {"shared": 16, "local": 16}
        self.lines: list[str] = []
        self.barriers = 0
        self.guard = ""
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

    # Operands.

    @staticmethod
    @cache
    def _type_of(register: str) -> str:
        for start, type_ in _REGISTERS.items():
            if re.fullmatch(start + r"\d+", register):
                return type_
        return _OTHERS.get(register, "uint32_t")

    def _register(self, name: str) -> str:
        return _SPECIAL.get(name, f"r.{name[1:]}")

    def _value(self, operand: str, type_: str) -> str:
        if operand.startswith("%"):
            own, register = self._type_of(operand), self._register(operand)
            if (own in _FLOATS) != (type_ in _FLOATS):
                return f"bits<{type_}>({register})"
            return register if own == type_ else f"{type_}({register})"
        if re.fullmatch(r"0[fd][0-9A-F]+", operand):
            return f"bits<{type_}>(uint{32 if operand[1] == 'f' else 64}_t(0x{operand[2:]}))"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", operand):
            return f"{type_}({operand}LL)"
        return self._symbol(operand)

    def _symbol(self, name: str) -> str:
        """A place in memory, as an address or, in shared memory, from its start."""
        if name in self.arrays:
            space, place = self.arrays[name]
            return str(place) if space == "shared" else f"(uint64_t(r.local) + {place})"
        if match := re.search(r"_param_(\d+)$", name):
            return f"uint64_t(param{match.group(1)})"
        return "uint64_t(result)" if name == "func_retval0" else f"uint64_t(&r.{name})"

    def _address(self, operand: str, space: list[str]) -> str:
        base, _, offset = operand.strip("[] ").partition("+")
        start = self._register(base) if base.startswith("%") else self._symbol(base)
        return f"{'uint64_t(shared) + ' * ('shared' in space)}{start} + ({offset or 0})"

    # Statements.

    def _emit(self, line: str) -> None:
        self.lines.append(self.guard + line)

    def _set(self, register: str, type_: str, value: str) -> None:
        """Of the type that the instruction has; a register may be wider."""
        own = self._type_of(register)
        how = f"bits<{own}>" if (own in _FLOATS) != (type_ in _FLOATS) else ""
        self._emit(f"{self._register(register)} = {how}({type_}({value}));")

    def _statement(self, statement: str) -> None:
        self.guard = ""
        if statement.endswith(":"):
            self._emit(statement.replace("$", "L") + ";")
            return
        if match := re.match(r"@(!?)(%p\d+) (.*)", statement):
            self.guard = f"if ({match.group(1)}{self._register(match.group(2))}) "
            statement = match.group(3)
        if statement.startswith("."):
            self._declaration(statement)
            return
        name, _, operands = statement.partition(" ")
        operation, *modifiers = name.split(".")
        instruction = getattr(self, f"_{operation}", None)
        if operation in _INFIX or operation in _FUNCTIONS:
            self._arithmetic(operation, modifiers, _split(operands))
        elif instruction is not None:
            instruction(modifiers, _split(operands))
        else:
            raise NotImplementedError(statement)

    def _declaration(self, statement: str) -> None:
        if match := _REGISTER.match(statement):
            type_, name, count = match.groups()
            names = [f"{name}{i}" for i in range(int(count))] if count else [name]
            self.registers |= {register.lstrip("%"): _TYPES[type_] for register in names}
        elif match := _ARRAY.match(statement):
            space, name, size = match.groups()
            self.arrays[name] = space, self.bytes[space]
            self.bytes[space] += -(-int(size) // 16) * 16
        elif statement.startswith(".param"):
            self.registers[statement.split()[-1]] = "Parameter"
        elif not statement.startswith(".pragma"):
            raise NotImplementedError(statement)

    def _bra(self, _: list[str], operands: list[str]) -> None:
        self._emit(f"goto {operands[0].replace('$', 'L')};")

    def _ret(self, *_: list[str]) -> None:
        self._emit("return false;" if self.is_kernel else "return;")

    _exit = _ret

    def _bar(self, *_: list[str]) -> None:
        assert not self.guard
        self.barriers += 1
        self._emit(f"r.at = {self.barriers}; return true; case {self.barriers}:;")

    def _call(self, _: list[str], operands: list[str]) -> None:
        result, name, *arguments = [part.strip("() ") for part in operands]
        self._emit(f"{name}({', '.join(f'&r.{p}' for p in (result, *arguments))});")

    def _ld(self, modifiers: list[str], operands: list[str]) -> None:
        self._access(modifiers, operands[1])
        for i, register in enumerate(_parts(operands[0])):
            self._set(register, _TYPES[modifiers[-1]], f"memory[{i}]")
        self._emit("}")

    def _st(self, modifiers: list[str], operands: list[str]) -> None:
        self._access(modifiers, operands[0])
        for i, part in enumerate(_parts(operands[1])):
            self._emit(f"memory[{i}] = {self._value(part, _TYPES[modifiers[-1]])};")
        self._emit("}")

    def _access(self, modifiers: list[str], operand: str) -> None:
        """Opens a scope with ``memory``, an array."""
        type_, width = _TYPES[modifiers[-1]], next((int(m[1]) for m in modifiers if m in ("v2", "v4")), 1)
        self._emit(f"{{ {type_}* const memory = at<{type_}>({self._address(operand, modifiers)}, {width});")
        self.guard = ""

    def _atom(self, modifiers: list[str], operands: list[str]) -> None:
        if modifiers != ["global", "inc", "u32"]:
            raise NotImplementedError(f"atom.{'.'.join(modifiers)}")
        self._access(modifiers, operands[1])
        most = self._value(operands[2], "uint32_t")  # before the register of the result changes, which may be the same
        self._emit(f"const uint32_t before = memory[0]; memory[0] = before >= {most} ? 0 : before + 1;")
        self._set(operands[0], "uint32_t", "before")
        self._emit("}")

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

    def code(self) -> str:
        registers = "\n".join(f"  {type_} {name};" for name, type_ in self.registers.items())
        lines = "\n".join(f"  {line}" for line in self.lines)
        of = f"Registers_{self.name}"
        struct = (
            f"struct {of} : Thread {{\n{registers}\n  alignas(16) unsigned char local[{self.bytes['local']}];\n}};\n"
        )
        parameters = "".join(f", const void* param{i}" for i in range(self.parameters))
        if not self.is_kernel:
            return f"{struct}static void {self.name}(void* result{parameters}) {{\n  {of} r;\n{lines}\n}}\n"
        arguments = "unsigned char* shared, unsigned tid, unsigned block, unsigned threads, const void* param0"
        return f"""{struct}static bool run_{self.name}({of}& r, {arguments}) {{
  switch (r.at) {{
  case 0:
{lines}
  }}
  return false;
}}
extern "C" void {self.name}(const void* param0, unsigned block, unsigned threads) {{
  run_block<{of}, {self.bytes["shared"]}>(threads, [=]({of}& r, unsigned char* shared, unsigned tid) {{
    return run_{self.name}(r, shared, tid, block, threads, param0);
  }});
}}
"""

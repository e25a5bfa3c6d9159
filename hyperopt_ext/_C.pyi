"""The extension module; see csrc/module.cpp. Importing it registers torch.ops.hyperopt_ext."""

from typing import TypedDict

class HyperparameterInfo(TypedDict):
    name: str
    initial: float
    low: float
    high: float
    space: str
    learned: bool

class RuleInfo(TypedDict):
    id: int
    name: str
    hypers: list[HyperparameterInfo]
    state: list[str]

TICKS: int
TICKING: int
SKIPPED: int
HELD: int
SCHEDULE: int
ARRIVED: int
SPACE_BITS: int
SETTINGS: list[str]
PLAN: list[str]

def spaces() -> list[str]: ...
def rules() -> list[RuleInfo]: ...
def add_rules(address: int) -> list[str]: ...
def record(rule: str, learn: int, traced: bool) -> list[str]: ...
def tower_plan(levels: list[int]) -> list[int]: ...
def tower_row(plan: list[int], values: list[float], state: list[float]) -> list[float]: ...
def tower_offsets(plan: list[int]) -> list[list[int]]: ...
def library() -> int: ...
